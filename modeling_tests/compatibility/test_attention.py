"""Attention back ends give the same logits and gradients, alone and mixed per stream; packed documents stay apart."""

import pytest
import torch
from conftest import random_ids
from decoding_oracles import BY_MODE, CASES, greedy, unequal_streams
from flash_in_torch import install
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, masking_utils
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jam_hf import JamForCausalLM


SECTION = "Attention"
BACK_ENDS = ["sdpa", "flex_attention", "flash_attention_2"]  # compared to eager
by_case = pytest.mark.parametrize(("family", "mode", "init"), CASES)
by_mode = pytest.mark.parametrize(("family", "mode", "init"), BY_MODE)
by_back_end = pytest.mark.parametrize("back_end", BACK_ENDS)
GREEDY = {"do_sample": False, "eos_token_id": None, "generation_mode": None}


@pytest.fixture
def flash(monkeypatch):
    """flash-attn is not installed here: a stand-in of plain torch behind transformers' own dispatch; gives its
    calls.
    """
    return install(monkeypatch)


@pytest.fixture
def flex(monkeypatch):
    """transformers compiles flex attention and its masks with inductor, which takes minutes on a CPU; here torch's own
    uncompiled forms."""

    def uncompiled(*args, _compile, **kwargs):
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_module.flex_attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)


def _inputs(model, padded=True):
    ids = random_ids(model, 3, 12)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        mask[1, 9:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def _logits(model, back_end, inputs):
    model.set_attn_implementation(back_end)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.sampled("mode", "back_end", "padded", pairs=True)
@pytest.mark.feature(
    SECTION, "eager = sdpa = flex = flash-attention 2 in logits (flash: dispatch, arithmetic in torch)"
)
@pytest.mark.parametrize(
    ("back_end", "padded"),
    [("sdpa", True), ("flex_attention", True), ("flash_attention_2", True), ("flash_attention_2", False)],
)
@by_case
def test_back_ends_agree(family, mode, init, back_end, padded, jam, flash, flex):
    model = jam(family, mode, init)
    inputs = _inputs(model, padded)
    expected, found = _logits(model, "eager", inputs), _logits(model, back_end, inputs)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-3)
    attentions = len(model.config.per_layer_config)
    by_rows, by_lengths = (attentions, 0) if back_end == "flash_attention_2" and not padded else (0, attentions)
    if back_end != "flash_attention_2":
        by_lengths = 0
    assert (len(flash.lengths), len(flash.cumulative)) == (by_rows, by_lengths)
    assert all(sums == [0, 8, 17, 29] for sums in flash.cumulative)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "back ends agree, streams of unequal heads and widths", modes=("cross",))
@by_back_end
@pytest.mark.parametrize("text_family", ["llama", "opt"])
def test_back_ends_agree_with_unequal_streams(text_family, back_end, flash, flex):
    model = unequal_streams(text_family)
    inputs = _inputs(model)
    expected, found = _logits(model, "eager", inputs), _logits(model, back_end, inputs)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.feature(SECTION, "gradients agree: eager, sdpa, flash-attention 2")
@pytest.mark.parametrize("back_end", ["sdpa", "flash_attention_2"])
@by_mode
def test_gradients_agree(family, mode, init, back_end, jam, flash):
    model = jam(family, mode, init).train()
    inputs = _inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 4] = -100  # its prediction stands in padding, where back ends may differ
    gradients = []
    for name in ("eager", back_end):
        model.zero_grad()
        model.set_attn_implementation(name)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.feature(SECTION, "gradients through flex (torch has none on a CPU)")
@by_mode
def test_gradients_through_flex(family, mode, init, jam, parents, flex):
    for model in (AutoModelForCausalLM.from_pretrained(parents(family)[0]), jam(family, mode, init)):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            model(input_ids=random_ids(model, 1, 6), use_cache=False)
    pytest.skip("torch has no backward of flex attention on a CPU; a stock Llama fails the same way")


@pytest.mark.nightly
# transformers 5.23 has its flex masks compiled by create_block_mask(_compile=True), which torch 2.13 deprecates; and
# while it compiles them, torch instantiates an autograd function, which it deprecates itself.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function.> should not be instantiated:DeprecationWarning")
@pytest.mark.feature(SECTION, "flex, compiled by inductor", modes=("cross",))
def test_flex_as_transformers_compiles_it(jam):
    torch._dynamo.reset()
    model = jam("llama", "cross", "preserving")
    inputs = _inputs(model)
    expected, found = _logits(model, "eager", inputs), _logits(model, "flex_attention", inputs)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-3)


