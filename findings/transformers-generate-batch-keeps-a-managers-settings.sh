#!/usr/bin/env bash
# transformers 5.23.0: generate_batch with a kept manager passes over the next call's generation_config.
#
# With persistent_manager=True the manager of continuous batching stays, with the settings that it was made with. A
# later call with another generation_config is answered under the old one, without a word, even if that call does not
# ask for a persistent manager; only max_new_tokens is taken from the new one.
#
# Seen: the second call asks to end at the first id that is written; it writes all 8. After
# destroy_cached_continuous_batching_manager() it writes that one id.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)
set_seed(0)
model = LlamaForCausalLM(config).eval()
pools = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64)


def written(eos, **keep):
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=eos)
    (output,) = model.generate_batch([list(range(5, 15))], settings, pools, progress_bar=False, **keep).values()
    return output.generated_tokens


free = written(-1, persistent_manager=True)
kept = written(free[0])
model.destroy_cached_continuous_batching_manager()
fresh = written(free[0])
print(f"without an end {len(free)} ids; ending at the first, kept manager {len(kept)}, new manager {len(fresh)}")
assert (len(free), len(kept), len(fresh)) == (8, 8, 1), "a kept manager takes the new settings now"
PY
