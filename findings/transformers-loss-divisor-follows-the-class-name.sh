#!/usr/bin/env bash
# transformers 5.23.0: what the Trainer divides the loss by depends on the letters of the model class's name.
#
# loss_type is read out of the class's name ("ForCausalLM" ...). A causal LM named otherwise gets none, falls back to
# the very same shifted loss, and yet the Trainer counts its labels unshifted: the sum over n - 1 tokens a row is
# divided by n. The reported loss and the gradients are too small by (n - 1) / n, more for short rows; label smoothing
# is not needed for it.
#
# Seen, rows of 12 tokens, same weights: evaluation loss 3.9262 as LlamaForCausalLM, 3.5990 as class
# LlamaLike(LlamaForCausalLM): 11/12 of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


class LlamaLike(LlamaForCausalLM):
    pass


config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)
set_seed(0)
stock = LlamaForCausalLM(config)
other = LlamaLike(config)
other.load_state_dict(stock.state_dict())
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (8, 12))]
arguments = TrainingArguments("out", report_to=[], use_cpu=True, disable_tqdm=True)
losses = [Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"] for model in (stock, other)]
print(f"LlamaForCausalLM {losses[0]:.4f}, LlamaLike {losses[1]:.4f}")
print(f"ratio {losses[1] / losses[0]:.4f} (11/12 = {11 / 12:.4f})")
print("loss_type:", stock.loss_type, other.loss_type)
assert abs(losses[1] / losses[0] - 11 / 12) < 1e-4, "both names are counted alike now"
PY
