#!/usr/bin/env bash
# transformers 5.23.0: how text is split is chosen by the model_type in config.json; tokenizer.json is passed over.
#
# For some model types AutoTokenizer takes the family's own class, which builds its pre-tokenizer anew instead of taking
# that of tokenizer.json, even where tokenizer_config.json asks for PreTrainedTokenizerFast. A tokenizer that was
# trained beside a Qwen2 splits otherwise as soon as a config.json lies beside it, and the model reads other ids than it
# learned.
#
# Seen, a byte-level tokenizer that keeps numbers together, "ab123": [10, 11, 15] by the file, without a config.json and
# beside a Llama's; beside a Qwen2's [10, 11, 1, 2, 3], by Qwen2Tokenizer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

letters = {letter: index for index, letter in enumerate("0123456789abc\u0120")}
vocab = {**letters, "12": len(letters), "123": len(letters) + 1, "<|endoftext|>": len(letters) + 2}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("12", "3")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
Path("parent").mkdir()
tokenizer.save("parent/tokenizer.json")
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
Path("parent/tokenizer_config.json").write_text(json.dumps(settings))

ids = {"tokenizer.json": tokenizer.encode("ab123").ids}
for kind, config in (("no config.json", None), ("llama", LlamaConfig), ("qwen2", Qwen2Config)):
    if config is not None:
        config().save_pretrained("parent")
    loaded = AutoTokenizer.from_pretrained("parent")
    ids[kind] = loaded("ab123")["input_ids"]
    print(f"{kind}: {ids[kind]}, {type(loaded).__name__}")
assert ids["no config.json"] == ids["llama"] == ids["tokenizer.json"], "another model type splits otherwise now"
assert ids["qwen2"] != ids["tokenizer.json"], "tokenizer.json is obeyed beside a Qwen2 now"
PY
