"""Every decoder family, as either stream of a cross JAM and as the decoder of a uniform one, against the stock class
itself.

Weights are copied here by name, without `jam_hf.fuse`. No weight is left at zero or one, windows are shorter than the
sequences, heads are grouped, and the two streams of a pair have different widths.
"""

import copy
import dataclasses
import functools

import pytest
import torch
from conftest import NUM_CODES, VQ_SETTINGS, randomise
from transformers import (
    AutoConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    CompileConfig,
    DynamicCache,
    Emu3ForCausalLM,
    Emu3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.data.collator import supports_packing
from jam_hf.integrations.sharding import tensor_parallel_plan
from jam_hf.model import modeling_jam_families
from jam_hf.model.families_jam import FAMILIES


VOCABULARY, LAYERS = 64, 3
FIRST = VOCABULARY - NUM_CODES
COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0}
WIDTHS = {
    "text": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "image": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
CHAMELEON = {
    "vocabulary_map": {"<image>": 4, "IMGIMGAAZ": FIRST},
    "vq_config": {
        "embed_dim": 4,
        "num_embeddings": 2,
        "latent_channels": 4,
        "resolution": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    },
    "attention_bias": True,
    "mlp_bias": True,
}
STOCK = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
    "opt": (OPTConfig, OPTForCausalLM, {"dropout": 0.0}),
    "chameleon": (ChameleonConfig, ChameleonForConditionalGeneration, CHAMELEON),
    "chameleon-swin": (ChameleonConfig, ChameleonForConditionalGeneration, CHAMELEON | {"swin_norm": True}),
    "emu3": (Emu3TextConfig, Emu3ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
}
# Every family is once the text and once the image stream; and pairs of two windows, and of two kinds of positions.
PAIRS = [
    ("llama", "emu3"),
    ("opt", "llama"),
    ("mistral", "qwen2"),
    ("qwen2", "chameleon"),
    ("chameleon", "opt"),
    ("qwen3", "chameleon-swin"),
    ("chameleon-swin", "mistral"),
    ("emu3", "qwen3"),
]
WINDOWS = [("mistral", "qwen2"), ("emu3", "qwen3"), ("chameleon-swin", "mistral")]
DECODERS = [family for family in STOCK if not family.startswith("chameleon")]
by_pair = pytest.mark.parametrize(("text", "image"), PAIRS)
by_decoder = pytest.mark.parametrize("family", DECODERS)


@functools.cache
def parent(family: str, stream: str) -> torch.nn.Module:
    config_class, model_class, settings = STOCK[family]
    settings = {**COMMON, **WIDTHS[stream], **copy.deepcopy(settings)}
    if family == "opt":
        settings["ffn_dim"] = settings.pop("intermediate_size")
        settings.pop("num_key_value_heads")
        settings["word_embed_proj_dim"] = settings["hidden_size"]
    model = model_class(config_class(**settings, tie_word_embeddings=False))
    randomise(model, seed=1 if stream == "text" else 2)
    for parameter in model.parameters():
        assert not torch.any((parameter == 0) | (parameter == 1))
    return model.eval()


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    return model.model.decoder if isinstance(model, OPTForCausalLM) else model.model


@torch.no_grad()
def parent_logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    """Chameleon's own forward masks the logits of image codes; all others are asked as they are."""
    if isinstance(model, ChameleonForConditionalGeneration):
        return model.lm_head(model.model(**inputs).last_hidden_state)
    return model(**inputs).logits


def jam_config(mode: str, text, image=None, **settings) -> JamConfig:
    return JamConfig(
        fusion_mode=mode,
        text_config=copy.deepcopy(text),
        image_config=copy.deepcopy(image),
        vq_config=copy.deepcopy(VQ_SETTINGS),
        **settings,
    )


def cross_jam(text: str, image: str, alive: bool = False, **settings) -> JamForCausalLM:
    """The preserving JAM of two parents, by copying; alive: cross blocks say something."""
    parents = {"text": parent(text, "text"), "image": parent(image, "image")}
    config = jam_config("cross", parents["text"].config, parents["image"].config, **settings)
    torch.manual_seed(0)
    model = JamForCausalLM(config).eval()
    weights = {
        "lm_head.weight": parents["text"].lm_head.weight,
        "image_head.weight": parents["image"].lm_head.weight[FIRST:],
    }
    embeddings = []
    for stream, source in parents.items():
        for name, tensor in decoder_of(source).state_dict().items():
            if name.startswith("vqmodel."):
                continue
            if name == "embed_tokens.weight":
                embeddings.append(tensor)
            elif name.startswith("layers."):
                _, depth, rest = name.split(".", 2)
                weights[f"model.language_model.layers.{depth}.{stream}_layer.{rest}"] = tensor
            else:
                weights[f"model.language_model.{stream}_stem.{name}"] = tensor
    weights["model.language_model.embed_tokens.weight"] = torch.cat(embeddings, dim=1)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("_cross." in name or ".vq_model." in name for name in missing)
    if alive:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_cross." in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


def uniform_jam(family: str) -> JamForCausalLM:
    source = parent(family, "text")
    model = JamForCausalLM(jam_config("uniform", source.config)).eval()
    model.model.language_model.load_state_dict(decoder_of(source).state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    return model


def any_ids(rows: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(17, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    ids = any_ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # left padding, longer than the windows
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same_logits(model: JamForCausalLM, text: str, image: str, **inputs) -> tuple[bool, bool]:
    """Whether the columns of text and those of image codes are bit for bit the parents', where the mask lets one
    look.
    """
    seen = (
        inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"]).bool()
    )
    with torch.no_grad():
        ours = model(**inputs).logits[seen]
    text_logits = parent_logits(parent(text, "text"), **inputs)[seen]
    image_logits = parent_logits(parent(image, "image"), **inputs)[seen]
    return torch.equal(ours[:, :FIRST], text_logits[:, :FIRST]), torch.equal(ours[:, FIRST:], image_logits[:, FIRST:])


# ----- against the stock classes --------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("use_cache", [False, True])
@by_pair
def test_both_parents_bit_for_bit(text, image, use_cache):
    model = cross_jam(text, image)
    assert same_logits(model, text, image, input_ids=any_ids(), use_cache=use_cache) == (True, True)
    assert same_logits(model, text, image, **padded(), use_cache=use_cache) == (True, True)


@by_pair
def test_states_and_attentions_are_the_parents(text, image):
    model = cross_jam(text, image)
    settings = {
        "output_hidden_states": True,
        "output_attentions": True,
        "use_cache": False,
        "input_ids": any_ids(length=12),
    }
    stock = [parent(text, "text"), parent(image, "image")]
    for each in (model, *stock):
        each.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            ours = model(**settings)
            theirs = [decoder_of(source)(**settings) for source in stock]
    finally:
        for source in stock:
            source.set_attn_implementation("sdpa")
    assert len(ours.hidden_states) == LAYERS + 1 and len(ours.image_hidden_states) == LAYERS
    assert len(ours.attentions) == len(ours.image_attentions) == LAYERS
    for found, expected in (
        (ours.hidden_states, theirs[0].hidden_states),
        (ours.image_hidden_states[:-1], theirs[1].hidden_states[1:-1]),
        (ours.attentions, theirs[0].attentions),
        (ours.image_attentions, theirs[1].attentions),
    ):
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@by_decoder
def test_a_uniform_jam_is_its_parent(family, tmp_path):
    model, source = uniform_jam(family), parent(family, "text")
    ids = any_ids(2, 14)
    for cache in ("dynamic", "static"):
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
        mask = padded()["attention_mask"][:2, :14]
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert model.generate(**inputs, **settings).tolist() == source.generate(**inputs, **settings).tolist()
    model.save_pretrained(tmp_path)
    again = JamForCausalLM.from_pretrained(tmp_path).eval()
    for loaded in (model, again):
        with torch.no_grad():
            assert torch.equal(loaded(**padded()).logits, parent_logits(source, **padded()))


@by_decoder
def test_caches_of_a_uniform_jam_are_the_parents(family):
    ours, theirs = uniform_jam(family).config, parent(family, "text").config
    for make in (
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=32),
    ):
        layers = [[(type(layer), layer.get_max_length()) for layer in make(config).layers] for config in (ours, theirs)]
        assert layers[0] == layers[1] and len(layers[0]) == LAYERS


@by_pair
def test_caches_of_a_cross_jam_are_the_parents_and_whole_ones_for_the_cross_blocks(text, image):
    def sizes(config):
        return [layer.get_max_length() for layer in StaticCache(config=config, max_cache_len=32).layers]

    theirs = [sizes(parent(text, "text").config), sizes(parent(image, "image").config)]
    both = list(zip(*theirs))
    expected = [*both[0], 32, 32, *both[1], *both[2], 32, 32]
    model = cross_jam(text, image)
    assert sizes(model.config) == expected
    indices = [m.layer_idx for name, m in model.named_modules() if name.endswith(("self_attn", "cross_attn"))]
    assert sorted(indices) == list(range(len(expected)))


@by_pair
def test_attentions_know_their_own_windows(text, image):
    """Flash-attention goes by what the stock attention says of itself, not by a mask."""
    model = cross_jam(text, image).model.language_model
    for stream, family in (("text", text), ("image", image)):
        for ours, theirs in zip(model.layers, decoder_of(parent(family, stream)).layers):
            found = getattr(ours, f"{stream}_layer").self_attn
            for name in ("layer_type", "sliding_window"):
                assert getattr(found, name, None) == getattr(theirs.self_attn, name, None)
            assert getattr(found.config, "sliding_window", None) == getattr(
                theirs.self_attn.config, "sliding_window", None
            )


# ----- planted errors -------------------------------------------------------------------------------------------------


def test_a_mask_that_does_not_slide_is_seen(monkeypatch):
    def whole(config, layer_idx=None, **kwargs):
        return create_causal_mask(config=config, **kwargs)

    model = cross_jam("qwen3", "mistral")
    monkeypatch.setattr(modeling_jam_families, "create_sliding_window_causal_mask", whole)
    assert same_logits(model, "qwen3", "mistral", input_ids=any_ids()) == (False, False)
    assert same_logits(model, "qwen3", "mistral", input_ids=any_ids(length=4)) == (
        True,
        True,
    )  # shorter than the windows


def test_the_window_of_the_other_stream_is_seen():
    model = cross_jam("mistral", "qwen2")
    model.config.text_config.sliding_window, model.config.image_config.sliding_window = 4, 6
    assert same_logits(model, "mistral", "qwen2", input_ids=any_ids()) == (False, False)


def test_a_sliding_layer_at_the_wrong_depth_is_seen():
    model = cross_jam("qwen2", "qwen3")
    first, second = model.model.language_model.layers[:2]
    for name in ("text_attention_type", "image_attention_type"):
        here, there = getattr(first, name), getattr(second, name)
        assert here != there
        setattr(first, name, there)
        setattr(second, name, here)
    assert same_logits(model, "qwen2", "qwen3", input_ids=any_ids()) == (False, False)


@pytest.mark.parametrize(
    ("text", "image", "planted"),
    [
        ("qwen2", "chameleon", "layers.1.text_layer.self_attn.k_proj.bias"),
        ("qwen3", "chameleon-swin", "layers.2.text_layer.self_attn.q_norm.weight"),
        ("qwen3", "chameleon", "layers.0.image_layer.self_attn.k_norm.bias"),
        ("qwen3", "chameleon-swin", "layers.0.image_layer.self_attn.q_norm.weight"),
        ("llama", "emu3", "image_stem.norm.weight"),
        ("opt", "llama", "text_stem.embed_positions.weight"),
        ("opt", "llama", "layers.2.image_layer.mlp.down_proj.bias"),
    ],
)
def test_a_dropped_weight_is_seen(text, image, planted):
    model = cross_jam(text, image)
    with torch.no_grad():
        parameter = dict(model.model.language_model.named_parameters())[planted]
        parameter.fill_(0.0 if planted.endswith("bias") else 1.0)
    is_text = "text_" in planted
    assert same_logits(model, text, image, input_ids=any_ids()) == (not is_text, is_text)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope_without_its_scaling_is_seen(family):
    model = cross_jam(family, "emu3")
    config = copy.deepcopy(model.config.text_config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    model.model.language_model.text_stem.rotary_emb = LlamaRotaryEmbedding(config=config)
    assert same_logits(model, family, "emu3", input_ids=any_ids()) == (False, True)


def test_swin_norm_left_out_is_seen(monkeypatch):
    plain = dataclasses.replace(FAMILIES["chameleon"], swin_layer=None)
    monkeypatch.setitem(FAMILIES, "chameleon", plain)
    model = cross_jam("chameleon-swin", "mistral")
    assert same_logits(model, "chameleon-swin", "mistral", input_ids=any_ids()) == (False, True)


# ----- caches ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def steps(model, cache, ids, mask=None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for start, end in ((0, 3), (3, 5), *((i, i + 1) for i in range(5, 12)), (12, ids.shape[1])):
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@by_pair
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(text, image):
    """One by one and several at once, across the ends of the windows, with and without left padding."""
    model = cross_jam(text, image, alive=True)
    inputs = padded()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for shown in (torch.ones_like(mask), mask):
        full = model(input_ids=ids, attention_mask=shown, position_ids=(shown.cumsum(-1) - 1).clamp(min=0)).logits
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=24),
            DynamicCache(),  # knows nothing of windows: the masks must say all
        ):
            found = steps(model, cache, ids, shown)
            torch.testing.assert_close(found[shown.bool()], full[shown.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@by_pair
def test_generation_equals_that_without_a_cache(text, image, cache):
    model = cross_jam(text, image, alive=True)
    inputs = {name: tensor[:2] for name, tensor in padded().items()}
    inputs["attention_mask"][1] = 1
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **settings, use_cache=False)
    assert model.generate(**inputs, **settings, cache_implementation=cache).tolist() == expected.tolist()
    chunked = model.generate(**inputs, **settings, cache_implementation=cache, prefill_chunk_size=6)
    assert chunked.tolist() == expected.tolist()


def test_generation_with_a_back_end_for_each_stream():
    """On a static cache: one mask would be wrong for one of the two."""
    model = cross_jam("llama", "chameleon", alive=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "input_ids": any_ids(2, 9)}
    expected = model.generate(**settings, use_cache=False)
    model.set_attn_implementation({"text_config": "eager", "image_config": "sdpa"})
    assert model.generate(**settings, cache_implementation="static").tolist() == expected.tolist()


@pytest.mark.nightly
@pytest.mark.parametrize(("text", "image"), [("qwen2", "chameleon"), ("mistral", "qwen2")])
def test_compiled_without_graph_breaks(text, image):
    torch._dynamo.reset()
    model = cross_jam(text, image, alive=True)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(**padded(), use_cache=False).logits
        torch.testing.assert_close(found, model(**padded(), use_cache=False).logits, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "input_ids": any_ids(2, 9)}
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    output = model.generate(**settings, cache_implementation="static", compile_config=compiling)
    torch._dynamo.reset()
    assert output.tolist() == model.generate(**settings, use_cache=False).tolist()


@pytest.mark.parametrize(("text", "image"), WINDOWS)
def test_drafts_are_taken_back_from_windows(text, image):
    model = cross_jam(text, image, alive=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "input_ids": any_ids(1, 9)}
    expected = model.generate(**settings, use_cache=False).tolist()
    assert model.generate(**settings, assistant_model=parent("llama", "text")).tolist() == expected
    assert model.generate(**settings, prompt_lookup_num_tokens=3).tolist() == expected


def test_beams_over_windows():
    model = cross_jam("mistral", "qwen2", alive=True)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "num_beams": 3,
        "input_ids": any_ids(2, 9),
    }
    expected = model.generate(**settings, use_cache=False)
    for cache in ("dynamic", "static"):
        assert model.generate(**settings, cache_implementation=cache).tolist() == expected.tolist()


def test_a_quantised_cache_is_refused_where_a_window_slides():
    settings = {"max_new_tokens": 2, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for model in (cross_jam("llama", "mistral"), uniform_jam("qwen2")):
        with pytest.raises(ValueError, match="only full attention layers.*sliding_attention"):
            model.generate(input_ids=any_ids(1, 5), **settings)


@pytest.mark.parametrize(("text", "image"), [*WINDOWS, ("opt", "chameleon")])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(text, image):
    model = cross_jam(text, image, alive=True)
    documents = [any_ids(1, length, seed=length) for length in (9, 7)]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@by_decoder
@torch.no_grad()
def test_supports_packing_says_what_the_stock_decoder_does(family):
    model = uniform_jam(family)
    documents = [any_ids(1, length, seed=length) for length in (9, 7)]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in documents], dim=1)
    assert torch.allclose(packed, alone, rtol=1e-4, atol=1e-4) == supports_packing(model.config)


# ----- the JAM as a whole ---------------------------------------------------------------------------------------------


@by_pair
def test_saved_and_loaded(text, image, tmp_path):
    model = cross_jam(text, image, alive=True)
    model.save_pretrained(tmp_path)
    again = JamForCausalLM.from_pretrained(tmp_path).eval()
    for name, tensor in again.named_buffers():
        assert torch.equal(tensor, model.get_buffer(name)), name
    with torch.no_grad():
        assert torch.equal(again(**padded()).logits, model(**padded()).logits)
    assert [c.model_type for c in again.config.decoder_configs] == [c.model_type for c in model.config.decoder_configs]


@pytest.mark.sampled
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("text", "image"), [("qwen2", "chameleon"), ("chameleon-swin", "mistral"), ("qwen3", "emu3")])
def test_gradients_with_and_without_checkpointing(text, image, reentrant):
    model = cross_jam(text, image, alive=True).train()
    ids = any_ids()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, expected in gradients[0].items():
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize(
    ("text", "image"), [("qwen2", "chameleon"), ("chameleon", "mistral"), ("emu3", "qwen3"), ("llama", "llama")]
)
@torch.no_grad()
def test_the_papers_form(text, image):
    """One embedding for both: cached as uncached, causal, and both streams count."""
    model = JamForCausalLM(
        jam_config("cross", parent(text, "text").config, parent(image, "text").config, cross_form="paper")
    ).eval()
    randomise(model, seed=4)
    assert model.image_head is None
    ids = any_ids()
    full = model(input_ids=ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
        torch.testing.assert_close(steps(model, cache, ids), full, rtol=1e-4, atol=1e-4)
    model.model.language_model.layers[1].image_layer.self_attn.v_proj.weight.add_(0.5)
    assert not torch.allclose(model(input_ids=ids).logits, full)


@by_pair
def test_cross_blocks_have_the_family_of_their_queries_and_no_biases(text, image):
    model = cross_jam(text, image)
    block = model.model.language_model.layers[0]
    for stream, family in (("text", text), ("image", image)):
        cross, config = getattr(block, f"{stream}_cross"), parent(family, stream).config
        assert not [name for name, _ in cross.named_parameters() if name.endswith("bias")]
        if family != "opt":
            layer = getattr(block, f"{stream}_layer")
            assert type(cross.final_layer_norm) is type(layer.input_layernorm)
            assert type(cross.mlp) is type(layer.mlp)
            assert cross.final_layer_norm.variance_epsilon == config.rms_norm_eps
        heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert cross.cross_attn.q_proj.out_features == heads * config.num_attention_heads


# ----- configs --------------------------------------------------------------------------------------------------------


def test_every_family_of_the_registry_is_tested_here():
    assert {parent(family, "text").config.model_type for family in STOCK} == set(FAMILIES)
    assert {text for text, _ in PAIRS} == {image for _, image in PAIRS} == set(STOCK)


def test_refusals():
    opt, llama, chameleon = (parent(family, "text").config for family in ("opt", "llama", "chameleon"))
    for mode in ("uniform", "width"):
        with pytest.raises(ValueError, match="'chameleon' only together with a VQ model.*fusion_mode='cross'"):
            jam_config(mode, chameleon)
    for text, image, words in (
        (opt, llama, "learned ones in text_config.*rotary"),
        (llama, opt, "rotary ones in text.*learned"),
    ):
        with pytest.raises(ValueError, match=words):
            jam_config("cross", text, image, cross_form="paper")
    for name in ("gemma2", "phi3", "mixtral", "gpt_neox"):
        with pytest.raises(ValueError, match=f"family '{name}', which JAM does not support yet"):
            JamConfig(text_config={"model_type": name})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding_window=None"),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2},
            "known kinds: full_attention, sliding_attention",
        ),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "mistral.*sliding_window=4096"),
        ({"model_type": "llama", "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, "layers of a 'llama'"),
    ],
)
def test_kinds_of_attention_that_the_stock_decoder_has_not_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        JamConfig(text_config={"num_hidden_layers": 2, **config})


