#!/usr/bin/env bash
# transformers 5.23.0: a callable given to generate(custom_generate=...) gets neither the streamer nor the tokenizer
# (nor a draft model, nor synced_gpus) of that call, although it declares them; its own arguments arrive.
#
# generate() takes these four out of its arguments first, then throws them away in favour of what the callable's
# signature has beyond that of the stock sampling loop. So a streamer is told the prompt by generate() and the end by
# nobody, without a word: whoever iterates over it in another thread waits for ever, or until its timeout.
#
# Seen: of streamer, tokenizer and mine the callable got mine alone; the stock loop with the same arguments told the
# streamer 6 ids and the end, the callable, which hands on what it got to that same loop, the 3 of the prompt.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
ids = torch.tensor([[3, 4, 5]])
settings = {"max_new_tokens": 3, "eos_token_id": 31, "pad_token_id": 0, "min_new_tokens": 3, "do_sample": False}


class Counting(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = 0, False

    def put(self, value):
        self.ids += value.numel()

    def end(self):
        self.ended = True


got = {}


def loop(
    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, tokenizer=None, mine=None,
    **kwargs,
):
    got.update(streamer=streamer, tokenizer=tokenizer, mine=mine)
    return model._sample(
        input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **kwargs
    )


stock, custom = Counting(), Counting()
expected = model.generate(ids, streamer=stock, **settings)
output = model.generate(ids, streamer=custom, tokenizer="a tokenizer", mine=1, custom_generate=loop, **settings)
print("the callable got", got)
print(f"stock: {stock.ids} ids, end told: {stock.ended}; callable: {custom.ids} ids, end told: {custom.ended}")
assert torch.equal(output, expected) and got["mine"] == 1 and (stock.ids, stock.ended) == (6, True)
assert got["streamer"] is None and got["tokenizer"] is None, "the callable gets them now"
assert (custom.ids, custom.ended) == (3, False)
PY
