"""The commands of `jam-hf` beside the quickstart's stages: a module each, with `add_arguments` and `run`.

`fuse` is a stage too, and explains itself by that; the others have `HELP`.

`run` imports what it needs when it is called, so that the command line itself stays light.
"""

DEFAULT_RUN = "runs/quickstart"