def test_a_window_that_the_stock_decoder_does_not_use_is_not_used():
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2, sliding_window=16, use_sliding_window=False)
    assert [c.sliding_window for c in JamConfig(text_config=config).per_layer_config] == [None] * 6
    llama = AutoConfig.for_model("llama", num_hidden_layers=2, sliding_window=16)
    assert [c.sliding_window for c in JamConfig(text_config=llama).per_layer_config] == [None] * 6
    assert llama.sliding_window == 16


@by_pair
def test_tensor_parallel_plans_name_every_projection(text, image):
    config = cross_jam(text, image).config
    whole = {"opt", "chameleon", "chameleon-swin"} & {text, image}
    for processes in (1, 3):  # the text stream's two key/value heads cannot be shared out among three
        model = JamForCausalLM(config).model
        plan = tensor_parallel_plan(config, processes)
        names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        covered = {
            name.replace(f".{depth}.", ".*.") for name in names for depth in range(LAYERS) if f".{depth}." in name
        }
        covered = {name for name in covered if name.startswith("language_model.layers")}
        norms = {name for name in plan if name.endswith(("q_norm", "k_norm"))}
        assert covered == set(plan) - norms - {"language_model.embed_tokens"}
        assert len(norms) == 2 * (text, image).count("qwen3")
        style = "colwise_gather_output" if whole or processes == 3 else "colwise"
        assert {style for name, style in plan.items() if name.endswith("q_proj")} == {style}
        expected = {"replicate"} if whole or processes == 3 else {"replicated_with_grad_allreduce"}
        assert {plan[name] for name in norms} == (expected if norms else set())


def test_adapters_find_their_default_targets_in_every_method_as_before():
    constants = pytest.importorskip("peft.utils.constants")
    for method in ("LORA", "OFT", "VERA"):
        assert getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")["jam"] == [
            "q_proj",
            "v_proj",
        ]
    for method in ("IA3", "LNTUNING", "ADALORA"):  # peft adapts other modules in one family than in another
        assert "jam" not in getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
