"""metaseq's OPT or CM3leon checkpoint to transformers' OPT; a thin script over `jam_hf.conversion.metaseq`.

    python conversion/convert_metaseq_to_hf.py --source checkpoints/cm3leon --output runs/cm3leon \\
        --num-attention-heads 32 --activation-function gelu

`checkpoints/cm3leon` holds one consolidated .pt, or `reshard-model_part-0.pt`, `reshard-model_part-1.pt`, ... It is
`jam-hf convert-metaseq` under another name; `--help` lists the options.
"""

import sys

from jam_hf_cli import main


if __name__ == "__main__":
    sys.exit(main(["convert-metaseq", *sys.argv[1:]], own_process=True))
