"""The commands of `jam-hf`, a module each: `Options`, the dataclass that its parser is made from, and `run(options)`.

Importing them imports nothing of jam_hf: `run` does, so that help and a mistyped flag cost no seconds. The docstring of
`Options` is the command's line in `jam-hf --help`. `RESUMES`: interrupted, the same command goes on where it was.
"""
