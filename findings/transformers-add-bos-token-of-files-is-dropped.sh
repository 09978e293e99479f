#!/usr/bin/env bash
# transformers 5.23.0: add_bos_token in tokenizer_config.json is passed over wherever there is a tokenizer.json; 4.57.1
# obeyed it.
#
# Checkpoints whose tokenizer.json has no post-processor and whose tokenizer_config.json asks for the begin
# (DeepSeek-V3's, for one) start their documents without it since transformers 5, and the next save drops the wish
# from the file too.
#
# Seen: 4.57.1 encodes "abc" as [0, 2, 3, 4], 5.23.0 as [2, 3, 4].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > encode.py <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, __version__

vocab = {"<s>": 0, "</s>": 1, **{letter: 2 + index for index, letter in enumerate("abcdefgh")}}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
tokenizer.add_special_tokens(["<s>", "</s>"])
Path("parent").mkdir(exist_ok=True)
tokenizer.save("parent/tokenizer.json")
settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
Path("parent/tokenizer_config.json").write_text(json.dumps(settings))
ids = AutoTokenizer.from_pretrained("parent")("abc")["input_ids"]
print(f"transformers {__version__}: {ids}")
assert ids == ([0, 2, 3, 4] if __version__.startswith("4.") else [2, 3, 4]), "add_bos_token is read otherwise now"
PY
for version in 4.57.1 5.23.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet "transformers==$version"
    HF_HUB_OFFLINE=1 "$version/bin/python" encode.py
done
