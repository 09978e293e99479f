"""What each mode makes of a pair of parents: every tensor against a definition of three lines, and the saved JAM at
work.
"""

import pytest
import torch
from conftest import same_picture
from fusion_zoo import (
    EQUAL,
    IMAGE_PARENTS,
    NUM_CODES,
    SAME_ARITHMETIC,
    SMALL,
    TEXT_KINDS,
    ImageParent,
    Sizes,
    image_parent,
    jams_picture,
    text_parent,
    vq_model,
)
from PIL import Image

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.fusion.fuse import plan_fusion


LARGER = Sizes(hidden=48, layers=3, heads=6, kv_heads=3, ffn=40)  # the head size and the depth of SMALL
OTHER = Sizes(hidden=32, layers=5, heads=8, kv_heads=2, ffn=40)  # the hidden size of SMALL
SAME = [(text, image) for text in TEXT_KINDS for image in IMAGE_PARENTS if image in SAME_ARITHMETIC[text]]
PAPER = [(text, image) for text in TEXT_KINDS for image in IMAGE_PARENTS if (text == "opt") == (image == "opt-lm")]
EVERY_KIND = [*zip(TEXT_KINDS, IMAGE_PARENTS), ("llama", "emu3"), ("mistral", "janus")]  # each in one pair of SAME
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def pair():
    """`pair(text kind, image parent, sizes of the image parent, text changes, image changes)` -> arguments of a
    fusion
    """
    made = {}

    def make(text_kind, image_name, sizes=SMALL, text_changes=None, image_changes=None):
        equal = {} if text_kind == "opt" else EQUAL
        entries = (
            ("text", text_parent, {"kind": text_kind, **equal, **(text_changes or {})}),
            ("image", image_parent, {**IMAGE_PARENTS[image_name], "sizes": sizes, **equal, **(image_changes or {})}),
        )
        found = []
        for role, function, arguments in entries:
            key = role + str(arguments)
            if key not in made:
                made[key] = function(**arguments)
            found.append(made[key])
        (text, tokenizer), (image, image_tokenizer) = found
        return {
            "text_model": text,
            "image_model": image,
            "tokenizer": tokenizer,
            "image_tokenizer": image_tokenizer,
            "vq_model": vq_model(2),
        }

    return make


# ----- definitions ----------------------------------------------------------------------------------------------------


