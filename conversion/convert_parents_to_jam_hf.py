"""Fuse two parents into a JAM checkpoint; a thin script over `jam_hf.fuse`, for who looks for a conversion script.

    python conversion/convert_parents_to_jam_hf.py --text runs/quickstart/llm --image runs/quickstart/image-model \\
        --vq runs/quickstart/vq --mode cross --init preserving --output runs/jam-cross

It is `jam-hf fuse` under another name; `--help` lists the options.
"""

import sys

from jam_hf_cli import main


if __name__ == "__main__":
    sys.exit(main(["fuse", *sys.argv[1:]], own_process=True))
