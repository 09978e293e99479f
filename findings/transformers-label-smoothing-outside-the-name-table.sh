#!/usr/bin/env bash
# transformers 5.23.0: Trainer's label_smoothing_factor shifts labels only for class names in a table of its own.
#
# A causal LM whose class is not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES (any subclass, remote code, a class registered
# with AutoModelForCausalLM.register) is trained, without a word, to repeat its current token: the same weights have
# another loss, and after some steps the model echoes.
#
# Seen: evaluation loss at smoothing 0.1, same weights: 3.9254 as LlamaForCausalLM, 4.2694 as a subclass of it; after
# 60 steps as the subclass the most likely token is the current one in 100 %, the next one in 3 %.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


class OtherForCausalLM(LlamaForCausalLM):
    pass


config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)
set_seed(0)
stock = LlamaForCausalLM(config)
other = OtherForCausalLM(config)
other.load_state_dict(stock.state_dict())
ids = torch.randint(3, 50, (8, 12))
rows = [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, steps):
    arguments = TrainingArguments(
        "out", label_smoothing_factor=0.1, max_steps=steps, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


losses = [trainer(model, 1).evaluate()["eval_loss"] for model in (stock, other)]
trainer(other, 60).train()
guess = other.eval()(ids).logits.argmax(-1)
echo, following = (guess == ids).float().mean().item(), (guess[:, :-1] == ids[:, 1:]).float().mean().item()
print(f"loss as LlamaForCausalLM {losses[0]:.4f}, as a subclass {losses[1]:.4f}")
print(f"after training: repeats {echo:.3f}, next {following:.3f}")
assert abs(losses[0] - losses[1]) > 0.1, "the subclass is smoothed as the stock class is now"
assert echo > 0.9 and following < 0.2
PY