class Definition:
    """The same fusion, slowly, from the parents' own state dictionaries."""

    def __init__(self, plan, arguments):
        self.plan, self.config, vocabulary = plan, plan.config, plan.vocabulary
        self.text, self.image = (arguments[name].state_dict() for name in ("text_model", "image_model"))
        self.janus = arguments["image_model"] if plan.image.kind == "janus" else None
        before, after = len(arguments["tokenizer"]), len(arguments["tokenizer"]) + len(vocabulary.added)
        ids = torch.arange(vocabulary.size)
        self.in_text = (ids < plan.text.vocab_size) & ~((before <= ids) & (ids < after))
        self.in_image = torch.tensor([bool(rows) for rows in self.image_rows()])
        self.codes = (ids >= self.config.image_token_offset) & (ids < self.config.image_token_offset + NUM_CODES)

    def image_rows(self):
        offsets, rows = self.plan.vocabulary.image_map.offsets.tolist(), self.plan.vocabulary.image_map.rows.tolist()
        return [rows[first:last] for first, last in zip(offsets, offsets[1:])]

    def layer(self, rest):
        """The parents' tensors of one name inside the decoder."""
        return self.text[self.plan.text.prefix + rest], self.image[self.plan.image.prefix + rest]

    def vocabulary(self, head):
        """The parents' embeddings or heads over the JAM's vocabulary; where one knows nothing, the mean of its rows."""
        text = self.text["lm_head.weight" if head else self.plan.text.embedding_key]
        image = self.image["lm_head.weight" if head else self.plan.image.embedding_key]
        in_image, means = self.in_image.clone(), (text.mean(0), image.mean(0))
        if self.janus is not None and head:  # it has a head of its own for codes
            in_image[self.codes] = False
        elif self.janus is not None:
            with torch.no_grad():
                image = torch.cat((image, self.janus.prepare_embeddings_for_image_generation(torch.arange(NUM_CODES))))
        text = torch.cat((text, means[0].repeat(len(in_image) - len(text), 1)))
        rows = [image[rows].mean(0) if known else means[1] for known, rows in zip(in_image, self.image_rows())]
        return text, torch.stack(rows), in_image

    def uniform(self, key, init):
        if "image_head" in key:
            return self.image["model.generation_head" + key.removeprefix("image_head")]
        if "lm_head" in key or "embed_tokens" in key:
            text, image, in_image = self.vocabulary("lm_head" in key)
            text_weight = torch.where(self.in_text == in_image, 0.5, self.in_text.float())[:, None]
            return text_weight * text + (1 - text_weight) * image
        text, image = self.layer(key.removeprefix("model.language_model."))
        return (text + image) / 2

    def width(self, key, init):
        if "image_head" in key:
            own = self.image["model.generation_head" + key.removeprefix("image_head")]
            return torch.cat((torch.zeros(own.shape[0], SMALL.hidden), own), 1) if "proj_out.weight" in key else own
        if "lm_head" in key or "embed_tokens" in key:
            text, image, _ = self.vocabulary("lm_head" in key)
            return torch.cat((text, image), 1)
        text, image = self.layer(key.removeprefix("model.language_model."))
        if "q_norm" in key or "k_norm" in key:
            return (text + image) / 2
        if text.dim() == 1 or "embed_positions" in key:
            return torch.cat((text, image), text.dim() - 1)
        if init == "block_diagonal":
            return torch.block_diag(text, image)
        right = (text, image) if init == "copy" else ((text + image) / 2,) * 2
        return torch.cat((torch.cat((text, right[0]), 1), torch.cat((image, right[1]), 1)))

    def paper(self, key, init):
        """None: drawn at random."""
        if "image_head" in key:
            return self.image["model.generation_head" + key.removeprefix("image_head")]
        if "lm_head" in key or "embed_tokens" in key:
            text, image, _ = self.vocabulary("lm_head" in key)
            return torch.where((self.codes | (self.in_image & ~self.in_text))[:, None], image, text)
        rest = key.removeprefix("model.language_model.")
        if "_cross." in rest or rest == "output_projection.weight":
            return torch.ones(self.plan.tensors[key].spec.shape) if "norm" in rest else None
        for stream, depths in (("text", self.config.text_layer_depths), ("image", self.config.image_layer_depths)):
            state, prefix = getattr(self, stream), getattr(self.plan, stream).prefix
            if rest.startswith(f"{stream}_stem."):
                return state[prefix + rest.removeprefix(f"{stream}_stem.")]
            if f".{stream}_layer." in rest:
                depth, _, name = rest.removeprefix("layers.").partition(f".{stream}_layer.")
                return state[f"{prefix}layers.{depths.index(int(depth))}.{name}"]


def assert_defined(arguments, mode, init):
    plan = plan_fusion(arguments["text_model"], arguments["image_model"], mode, init, **_rest(arguments))
    definition = Definition(plan, arguments)
    define = definition.paper if mode == "cross" else getattr(definition, mode)
    if mode != "cross":
        assert 0 < definition.in_text.sum() < len(definition.in_text) and not definition.in_text[definition.codes].any()
        assert (~definition.in_text & ~definition.in_image).any() and (
            definition.in_text & definition.in_image
        ).sum() > 40
    drawn = {}
    for key, tensor in plan.tensors.items():
        if key.startswith("model.vq_model."):
            continue
        ours, expected = tensor.tensor(), define(key, init)
        if expected is None:
            drawn[key] = ours
        else:
            assert ours.shape == expected.shape, key
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, msg=key)
    return plan, drawn


def _rest(arguments):
    return {name: value for name, value in arguments.items() if name not in ("text_model", "image_model")}


@pytest.mark.sampled
@pytest.mark.parametrize(("text_kind", "image_name"), SAME)
def test_uniform_is_the_mean_entry_by_entry(text_kind, image_name, pair):
    assert_defined(pair(text_kind, image_name), "uniform", "average")


@pytest.mark.sampled
@pytest.mark.parametrize("init", ["copy", "average", "block_diagonal"])
@pytest.mark.parametrize(("text_kind", "image_name"), SAME)
def test_width_follows_its_rule_entry_by_entry(text_kind, image_name, init, pair):
    plan, _ = assert_defined(pair(text_kind, image_name), "width", init)
    assert plan.config.hidden_size == 2 * SMALL.hidden and plan.config.num_attention_heads == 2 * SMALL.heads


