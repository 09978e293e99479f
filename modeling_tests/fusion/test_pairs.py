"""Every pair of parents in the form that preserves both: against the parents' own logits, and what each mode
refuses.
"""

import copy
import functools
import itertools
import json

import pytest
import torch
from fusion_zoo import (
    EQUAL,
    IMAGE_PARENTS,
    NUM_CODES,
    PICTURES,
    PROMPTS,
    SAME_ARITHMETIC,
    SMALL,
    TEXT_KINDS,
    ImageParent,
    Sizes,
    code_reader,
    image_documents,
    image_parent,
    jams_picture,
    padded,
    randomise,
    reader,
    readings,
    save,
    text_parent,
    vq_model,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import jam_hf
from jam_hf import JamForCausalLM
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.integrations.sharding import tensor_parallel_plan
from jam_hf.model.families_jam import FAMILIES, Family
from jam_hf.training.tokenizer import train_tokenizer


IMAGE_SIZES = Sizes(hidden=48, layers=5, heads=6, kv_heads=3, ffn=40)  # unlike the text parents in every number


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """`zoo(role, kind, sizes, **settings)` -> (folder, model, tokenizer)"""
    made = {}

    def make(role, kind, sizes=SMALL, **settings):
        key = (role, kind, sizes, str(settings))
        if key not in made:
            model, tokenizer = (text_parent if role == "text" else image_parent)(kind, sizes, **settings)
            made[key] = save(model, tokenizer, tmp_path_factory.mktemp(f"{role}-{kind}") / kind), model, tokenizer
        return made[key]

    return make


@functools.cache
def products_are_alike() -> bool:
    """Whether a row of a product has the same bits however many others are computed with it, as a fused head has more
    of them than its parents'. Not on every CPU: kernels for AVX2 alone divide the rows otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    for tokens, width, rows in itertools.product((1, 5, 12, 24, 40), (16, 24, 32, 48), (64, 90, 96, 300)):
        states, head = (torch.randn(count, width, generator=generator) for count in (tokens, rows + 36))
        alone = torch.nn.functional.linear(states, head[:rows].contiguous())
        if not torch.equal(torch.nn.functional.linear(states, head)[:, :rows], alone):
            return False
    return True


def assert_same(ours, theirs, bound=0.0):
    """Bit for bit, where the CPU's products are, or within `bound` relative to the largest."""
    assert ours.shape == theirs.shape
    bound = bound or (0.0 if products_are_alike() else 2e-6)
    if bound:
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=bound * theirs.abs().max().item())
    else:
        assert torch.equal(ours, theirs)


