"""Convert the VQ model of a public image parent; a thin script over `jam_hf.conversion.vq`.

    python conversion/convert_vq_to_jam_hf.py --source vqgan.ckpt --sample-size 512 --allow-old-files --output runs/vq
    python conversion/convert_vq_to_jam_hf.py --source deepseek-community/Janus-Pro-1B \\
        --codebook-l2-norm --output runs/vq

It is `jam-hf convert-vq` under another name; `--help` lists the options.
"""

import sys

from jam_hf_cli import main


if __name__ == "__main__":
    sys.exit(main(["convert-vq", *sys.argv[1:]], own_process=True))