MIXED = [("eager", "sdpa"), ("sdpa", "flash_attention_2"), ("flash_attention_2", "eager"), ("flex_attention", "sdpa")]


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "a back end for each stream", modes=("cross",))
@pytest.mark.parametrize(("text", "image"), MIXED)
@pytest.mark.parametrize(("init", "when"), [("preserving", "from_pretrained"), ("paper", "set_attn_implementation")])
def test_a_back_end_for_each_stream(text, image, init, when, fused, flash, flex, monkeypatch):
    """Each attention runs the back end of the stream that asks, on a mask in the form that this back end wants."""
    folder, chosen = fused("llama", "cross", init), {"text_config": text, "image_config": image}
    reference = JamForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if when == "from_pretrained":
        model = JamForCausalLM.from_pretrained(folder, attn_implementation=chosen).eval()
    else:
        model = JamForCausalLM.from_pretrained(folder).eval()
        model.set_attn_implementation(chosen)
    seen_by = []
    for name in {"sdpa", "flash_attention_2", "flex_attention"} & {text, image}:

        def spy(module, query, key, value, mask, *args, real=ALL_ATTENTION_FUNCTIONS[name], name=name, **kwargs):
            seen_by.append(
                (
                    name,
                    module.config is model.config.text_config,
                    type(mask),
                    mask.dim() if torch.is_tensor(mask) else 4,
                )
            )
            return real(module, query, key, value, mask, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, spy)
    inputs = _inputs(model)
    with torch.no_grad():
        expected, found = reference(**inputs).logits, model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-3)
    each = len(model.config.per_layer_config) // 2
    forms = {"sdpa": (torch.Tensor, 4), "flash_attention_2": (torch.Tensor, 2), "flex_attention": (BlockMask, 4)}
    wanted = [(name, is_text, *forms[name]) for name, is_text in ((text, True), (image, False)) if name != "eager"]
    assert {entry: seen_by.count(entry) for entry in set(seen_by)} == dict.fromkeys(wanted, each)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "flash-attention 2 under generate(): padding, static cache")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@by_case
def test_flash_under_generate(family, mode, init, cache, jam, flash):
    model = jam(family, mode, init)
    rows = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (3, 6)]
    expected = [greedy(model, row, 5) for row in rows]
    model.set_attn_implementation("flash_attention_2")
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, max_new_tokens=5, **GREEDY)
    assert output[:, 6:].tolist() == expected
    assert len(flash.lengths) + len(flash.cumulative) == 5 * len(model.config.per_layer_config)


@pytest.mark.feature(SECTION, "flash-attention 2 in one stream under a static cache", modes=("cross",))
@pytest.mark.parametrize(("text", "image"), [("sdpa", "flash_attention_2"), ("flash_attention_2", "sdpa")])
def test_flash_in_one_stream_under_a_static_cache(text, image, jam, flash):
    model = jam("llama", "cross", "preserving")
    ids = random_ids(model, 1, 6)
    expected = greedy(model, ids[0].tolist(), 5)
    model.set_attn_implementation({"text_config": text, "image_config": image})
    output = model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=5, **GREEDY)
    assert output[0, 6:].tolist() == expected


@pytest.mark.feature(SECTION, "flash-attention 2, a clear error where it is not installed")
@by_mode
def test_flash_attention_that_is_not_installed_is_refused_by_transformers(family, mode, init, fused):
    if torch.cuda.is_available():
        pytest.skip("this machine may have flash-attn or fetch its kernel")
    with pytest.raises(
        ImportError, match="FlashAttention2 .*the package for FlashAttention2 doesn't seem to be installed"
    ):
        JamForCausalLM.from_pretrained(fused(family, mode, init), attn_implementation="flash_attention_2")
    with pytest.raises(ImportError, match="FlashAttention2"):
        JamForCausalLM.from_pretrained(fused(family, mode, init)).set_attn_implementation("flash_attention_2")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="flash-attention and the backward of flex need an accelerator"
)
@pytest.mark.feature(SECTION, "flex and flash-attention 2 on an accelerator, forward and backward")
@pytest.mark.parametrize("back_end", ["flex_attention", "flash_attention_2"])
@by_mode
def test_numbers_on_an_accelerator(family, mode, init, back_end, jam):
    if back_end == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn (the extra [gpu]) is not installed")
    model = jam(family, mode, init).to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") if torch.is_tensor(value) else value for name, value in _inputs(model).items()}
    seen = inputs["attention_mask"].bool()
    results = []
    for name in ("sdpa", back_end):
        model.zero_grad()
        model.set_attn_implementation(name)
        output = model(**inputs, labels=inputs["input_ids"].masked_fill(~seen, -100))
        output.loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        results.append((output.logits[seen].float(), gradient.float().clone()))
    for expected, found in zip(*results):
        assert (found - expected).norm() < 0.05 * expected.norm()