@pytest.mark.parametrize(("text_kind", "image_name"), EVERY_KIND)
def test_block_diagonal_width_takes_unequal_sizes(text_kind, image_name, pair):
    plan, _ = assert_defined(pair(text_kind, image_name, LARGER), "width", "block_diagonal")
    config = plan.config.text_config
    assert config.hidden_size == 80 and config.num_attention_heads == 10
    if text_kind != "opt":
        assert (config.num_key_value_heads, config.intermediate_size) == (5, 88)
        assert plan.config.head_dim == (16 if text_kind == "qwen3" else 8)


@pytest.mark.parametrize(
    ("text_kind", "image_name", "changes"),
    [
        ("llama", "emu3", BIASES),
        ("llama", "janus", BIASES | TIED),
        ("llama", "llama-lm", {"num_key_value_heads": 4, "head_dim": 6} | TIED),
        ("mistral", "mistral-lm", {"sliding_window": 4, "head_dim": 12}),
        ("qwen2", "qwen2-lm", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", "qwen3-lm", {"attention_bias": True}),
        ("opt", "opt-lm", {"word_embed_proj_dim": 16}),
        ("opt", "opt-lm", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
        ("opt", "opt-lm", {"do_layer_norm_before": False, "tie_word_embeddings": False}),
    ],
)
def test_whatever_a_family_can_have_is_averaged_and_widened(text_kind, image_name, changes, pair):
    for mode, init in (("uniform", "average"), ("width", "average"), ("width", "block_diagonal")):
        plan, _ = assert_defined(pair(text_kind, image_name, SMALL, changes, changes), mode, init)
        tied = plan.text.tied and plan.image.tied
        assert plan.config.tie_word_embeddings == tied == ("lm_head.weight" not in plan.tensors)


@pytest.mark.parametrize("tied", ["text", "image"])
@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "paper")])
def test_a_head_is_tied_only_where_both_parents_tie_theirs(mode, init, tied, pair):
    changes = [TIED if tied == role else {"tie_word_embeddings": False} for role in ("text", "image")]
    plan, _ = assert_defined(pair("llama", "emu3", SMALL, *changes), mode, init)
    assert not plan.config.tie_word_embeddings and "lm_head.weight" in plan.tensors
    assert any(tied in warning and "two tensors" in warning for warning in plan.warnings)


@pytest.mark.sampled
@pytest.mark.parametrize(("text_kind", "image_name"), PAPER)
def test_the_papers_cross_form_entry_by_entry(text_kind, image_name, pair):
    plan, drawn = assert_defined(pair(text_kind, image_name, OTHER), "cross", "paper")
    std = plan.config.initializer_range
    for key, tensor in drawn.items():
        expected = SMALL.hidden**-0.5 if "output_projection" in key else std
        assert (
            tensor.std().item() == pytest.approx(expected, rel=0.15) and abs(tensor.mean().item()) < 0.2 * expected
        ), key
    shapes = {}
    for key, tensor in drawn.items():
        assert not any(torch.equal(tensor, other) for other in shapes.setdefault(tensor.shape, [])), key
        shapes[tensor.shape].append(tensor)
    crossed = {key.split(".")[3] for key in drawn if "_cross." in key}
    assert crossed == {str(depth) for depth in plan.config.cross_attention_layers} == {"1", "4"}


