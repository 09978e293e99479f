"""torch.compile without graph breaks, without recompilation from step to step; torch.export of the decode step.

The graphs run by torch's "eager" backend, which shows graph breaks and wrong graphs and does not wait for code
generation. Every day the decode step in each mode, and of what is slower one case each, all modes among them; the rest
is nightly.
"""

import pytest
import torch
from conftest import random_ids
from decoding_oracles import BREAK, BY_MODE, SHORT, greedy, picture_scores, unequal_streams
from nightly import every_day
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM


SECTION = "torch.compile and torch.export"
GREEDY = {"do_sample": False, "eos_token_id": None, "generation_mode": None}
UNIFORM, WIDTH, CROSS = BY_MODE


def one_of(cases, case):
    return pytest.mark.parametrize(("family", "mode", "init"), every_day(cases, case))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _inputs(model, length=9):
    ids = random_ids(model, 2, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@pytest.mark.feature(SECTION, "forward without graph breaks")
@one_of(SHORT, SHORT[-1])
def test_forward_is_one_graph(family, mode, init, jam):
    model = jam(family, mode, init)
    inputs, counter = _inputs(model), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected, found = model(**inputs).logits, compiled(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.nightly
@pytest.mark.feature(SECTION, "forward that returns all hidden states, without graph breaks", modes=("cross",))
def test_recorded_states_are_in_the_graph(jam):
    model = jam("llama", "cross", "preserving")
    inputs = {**_inputs(model), "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs)
        found = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    assert len(found.hidden_states) == len(expected.hidden_states) == model.config.num_hidden_layers + 1
    both = zip(found.hidden_states + found.image_hidden_states, expected.hidden_states + expected.image_hidden_states)
    for ours, theirs in both:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.feature(SECTION, "training step without graph breaks")
@one_of(BY_MODE, WIDTH)
def test_a_training_step_is_one_graph(family, mode, init, jam):
    model = jam(family, mode, init).train()
    inputs = _inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.feature(SECTION, "forward with pictures (pixel_values) without graph breaks")
@one_of(BY_MODE, UNIFORM)
def test_pictures_are_in_the_graph(family, mode, init, jam):
    model = jam(family, mode, init)
    config = model.config
    ids = torch.tensor([[1, 30, BREAK, *[config.image_token_id] * config.image_seq_length, BREAK, 31]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1,
        "labels": ids,
        "use_cache": False,
    }
    expected = model(**inputs)
    found = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


def _decode(model, ids, mask, prefill, positions=True):
    """Logits of `ids` `[B, T]` after the first `prefill`, step by step, by a compiled step on a static cache; the
    counter.
    """
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    settings = {"past_key_values": cache, "use_cache": True}
    logits = []
    with torch.no_grad():
        model(
            input_ids=ids[:, :prefill], attention_mask=mask[:, :prefill], position_ids=places[:, :prefill], **settings
        )
        # A mask as long as the cache: its shape does not change from step to step.
        padded = torch.nn.functional.pad(mask, (0, 4), value=1)
        for place in range(prefill, ids.shape[1]):
            if positions:
                settings["position_ids"] = places[:, place : place + 1]
            logits.append(step(input_ids=ids[:, place : place + 1], attention_mask=padded, **settings).logits)
    return torch.cat(logits, dim=1), counter


@pytest.mark.feature(SECTION, "decode step on a static cache: one graph, no recompilation")
@pytest.mark.parametrize(("family", "mode", "init"), every_day(SHORT, *BY_MODE))
def test_a_decode_step_is_one_graph(family, mode, init, jam):
    model = jam(family, mode, init)
    inputs = _inputs(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        full = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    found, counter = _decode(model, ids, mask, prefill=5)
    torch.testing.assert_close(found, full[:, 5:], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.feature(SECTION, "decode step, streams of unequal heads and widths", modes=("cross",))
@pytest.mark.parametrize("text_family", ["llama", pytest.param("opt", marks=pytest.mark.nightly)])
def test_a_decode_step_with_unequal_streams_is_one_graph(text_family):
    """Without position_ids: each stream counts for itself, from the cache and, in an OPT stream, from the mask."""
    model = unequal_streams(text_family)
    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
    found, counter = _decode(model, ids, torch.ones_like(ids), prefill=5, positions=False)
    torch.testing.assert_close(found, full[:, 5:], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def _compile_on_a_cpu(counter) -> CompileConfig:
    # generate() copies the config, and with it a counter; a function stays the one it is.
    config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: counter(graph, inputs), mode=None)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    return config


@pytest.mark.feature(SECTION, "generate() with a static cache, compiled by itself")
@one_of(SHORT, CROSS)
def test_generate_compiles_its_decode_step(family, mode, init, jam):
    model, counter = jam(family, mode, init), CompileCounter()
    settings = {
        "cache_implementation": "static",
        "compile_config": _compile_on_a_cpu(counter),
        "max_new_tokens": 6,
        **GREEDY,
    }
    for seed in (0, 1):
        ids = random_ids(model, 1, 6, seed)
        assert model.generate(input_ids=ids, **settings)[0, 6:].tolist() == greedy(model, ids[0].tolist(), 6)
        assert counter.frame_count == 1  # one graph for all steps, and for the second prompt too


@pytest.mark.nightly
@pytest.mark.feature(SECTION, "generate() with pictures and guidance, compiled by itself")
def test_generate_compiles_while_it_draws(jam):
    """One graph for a step of text and one for a step inside a picture, with the branch beside it; and no third."""
    model, counter = jam("llama", "cross", "preserving"), CompileCounter()
    steps, compile_config = model.config.image_seq_length + 2, _compile_on_a_cpu(counter)
    for row in ([1, 30, 31], [1, 40, 41]):
        output = model.generate(
            input_ids=torch.tensor([row]),
            generation_mode="image",
            guidance_scale=2.0,
            do_sample=False,
            cache_implementation="static",
            compile_config=compile_config,
        )
        process = picture_scores(model, 3, "image", 2.0, 3 + steps)
        assert output[0, 3:].tolist() == greedy(model, row, steps, process=process)
        assert counter.frame_count == 2


def _export(model) -> torch.export.ExportedProgram:
    """transformers' own recipe: one step on a static cache, which is part of the program."""
    model.generation_config.update(cache_implementation="static", use_cache=True)
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    return exportable.export(input_ids=torch.tensor([[30]]), cache_position=torch.tensor([0]))


def _check_exported(model) -> None:
    ids = random_ids(model, 1, 7)
    step = _export(model).module()
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        for _ in range(2):  # twice over: position 0 starts anew
            steps = [step(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(7)]
            torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.feature(SECTION, "torch.export of the decode step (static cache)")
@one_of(BY_MODE, UNIFORM)
def test_export_of_the_decode_step(family, mode, init, jam):
    _check_exported(jam(family, mode, init))


@pytest.mark.feature(SECTION, "torch.export of the decode step (static cache), OPT")
@pytest.mark.parametrize(
    ("mode", "init"),
    every_day(
        [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")], ("cross", "paper")
    ),
)
def test_export_of_the_decode_step_of_opt(mode, init, jam, parents):
    if mode == "cross":
        _check_exported(jam("opt", mode, init))
        return
    for model in (AutoModelForCausalLM.from_pretrained(parents("opt")[0]).eval(), jam("opt", mode, init)):
        with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
            _export(model)
    pytest.skip("the stock OPT decoder makes a mask as long as the cache is full, which torch.export refuses")


@pytest.mark.nightly
@pytest.mark.feature(SECTION, "torch.export, streams of unequal heads and widths", modes=("cross",))
def test_export_with_unequal_streams():
    _check_exported(unequal_streams())


@pytest.mark.nightly
@pytest.mark.feature(SECTION, "compiled by inductor")
@pytest.mark.parametrize(("family", "mode", "init"), BY_MODE)
def test_forward_compiled_by_inductor(family, mode, init, jam):
    model = jam(family, mode, init)
    inputs = _inputs(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, torch.compile(model, fullgraph=True)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
