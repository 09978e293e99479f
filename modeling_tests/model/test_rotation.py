"""Rotary positions that depend on the length (`longrope`, `dynamic`): what shares a forward is rotated as it is
alone.
"""

import copy

import pytest
import torch
from conftest import VQ_SETTINGS, randomise
from transformers import DynamicCache, GenerationConfig

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.evaluation.perplexity import batches
from jam_hf.generation.packed_guidance import PackedGuidance


N, BOS, BREAK = 16, 1, 3
ORIGINAL = 24
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
        "factor": 8.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 5.0, 9.0],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def _model(rope: str, mode: str) -> JamForCausalLM:
    decoder = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    turned = {"rope_parameters": ROPES[rope], "max_position_embeddings": ORIGINAL if rope == "dynamic" else 192}
    streams = {"text_config": decoder | turned}
    if mode == "cross":  # one stream goes by the length, the other does not
        streams |= {"image_config": decoder | {"max_position_embeddings": 192}, "cross_form": "preserving"}
    model = JamForCausalLM(JamConfig(fusion_mode=mode, vq_config=VQ_SETTINGS, **streams)).eval()
    randomise(model, 0)
    return model


def _padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def _document_logits(model, ids, mask, written):
    """What the document says at each step, as plain `generate()` has it: all rows in one forward, with a cache."""
    model, cache, said = copy.deepcopy(model), DynamicCache(config=model.config), []
    for step in range(written.shape[1] + 1):
        new = ids if step == 0 else written[:, step - 1 : step]
        if step:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = model(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        said.append(output.logits[:, -1])
    return said


@torch.no_grad()
def _alone(model, ids):
    """Logits behind `ids`, of a model that has read nothing before."""
    return copy.deepcopy(model)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "cache"), [("mask", None), ("mask", "static"), ("negative prompts", None), ("two scales", None)]
)
@pytest.mark.parametrize("mode", ["uniform", "cross"])
@pytest.mark.parametrize("rope", ROPES)
def test_branches_of_guidance_are_those_of_forwards_of_their_own(rope, mode, kind, cache):
    model, generator = _model(rope, mode), torch.Generator().manual_seed(0)
    first, mask_id = model.config.image_token_offset, model.config.mask_token_id
    picture = [BREAK, *(torch.randint(0, N, (N,), generator=generator) + first).tolist(), BREAK]
    texts = [torch.randint(20, 84, (n,), generator=generator).tolist() for n in (25, 5)]
    rows = [[BOS, *texts[0], *picture, 30, BREAK], [BOS, *texts[1], BREAK]]
    ids, mask = _padded(rows)
    contexts = [[[BOS, mask_id]] * 2]
    settings = {"guidance_scale": 3.0, "do_sample": False, "max_new_tokens": N, "eos_token_id": None, "pad_token_id": 0}
    if (
        kind == "negative prompts"
    ):  # under longrope, one that is long from the start and one that becomes so in the picture
        long = 30 if rope == "longrope" else 5
        contexts = [[[BOS, *range(20, 20 + long)], [BOS, *range(30, 30 + min(long, 12))]]]
        negative, negative_mask = _padded(contexts[0])
        settings |= {"negative_prompt_ids": negative, "negative_prompt_attention_mask": negative_mask}
    if kind == "two scales":
        settings["image_guidance_scale"] = 2.0
        contexts.append([[BOS, mask_id, *picture, mask_id + 1], [BOS, mask_id]])
    fresh = copy.deepcopy(model)
    output = model.generate(
        ids,
        attention_mask=mask,
        **settings,
        cache_implementation=cache,
        disable_compile=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    written = output.sequences[:, ids.shape[1] :]
    said = _document_logits(fresh, ids, mask, written)
    for step in range(N):
        for row in range(2):
            told = [[*branch[row], BREAK, *written[row, :step].tolist()] for branch in contexts]
            branches = [_alone(fresh, ids)[first : first + N] for ids in told]
            document = said[step][row, first : first + N]
            if kind == "two scales":
                guided = branches[0] + 2.0 * (branches[1] - branches[0]) + 3.0 * (document - branches[1])
            else:
                guided = branches[0] + 3.0 * (document - branches[0])
            found = output.scores[step][row, first : first + N]
            torch.testing.assert_close(found, guided.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_what_stays_short_is_packed(rope, monkeypatch):
    """Below the length at which the rotation changes nothing is lost."""
    used = []
    prepare = PackedGuidance.prepare
    monkeypatch.setattr(PackedGuidance, "prepare", lambda self, *args: used.append(1) or prepare(self, *args))
    model = _model(rope, "uniform")
    model.generate(torch.tensor([[BOS, BREAK]]), guidance_scale=3.0, do_sample=False, max_new_tokens=N)
    assert len(used) == N - 1


@pytest.mark.parametrize("rope", ROPES)
def test_requests_that_are_rotated_differently_are_refused(rope):
    model = _model(rope, "uniform")
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2)
    with pytest.raises(ValueError, match="rotat"):
        model.generate_batch([[BOS, 20], [BOS, *range(20, 40)]], config)
    manager = model.init_continuous_batching(config)
    with pytest.raises(ValueError, match="rotat"):
        manager.add_request([BOS, *range(20, 60)])


@pytest.mark.parametrize("rope", ROPES)
def test_batches_of_a_measurement_are_rotated_as_their_documents_are(rope):
    model = _model(rope, "uniform")
    documents = [list(range(20, 20 + n)) for n in (30, 5, 40, 24, 25, 9, 30)]
    fresh, seen = copy.deepcopy(model), 0
    for ids, mask in batches(documents, 4, 0, "test", model.config):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for row in range(len(ids)):
            kept = ids[row][mask[row] == 1].tolist()
            torch.testing.assert_close(logits[row][mask[row] == 1][-1], _alone(fresh, kept), atol=1e-4, rtol=1e-4)
            seen += 1
    assert seen == len(documents)
