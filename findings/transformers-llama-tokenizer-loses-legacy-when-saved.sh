#!/usr/bin/env bash
# transformers 5.23.0: a LlamaTokenizer with legacy=True splits text otherwise after save_pretrained and
# from_pretrained.
#
# `legacy` is not written down, and the class rebuilds its pre-tokenizer from its settings instead of taking
# tokenizer.json as it stands. So old Llama checkpoints lose the blank behind a special token the first time somebody
# saves them beside a model.
#
# Seen: "</s>a" is [2, 12] ("</s>", "▁a") before, [2, 4] ("</s>", "a") after. PreTrainedTokenizerFast.from_pretrained
# of the same folder gives [2, 12].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

letters = {letter: 4 + index for index, letter in enumerate("abcdefgh")}
vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, **letters, "\u2581a": 12}
tokenizer = LlamaTokenizer(vocab=vocab, merges=[("\u2581", "a")], legacy=True)
tokenizer.save_pretrained("saved")
before = tokenizer("</s>a")["input_ids"]
after = LlamaTokenizer.from_pretrained("saved")("</s>a")["input_ids"]
plain = PreTrainedTokenizerFast.from_pretrained("saved")("</s>a")["input_ids"]
print(f"before {before}, saved and read again {after}, by tokenizer.json alone {plain}")
assert (before, after, plain) == ([2, 12], [2, 4], [2, 12]), "legacy is kept now"
PY
