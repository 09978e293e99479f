#!/usr/bin/env bash
# trl 1.16.0: SFTTrainer computes the loss beside the model, from last_hidden_state times lm_head.weight.
#
# The model's forward is replaced: the base model is run, and its last states are multiplied by the output embeddings,
# in pieces. What the model itself does with its logits (a soft cap, a second head, a loss of its own) is passed over
# without a word, in evaluation as in training.
#
# Seen, a Llama that caps its logits at 0.1: its own loss is 3.9237, without the cap 7.6691; SFTTrainer evaluates
# 7.6691.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    trl==1.16.0 transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 datasets==5.2.0
cd "$work"
HF_HUB_OFFLINE=1 HF_HOME="$work" "$work/venv/bin/python" - <<'PY'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


class CappedLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = 0.1 * torch.tanh(outputs.logits / 0.1)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=1,
)
set_seed(0)
model = CappedLlama(config).eval()
words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(50)}, unk_token="<1>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<1>")
ids = torch.randint(3, 50, (8, 12))
with torch.no_grad():
    own = model(ids, labels=ids).loss.item()
    beside = LlamaForCausalLM.forward(model, ids, labels=ids).loss.item()
settings = SFTConfig(
    "out", per_device_eval_batch_size=8, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
)
rows = Dataset.from_dict({"input_ids": ids.tolist()})
trainer = SFTTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
seen = trainer.evaluate()["eval_loss"]
print(f"the model's own loss {own:.4f}, without the cap {beside:.4f}; SFTTrainer evaluates {seen:.4f}")
assert abs(seen - beside) < 1e-3 < abs(seen - own), "the loss is the model's own now"
PY
