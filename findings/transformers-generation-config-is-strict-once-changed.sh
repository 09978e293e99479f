#!/usr/bin/env bash
# transformers 5.23.0: whether a generation config can be saved depends on whether anything in it was changed since it
# was read.
#
# Some published models ship a temperature without do_sample. Such a file is read with a warning and written back as
# it is; set any other field, max_new_tokens say, and save_pretrained raises. A training run that touches the config
# finds out when it saves, at its end.
#
# Seen: {temperature 0.6, top_p 0.9}: saved as loaded; after `config.max_new_tokens = 7`: ValueError, GenerationConfig
# is invalid.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

from transformers import GenerationConfig

Path("parent").mkdir()
Path("parent/generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
config = GenerationConfig.from_pretrained("parent")
config.save_pretrained("as-loaded")
config.max_new_tokens = 7
try:
    config.save_pretrained("changed")
except ValueError as error:
    print("as loaded: saved; changed:", str(error).splitlines()[0])
else:
    raise SystemExit("a changed config is saved like an unchanged one now")
PY
