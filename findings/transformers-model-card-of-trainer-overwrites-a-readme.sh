#!/usr/bin/env bash
# transformers 5.23.0: Trainer.create_model_card replaces the README.md of its folder, licence included.
#
# What stood in README.md is not read: its text is gone, and `license` falls back to that of a base model on the Hub, so
# that a model from a folder has none. push_to_hub calls it. A model trained in the folder that it was loaded from loses
# the terms that it came under.
#
# Seen: before {'license': 'cc-by-nc-4.0'} and a text of its own; after, neither.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
)
LlamaForCausalLM(config).save_pretrained("model")
Path("model/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nNot for sale.\n")
model = LlamaForCausalLM.from_pretrained("model")
Trainer(model, TrainingArguments("model", report_to=[], use_cpu=True)).create_model_card()
card = ModelCard.load("model/README.md")
print(f"licence {card.data.get('license')}, own text kept: {'Not for sale' in card.text}")
assert card.data.get("license") is None and "Not for sale" not in card.text, "what stood there is kept now"
PY
