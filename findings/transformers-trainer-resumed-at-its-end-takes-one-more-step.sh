#!/usr/bin/env bash
# transformers 5.23.0: a Trainer resumed from the checkpoint of its last step trains one step more.
#
# It happens where max_steps ends inside an epoch: the loop asks whether it is done only after a step. A run that was
# killed after its last checkpoint and is started again ends with other weights than one that was not, and with
# global_step above max_steps; where the schedule has not come to 0 the weights move.
#
# Seen: max_steps=3 of 4 steps an epoch, checkpoints each step; resumed from checkpoint-3: global_step 4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)
set_seed(0)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (32, 12))]
arguments = TrainingArguments(
    "out", max_steps=3, per_device_train_batch_size=8, save_steps=1, logging_steps=1, report_to=[], use_cpu=True,
    disable_tqdm=True, lr_scheduler_type="constant",
)


def run(**resume):
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)
    trainer.train(**resume)
    return trainer.state, trainer.model.lm_head.weight.detach().clone()


(state, weights), (resumed, others) = run(), run(resume_from_checkpoint=True)
moved = (weights - others).abs().max().item()
print(f"first {state.global_step}, resumed {resumed.global_step} of {resumed.max_steps}; weights moved by {moved:.1e}")
assert resumed.global_step == 4 and moved > 0, "a finished run stays finished now"
PY