def assert_preserves_text(model, text, text_tokenizer, tokenizer, bound=0.0):
    prompts = [text_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert [tokenizer(prompt)["input_ids"] for prompt in PROMPTS] == prompts
    expected = readings(reader(text), prompts, text_tokenizer.pad_token_id or 0)
    assert_same(readings(reader(model, 0, expected.shape[-1]), prompts, model.config.pad_token_id), expected, bound)


def assert_preserves_image(model, image, tokenizer, bound=0.0, text_bound=0.0):
    """bound: for documents with codes. text_bound: for text alone."""
    documents = image_documents(image.kind, model.config, tokenizer, image.tokenizer)
    for (ours, theirs), limit in zip(documents, (text_bound, bound)):
        expected = readings(image.logits, theirs, image.tokenizer.pad_token)
        assert expected.shape[-1] == NUM_CODES
        assert_same(readings(code_reader(model), ours, model.config.pad_token_id), expected, limit)


def load(folder):
    model, info = JamForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    return model.eval(), tokenizer


def assert_preserves_both(text_entry, image_entry, kind, folder, **settings):
    text_folder, text, text_tokenizer = text_entry
    image_folder, image, image_tokenizer = image_entry
    jam_hf.fuse(text_folder, image_folder, "cross", folder, vq_model=vq_model(), **settings)
    model, tokenizer = load(folder)
    assert_preserves_text(model, text, text_tokenizer, tokenizer)
    # Janus makes the rows of its codes in one product of another shape: float32 rounding.
    assert_preserves_image(
        model, ImageParent(kind, image, image_tokenizer), tokenizer, 1e-5 if kind == "janus" else 0.0
    )
    return model


@pytest.mark.sampled
@pytest.mark.parametrize("image_name", IMAGE_PARENTS)
@pytest.mark.parametrize("text_kind", TEXT_KINDS)
def test_cross_preserving_gives_both_parents_logits(text_kind, image_name, zoo, tmp_path):
    settings = IMAGE_PARENTS[image_name]
    image = zoo("image", sizes=IMAGE_SIZES, **settings)
    assert_preserves_both(zoo("text", text_kind), image, settings["kind"], tmp_path / "jam")


# Families that are not supported: the one entry that would add each, and fields of their configs.
_HEADS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_NORMS = {"query_layernorm": "norm of heads", "key_layernorm": "norm of heads"}
NEW_FAMILIES = {
    "seed_oss": (
        Family("seed_oss", "SeedOss"),
        {
            "head_dim": 8,
            "attention_bias": True,
            "attention_out_bias": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    ),
    "smollm3": (
        Family("smollm3", "SmolLM3", windows="layer_types"),
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "hunyuan_v1_dense": (Family("hunyuan_v1_dense", "HunYuanDenseV1", attention=_HEADS | _NORMS), {"head_dim": 8}),
}


@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_a_family_is_added_by_one_entry(name, tmp_path, monkeypatch):
    """Both streams are of it: fused, loaded, saved again, and a picture drawn; uniform and width are planned."""
    entry, changes = NEW_FAMILIES[name]
    parents = {}
    for seed, (role, tokenizer) in enumerate((("text", text_parent("qwen2")[1]), ("image", image_parent("plain")[1]))):
        ids = {field: getattr(tokenizer, field) for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = AutoConfig.for_model(
            name,
            vocab_size=padded(tokenizer),
            num_hidden_layers=3,
            max_position_embeddings=256,
            **sizes,
            **ids,
            **changes,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        randomise(model, seed, 32**-0.5)
        parents[role] = save(model, tokenizer, tmp_path / role), model, tokenizer
    with pytest.raises(ValueError, match=f"is of the family '{name}', which is not supported here"):
        jam_hf.fuse(parents["text"][0], parents["image"][0], "cross", tmp_path / "jam", vq_model=vq_model())

    monkeypatch.setitem(FAMILIES, name, entry)
    model = assert_preserves_both(parents["text"], parents["image"], "plain", tmp_path / "jam")
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "jam")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(JamForCausalLM.from_pretrained(tmp_path / "again").eval()(ids).logits, model(ids).logits)
    drawn = again.generate(ids, generation_mode="image", do_sample=False)
    codes = model.config.image_token_range
    for place in range(5, 5 + model.config.image_seq_length):  # behind <break>
        assert drawn[0, place] == codes[model(drawn[:, :place]).logits[0, -1, codes.start : codes.stop].argmax()]
    split = {key.rpartition(".")[2] for key in tensor_parallel_plan(model.config)}
    modules = model.model.language_model.named_modules()
    linear = {key.rpartition(".")[2] for key, part in modules if isinstance(part, torch.nn.Linear)}
    assert entry.linear_layers == linear and linear <= split
    for mode in ("uniform", "width"):
        plan_fusion(parents["text"][0], parents["image"][0], mode, vq_model=vq_model())


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# (text kind, its changes), (image parent, its changes): what the pairs above do not have.
VARIANTS = {
    "biases everywhere, both tied, MHA": (
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, **TIED}),
        ("emu3", {"attention_bias": True, "mlp_bias": True, **TIED}),
    ),
    "scaled RoPE, image tied": (
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama-lm", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, **TIED}),
    ),
    "windows of two sizes": (("mistral", {"sliding_window": 4}), ("qwen2-lm", {**WINDOWS, **UNTIED})),
    "windows in some layers, text untied": (
        ("qwen2", {**WINDOWS, **UNTIED}),
        ("mistral-lm", {"sliding_window": 5, **TIED}),
    ),
    "a head size of its own": (
        ("mistral", {"head_dim": 12, **TIED}),
        ("chameleon-swin", {**TIED, "num_key_value_heads": 1}),
    ),
    "query-key norms with windows": (
        ("qwen3", {**WINDOWS, **TIED}),
        ("qwen3-lm", {"head_dim": 8, "attention_bias": True}),
    ),
    "Janus tied": (("qwen3", {"attention_bias": True}), ("janus", {**TIED, "attention_bias": True})),
    "OPT projected": (("opt", {"word_embed_proj_dim": 16}), ("opt-lm", {"word_embed_proj_dim": 24, **UNTIED})),
    "OPT as the paper has it": (
        ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
        ("opt-lm", {"do_layer_norm_before": False, "activation_function": "gelu"}),
    ),
    "OPT as opt-350m": (
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, **UNTIED}),
        ("janus", {"rope_parameters": LLAMA3_ROPE}),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_a_family_can_have_is_preserved(variant, zoo, tmp_path):
    (text_kind, text_changes), (image_name, image_changes) = VARIANTS[variant]
    settings = IMAGE_PARENTS[image_name]
    image = zoo("image", sizes=IMAGE_SIZES, **settings, **image_changes)
    model = assert_preserves_both(zoo("text", text_kind, **text_changes), image, settings["kind"], tmp_path / "jam")
    for config, changes in ((model.config.text_config, text_changes), (model.config.image_config, image_changes)):
        for name, value in changes.items():
            if name != "tie_word_embeddings":
                found = getattr(config, name)
                assert (value.items() <= found.items()) if isinstance(value, dict) else found == value, name


@pytest.fixture(scope="module")
def shared_tokenizer():
    return train_tokenizer(["a small red circle in the top left", "a ruby is red, the sea"], 300, NUM_CODES)


@pytest.mark.parametrize(("text_kind", "image_kind"), [*zip(TEXT_KINDS, TEXT_KINDS[1:]), ("opt", "llama")])
def test_with_one_vocabulary_both_parents_read_the_whole_document(text_kind, image_kind, shared_tokenizer, tmp_path):
    text, _ = text_parent(text_kind, tokenizer=shared_tokenizer)
    image, _ = text_parent(image_kind, IMAGE_SIZES, 2, tokenizer=shared_tokenizer)
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model(), tokenizer=shared_tokenizer)
    model, tokenizer = load(tmp_path / "jam")
    assert model.config.vocab_size == text.config.vocab_size and len(tokenizer) == len(shared_tokenizer)
    words = shared_tokenizer("the small ruby")["input_ids"]
    pictures = [jams_picture(model.config, codes) for codes in PICTURES]
    documents = [words + pictures[0] + words[2:] + pictures[1], words[:3] + pictures[1]]
    pad, first = model.config.pad_token_id, model.config.image_token_offset
    for parent, columns in ((text, (0, first)), (image, (first, first + NUM_CODES))):
        ours, theirs = (readings(reader(one, *columns), documents, pad) for one in (model, parent))
        assert_same(ours, theirs)


@pytest.mark.parametrize(("text_kind", "image_name"), [*zip(TEXT_KINDS, list(IMAGE_PARENTS)[4:])])
def test_bfloat16_parents(text_kind, image_name, zoo, tmp_path):
    settings = IMAGE_PARENTS[image_name]
    sources, parents = [], []
    for name, (_, model, tokenizer) in (
        ("text", zoo("text", text_kind)),
        ("image", zoo("image", sizes=IMAGE_SIZES, **settings)),
    ):
        half = save(copy.deepcopy(model).to(torch.bfloat16), tokenizer, tmp_path / name)
        sources.append(half)
        parents.append(
            (type(model).from_pretrained(half, dtype=torch.bfloat16).eval(), tokenizer)
        )  # frequencies in float32
    jam_hf.fuse(*sources, "cross", tmp_path / "jam", vq_model=vq_model())
    model, tokenizer = load(tmp_path / "jam")
    assert model.lm_head.weight.dtype == torch.bfloat16
    # CPUs have several kernels for bfloat16, and choose by the size of the head.
    assert_preserves_text(model, *parents[0], tokenizer, 2**-6)
    assert_preserves_image(model, ImageParent(settings["kind"], *parents[1]), tokenizer, 2**-6, 2**-6)


@pytest.mark.parametrize("image_name", ["chameleon", "emu3", "janus"])
def test_parents_in_memory_and_in_folders_give_the_same(image_name, zoo, tmp_path):
    """Their keys differ: transformers saves Emu3 under the names that its published checkpoint has."""
    text_folder, text, text_tokenizer = zoo("text", "llama")
    folder, image, image_tokenizer = zoo("image", sizes=IMAGE_SIZES, **IMAGE_PARENTS[image_name])
    saved = set(load_file(folder / "model.safetensors"))
    assert (saved == set(image.state_dict())) == (image_name != "emu3")
    jam_hf.fuse(text_folder, folder, "cross", tmp_path / "folders", vq_model=vq_model())
    arguments = {"tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer}
    jam_hf.fuse(text, image, "cross", tmp_path / "memory", vq_model=vq_model(), **arguments)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("folders", "memory"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_head_that_is_not_what_the_config_ties_it_to_is_its_own(zoo, tmp_path):
    """transformers does not tie what a checkpoint has twice and differently; nor does a fusion, in any mode."""
    text, text_tokenizer = text_parent("llama")
    image, image_tokenizer = image_parent("plain", tie_word_embeddings=True)
    folder = save(text, text_tokenizer, tmp_path / "text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    jam_hf.fuse(
        folder, save(image, image_tokenizer, tmp_path / "image"), "uniform", tmp_path / "jam", vq_model=vq_model()
    )
    model, _ = load(tmp_path / "jam")
    known = text_tokenizer.convert_tokens_to_ids("<0x41>"), image_tokenizer.convert_tokens_to_ids("A")
    expected = (text.lm_head.weight[known[0]] + image.lm_head.weight[known[1]]) / 2
    torch.testing.assert_close(model.lm_head.weight[known[0]], expected)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


# ----- what each mode refuses -----------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("image_name", IMAGE_PARENTS)
@pytest.mark.parametrize("text_kind", TEXT_KINDS)
def test_pairs_that_cannot_be_one_decoder_are_refused_with_the_reason(text_kind, image_name, zoo):
    _, text, text_tokenizer = zoo("text", text_kind)
    _, image, image_tokenizer = zoo("image", **IMAGE_PARENTS[image_name])
    arguments = {"vq_model": vq_model(), "tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer}
    if image_name not in SAME_ARITHMETIC[text_kind]:
        reason = "is a Chameleon.*'cross' only" if "chameleon" in image_name else "differ in family"
        for mode in ("uniform", "width"):
            with pytest.raises(ValueError, match=reason):
                plan_fusion(text, image, mode, **arguments)
    if (text_kind == "opt") != (image_name == "opt-lm"):
        with pytest.raises(ValueError, match="positions: (learned and rotary|rotary and learned)"):
            plan_fusion(text, image, "cross", "paper", **arguments)


DIFFERENCES = [  # family, change of the image parent, (mode, init) that refuse it
    ("llama", {"hidden_size": 40, "head_dim": 8}, "uniform copy average"),
    ("llama", {"intermediate_size": 40}, "uniform copy average"),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}, "uniform copy average"),
    ("llama", {"num_key_value_heads": 4}, "uniform copy average block_diagonal"),
    ("llama", {"head_dim": 16}, "uniform copy average block_diagonal"),
    ("llama", {"num_hidden_layers": 4}, "uniform copy average block_diagonal"),
    ("llama", {"rms_norm_eps": 1e-6}, "uniform copy average block_diagonal"),
    ("llama", {"attention_bias": True}, "uniform copy average block_diagonal"),
    ("llama", {"mlp_bias": True}, "uniform copy average block_diagonal"),
    ("llama", {"hidden_act": "gelu"}, "uniform copy average block_diagonal"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "uniform copy average block_diagonal"),
    ("llama", {"max_position_embeddings": 128, "attention_dropout": 0.1, "tie_word_embeddings": True}, ""),
    ("mistral", {"sliding_window": 8}, "uniform copy average block_diagonal"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "uniform copy average block_diagonal",
    ),
    ("opt", {"hidden_size": 48, "num_attention_heads": 6, "word_embed_proj_dim": 48}, "uniform copy average"),
    ("opt", {"word_embed_proj_dim": 16}, "uniform copy average block_diagonal"),
    ("opt", {"max_position_embeddings": 128}, "uniform copy average block_diagonal"),
    ("opt", {"enable_bias": False}, "uniform copy average block_diagonal"),
    ("opt", {"do_layer_norm_before": False}, "uniform copy average block_diagonal"),
    (
        "opt",
        {"dropout": 0.1, "layerdrop": 0.1, "activation_dropout": 0.1, "prefix": "</s>", "tie_word_embeddings": False},
        "",
    ),
]


@pytest.mark.parametrize(("family", "change", "refusing"), DIFFERENCES)
def test_uniform_and_width_refuse_what_one_decoder_cannot_have_and_no_more(family, change, refusing):
    equal = {} if family == "opt" else EQUAL
    text, text_tokenizer = text_parent(family, **equal)
    image, image_tokenizer = image_parent("plain", like=family, **{**equal, **change})
    arguments = {"vq_model": vq_model(), "tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer}
    for mode, init in (("uniform", "average"), ("width", "copy"), ("width", "average"), ("width", "block_diagonal")):
        if (mode if mode == "uniform" else init) in refusing.split():
            names = {
                "num_key_value_heads": "num_key_value_heads|heads per key/value head",
                "word_embed_proj_dim": "word_embed_proj_dim|projected embeddings",
            }
            word = "|".join(names.get(name, name) for name in change if name != "use_sliding_window")
            with pytest.raises(ValueError, match=f"as '{mode}', they differ in .*({word})"):
                plan_fusion(text, image, mode, init, **arguments)
        else:
            plan_fusion(text, image, mode, init, **arguments)


def test_sums_that_the_stock_config_does_not_take_are_refused():
    text, tokenizer = text_parent("llama", **EQUAL)
    more_heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    image, image_tokenizer = image_parent("plain", **EQUAL, **more_heads)
    arguments = {"vq_model": vq_model(), "tokenizer": tokenizer, "image_tokenizer": image_tokenizer}
    with pytest.raises(
        ValueError, match=r"cannot be fused as 'width'(.|\n)*size \(64\) is not a multiple of .* heads \(12\)"
    ):
        plan_fusion(text, image, "width", "block_diagonal", **arguments)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"hidden_size": 48}, "hidden_size: 32 and 48"),
        ("opt", {"word_embed_proj_dim": 16}, "size of an embedding: 32 and 16"),
        ("opt", {"hidden_size": 48, "word_embed_proj_dim": 32}, "hidden_size: 32 and 48"),
    ],
)
def test_the_papers_cross_form_needs_one_embedding(family, change, words):
    text, tokenizer = text_parent(family)
    image, image_tokenizer = image_parent("plain", like=family, **change)
    with pytest.raises(ValueError, match=f"init='paper'.*{words}"):
        plan_fusion(
            text, image, "cross", "paper", vq_model=vq_model(), tokenizer=tokenizer, image_tokenizer=image_tokenizer
        )
