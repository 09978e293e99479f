"""What is done with a JAM beside loading, generating and decoding: streaming, the best of several pictures, documents
found for a prompt, infilling, files. None of it travels into checkpoints; it may import the model, and the model
reaches it through one door, model/package_jam.py.
"""