def _packed(model, collator=None):
    documents = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (5, 3, 6)]
    collator = collator or DataCollatorWithFlattening()
    return documents, dict(collator([{"input_ids": document} for document in documents]))


def _alone(model, documents):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits for d in documents], dim=1)


@pytest.mark.sampled("mode", "back_end", pairs=True)
@pytest.mark.feature("Packing", "documents packed by position_ids")
@pytest.mark.parametrize("back_end", ["eager", *BACK_ENDS])
@by_case
def test_packed_documents_do_not_see_each_other(family, mode, init, back_end, jam, parents, flash, flex):
    """What transformers' DataCollatorWithFlattening makes: positions that start again, and no mask."""
    model = jam(family, mode, init)
    documents, batch = _packed(model)
    assert batch["position_ids"].tolist() == [[*range(5), *range(3), *range(6)]]
    batch.pop("labels")
    model.set_attn_implementation("eager")
    expected = _alone(model, documents)
    found = _logits(model, back_end, {**batch, "use_cache": False})
    if family == "opt" and mode != "cross" and back_end != "flash_attention_2":
        parent = AutoModelForCausalLM.from_pretrained(parents(family)[0], attn_implementation="eager").eval()
        apart = _alone(parent, documents)[:, 5:]
        assert not torch.allclose(parent(**batch, use_cache=False).logits[:, 5:], apart, atol=0.01)
        assert not torch.allclose(found[:, 5:], expected[:, 5:], atol=0.01)
        pytest.skip(
            "the stock OPT decoder makes its mask without position_ids; only flash-attention keeps documents apart"
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if back_end == "flash_attention_2":
        assert flash.cumulative == [[0, 5, 8, 14]] * len(model.config.per_layer_config)


@pytest.mark.feature("Packing", "documents packed by position_ids, a back end for each stream", modes=("cross",))
@pytest.mark.parametrize(("text", "image"), MIXED)
def test_packed_documents_through_mixed_back_ends(text, image, jam, flash, flex):
    model = jam("llama", "cross", "preserving")
    documents, batch = _packed(model)
    batch.pop("labels")
    found = _logits(model, {"text_config": text, "image_config": image}, {**batch, "use_cache": False})
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, _alone(model, documents), rtol=1e-3, atol=1e-3)


@pytest.mark.feature("Packing", "flash-attention's cu_seq_lens, as DataCollatorWithFlattening gives them")
@by_case
def test_cumulative_lengths_reach_every_attention(family, mode, init, jam, flash):
    model = jam(family, mode, init)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    documents, batch = _packed(model, collator)
    model.set_attn_implementation("eager")
    expected = _alone(model, documents)
    model.set_attn_implementation("flash_attention_2")
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-3)
    assert flash.cumulative == [[0, 5, 8, 14]] * len(model.config.per_layer_config)
    losses = torch.nn.functional.cross_entropy(expected[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    torch.testing.assert_close(output.loss, losses, rtol=1e-3, atol=1e-3)


@pytest.mark.sampled
@pytest.mark.feature("Packing", "gradients of packed documents")
@pytest.mark.parametrize("back_end", ["eager", "sdpa", "flash_attention_2"])
@by_mode
def test_gradients_of_packed_documents(family, mode, init, back_end, jam, flash):
    model = jam(family, mode, init)
    documents, batch = _packed(model)
    model.set_attn_implementation("eager")
    for document in documents:
        ids = torch.tensor([document])
        (model(input_ids=ids, labels=ids, use_cache=False).loss * (len(document) - 1) / 11).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(back_end)
    model(**batch, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)