def test_in_a_block_diagonal_layer_of_unequal_halves_each_head_keeps_its_keys(pair):
    arguments = pair("llama", "emu3", LARGER)
    plan = plan_fusion(*list(arguments.values())[:2], "width", "block_diagonal", **_rest(arguments))
    with torch.device("meta"):
        model = JamForCausalLM(plan.config)
    state = {key: tensor.tensor() for key, tensor in plan.tensors.items()}
    model.load_state_dict(state, assign=True)
    decoder = model.model.language_model
    hidden = torch.randn(1, 6, 80, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    with torch.no_grad():
        halves = []
        for parent, part in (
            (arguments["text_model"].model, hidden[..., :32]),
            (arguments["image_model"].model.text_model, hidden[..., 32:]),
        ):
            halves.append(parent.layers[0].self_attn(part, position_embeddings=parent.rotary_emb(part, positions))[0])
        rotary = type(decoder.rotary_emb)(config=plan.config.text_config)(hidden, positions)
        ours = decoder.layers[0].self_attn(hidden, position_embeddings=rotary)[0]
    torch.testing.assert_close(ours, torch.cat(halves, dim=-1), rtol=1e-4, atol=1e-5)


# ----- at work --------------------------------------------------------------------------------------------------------

AT_WORK = [
    *((text, image, "cross", init) for text, image in EVERY_KIND for init in ("preserving", "paper")),
    *(("qwen3", image, "cross", init) for image in ("chameleon", "chameleon-swin") for init in ("preserving", "paper")),
    *(
        (text, image, *mode)
        for text, image in EVERY_KIND
        for mode in (("uniform", "average"), ("width", "block_diagonal"))
    ),
    *(("llama", image, "width", init) for image in ("emu3", "janus") for init in ("copy", "average")),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("text_kind", "image_name", "mode", "init"), AT_WORK)
def test_a_saved_jam_loads_reads_and_draws(text_kind, image_name, mode, init, pair, tmp_path):
    sizes = {"preserving": LARGER, "paper": OTHER, "block_diagonal": LARGER}.get(init, SMALL)
    arguments = pair(text_kind, image_name, sizes)
    jam_hf.fuse(mode=mode, init=init, output_dir=tmp_path / "jam", **arguments)
    model, info = JamForCausalLM.from_pretrained(tmp_path / "jam", output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    processor = JamProcessor.from_pretrained(tmp_path / "jam")
    picture = Image.effect_noise((8, 8), 90).convert("RGB")
    inputs = processor(images=[picture], text="a ruby <image>", return_tensors="pt")
    ids = model.model.insert_image_tokens(inputs["input_ids"], inputs["pixel_values"])
    codes = model.model.vq_model.encode(inputs["pixel_values"])
    expected = jams_picture(model.config, codes[0].tolist())
    assert ids[0, -len(expected) :].tolist() == expected
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*ids.shape, model.config.vocab_size) and logits.isfinite().all()

    segments = processor.post_process_interleaved(ids, model=model)[0]
    assert [segment["type"] for segment in segments] == ["text", "image"] and "ruby" in segments[0]["text"]
    shown = processor.image_processor.postprocess(model.model.vq_model.decode(codes).clamp(-1, 1))[0]
    assert same_picture(segments[1]["image"], shown)

    prompt = processor(text="a ruby", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    written = model.generate(**prompt, generation_mode="image", max_new_tokens=40, do_sample=False)[0, length:].tolist()
    first = model.config.image_token_offset
    drawn = [token - first for token in written if first <= token < first + NUM_CODES]
    assert written[: len(expected)] == jams_picture(model.config, drawn)


@pytest.mark.parametrize("image_name", ["chameleon", "emu3", "janus"])
def test_the_image_parents_own_vq_model_gives_its_codes(image_name, pair, tmp_path):
    arguments = {**pair("llama", image_name), "vq_model": None}
    image = arguments["image_model"]
    size = {"image_size": 32} if image_name == "emu3" else {}
    if image_name == "emu3":
        with pytest.raises(ValueError, match="pictures of any size.*image_size=512, say"):
            jam_hf.fuse(mode="cross", output_dir=tmp_path / "jam", **arguments)
    plan = plan_fusion(*list(arguments.values())[:2], "cross", **_rest(arguments), **size)
    encoder_only = [warning for warning in plan.warnings if "has no decoder" in warning]
    assert bool(encoder_only) == (image_name == "chameleon")
    model = JamForCausalLM.from_pretrained(
        jam_hf.fuse(mode="cross", output_dir=tmp_path / "jam", **arguments, **size)
    ).eval()
    side = model.config.vq_config.sample_size
    assert side == (32 if image_name == "emu3" else 16)
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = model.model.vq_model.encode(pixels)
    with torch.no_grad():
        if image_name == "emu3":
            found = image.model.vqmodel.encode(pixels, torch.tensor([[side, side]] * 2))
            theirs = torch.stack(list(found.image_tokens))
        else:
            theirs = image.model.vqmodel.encode(pixels).image_tokens
    assert torch.equal(ours, theirs.reshape(2, -1)) and ours.unique().numel() > 2
    if image_name == "chameleon":
        rows = ImageParent("chameleon", image, arguments["image_tokenizer"]).rows
        assert torch.equal(rows[ours], image.model.get_image_tokens(pixels).reshape(2, -1))
        with pytest.raises(ValueError, match="can encode pictures but not decode codes"):
            model.model.vq_model.decode(ours)
    else:
        with torch.no_grad():
            pixels = image.model.vqmodel.decode(ours.view(2, side // 4, side // 4) if image_name == "emu3" else ours)
        torch.testing.assert_close(model.model.vq_model.decode(ours), pixels, rtol=1e-5, atol=1e-5)
