#!/usr/bin/env bash
# transformers 5.23.0: under `dynamic` RoPE the logits of a text depend on the call before.
#
# A call longer than the original length scales the frequencies and keeps them; a later, shorter call that is still
# longer than the original length is rotated by the earlier one's. Only a call within the original length puts them
# back. An evaluation over texts sorted otherwise, or a server, gives other numbers for the same text.
#
# Seen, original length 128, a text of 150 ids: logits before and after a call of 200 ids differ (2e-4 with these
# small random weights); after a call of 100 ids they are equal to the first again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
)
set_seed(0)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(3, 50, (1, 200))
with torch.no_grad():
    first = model(ids[:, :150]).logits
    model(ids)
    after_longer = model(ids[:, :150]).logits
    model(ids[:, :100])
    after_short = model(ids[:, :150]).logits
longer, short = ((logits - first).abs().max().item() for logits in (after_longer, after_short))
print(f"after a longer call {longer:.1e}, after a short one {short:.1e}")
assert longer > 1e-5 and short == 0, "a call is no longer rotated by the one before"
PY
