"""The commands of `jam-hf` beside the quickstart's stages: a module each, with `HELP`, `add_arguments` and `run`.

`run` imports what it needs when it is called, so that the command line itself stays light.
"""

DEFAULT_RUN = "runs/quickstart"
