"""Cross JAMs whose streams have different numbers of layers: pairing, function preservation, caches, and a slow oracle.

The parents' weights are copied here, by hand, so that nothing of the fusion is trusted. Where each layer must stand is
written out below, not asked of the config.
"""

import copy
import json
import math

import pytest
import torch
from conftest import VQ_SETTINGS, parent_model, random_ids, randomise
from torch import nn
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from jam_hf import JamConfig, JamForCausalLM


VOCABULARY = 301
# (text layers, image layers) -> the pairs [text layer, image layer] by relative position
PAIRS = {
    (3, 5): [[0, 1], [1, 3], [2, 4]],
    (5, 3): [[1, 0], [3, 1], [4, 2]],
    (2, 7): [[0, 3], [1, 6]],
}
FAMILIES = {"llama": ("llama", "llama"), "opt": ("opt", "opt-projected"), "llama and opt": ("llama", "opt")}
CASES = [("llama", depths) for depths in PAIRS] + [("opt", (3, 5)), ("opt", (5, 3)), ("llama and opt", (2, 7))]
CASES_IDS = [f"{families} {text} and {image}" for families, (text, image) in CASES]
every_case = pytest.mark.parametrize(("families", "depths"), CASES, ids=CASES_IDS)
WIDER = {"hidden_size": 48, "num_attention_heads": 6}


def parents_of(families: str, depths: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """A text and an image parent of these depths, of different widths."""
    text_family, image_family = FAMILIES[families]
    text = parent_model(text_family, VOCABULARY, 1, num_hidden_layers=depths[0])
    return text, parent_model(image_family, VOCABULARY, 2, num_hidden_layers=depths[1], **WIDER)


def config_of(text: nn.Module, image: nn.Module, **settings) -> JamConfig:
    configs = {"text_config": copy.deepcopy(text.config), "image_config": copy.deepcopy(image.config)}
    return JamConfig(**configs, vq_config=copy.deepcopy(VQ_SETTINGS), **settings)


def decoder_of(parent: nn.Module) -> nn.Module:
    return getattr(parent.model, "decoder", parent.model)


def copy_parent(model: JamForCausalLM, stream: str, parent: nn.Module, depths: list[int]) -> None:
    decoder, ours = decoder_of(parent), model.model.language_model
    assert len(depths) == len(decoder.layers)
    for layer, depth in zip(decoder.layers, depths):
        getattr(ours.layers[depth], f"{stream}_layer").load_state_dict(layer.state_dict())
    outside = {k: v for k, v in decoder.state_dict().items() if not k.startswith(("layers.", "embed_tokens."))}
    getattr(ours, f"{stream}_stem").load_state_dict(outside)


@torch.no_grad()
def preserving(text: nn.Module, image: nn.Module, pairs: list[list[int]], **settings) -> JamForCausalLM:
    """The JAM of two parents whose layers stand where `pairs` says."""
    torch.manual_seed(0)
    model = JamForCausalLM(config_of(text, image, **settings)).eval()
    counts = [len(decoder_of(parent).layers) for parent in (text, image)]
    deeper = counts.index(max(counts))
    for stream, (name, parent) in enumerate((("text", text), ("image", image))):
        depths = [pair[deeper] for pair in pairs] if stream != deeper else list(range(counts[deeper]))
        copy_parent(model, name, parent, depths)
    tables = [parent.get_input_embeddings().weight for parent in (text, image)]
    model.get_input_embeddings().weight.copy_(torch.cat(tables, dim=1))
    model.lm_head.weight.copy_(text.get_output_embeddings().weight)
    model.image_head.weight.copy_(image.get_output_embeddings().weight[model.config.image_token_offset :])
    return model


def build(families: str, depths: tuple[int, int], alive: bool = False, **settings) -> JamForCausalLM:
    model = preserving(*parents_of(families, depths), PAIRS[depths], **settings)
    if alive:
        for layer in model.model.language_model.layers:
            for block in (layer.text_cross, layer.image_cross):
                if block is not None:
                    randomise(block, seed=3)
    return model


def inputs_of(model: JamForCausalLM) -> dict[str, torch.Tensor]:
    ids = random_ids(model, 3, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    mask[1, 9:] = 0  # right padding
    return {"input_ids": ids, "attention_mask": mask}


def differences(model: JamForCausalLM, text: nn.Module, image: nn.Module) -> list[bool]:
    """Whether text and image logits are other than the parents', bit for bit, at the positions that are no padding."""
    inputs, first = inputs_of(model), model.config.image_token_offset
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, of_text, of_image = (m(**inputs).logits[seen] for m in (model, text, image))
    return [
        not torch.equal(ours[:, :first], of_text[:, :first]),
        not torch.equal(ours[:, first:], of_image[:, first:]),
    ]


# ----- the pairing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", PAIRS)
def test_layers_are_paired_by_relative_position(depths):
    config = config_of(*parents_of("llama", depths))
    assert config.layer_pairing == config.layer_pairs == PAIRS[depths]
    assert config.num_hidden_layers == max(depths)
    deeper = depths.index(max(depths))
    paired = tuple(pair[deeper] for pair in PAIRS[depths])
    expected = [tuple(range(max(depths)))] * 2
    expected[1 - deeper] = paired
    assert [config.text_layer_depths, config.image_layer_depths] == expected
    assert config.cross_attention_layers == paired[::2]
    config.cross_attention_interval = 1
    assert config.cross_attention_layers == paired


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_last_layers_are_always_a_pair(count):
    for more in range(count, 3 * count + 2):
        text, image = (parent_model("llama", VOCABULARY, 1, num_hidden_layers=1) for _ in range(2))
        text.config.num_hidden_layers, image.config.num_hidden_layers = count, more
        pairs = config_of(text, image).layer_pairs
        assert pairs == [[i, math.ceil((i + 1) * more / count) - 1] for i in range(count)]
        assert pairs[-1] == [count - 1, more - 1]


def test_equal_depths_are_as_they_were(tmp_path):
    config = config_of(*parents_of("llama", (3, 3)))
    assert config.layer_pairing is None
    assert config.layer_pairs == [[0, 0], [1, 1], [2, 2]]
    assert config.text_layer_depths == config.image_layer_depths == (0, 1, 2)
    assert config.cross_attention_layers == (0, 2)
    config.save_pretrained(tmp_path)
    assert "layer_pairing" not in json.loads((tmp_path / "config.json").read_text())
    assert config_of(*parents_of("llama", (3, 3)), layer_pairing=[[0, 0], [1, 1], [2, 2]]).layer_pairing is None
    uniform = JamConfig(fusion_mode="uniform", text_config=config.text_config, vq_config=copy.deepcopy(VQ_SETTINGS))
    assert (uniform.layer_pairs, uniform.text_layer_depths, uniform.image_layer_depths) == ([], (0, 1, 2), ())


def test_the_number_of_depths_can_be_set():
    config = config_of(*parents_of("llama", (3, 5)))
    config.num_hidden_layers = 4
    assert (
        config.text_config.num_hidden_layers == config.image_config.num_hidden_layers == config.num_hidden_layers == 4
    )
    assert config.layer_pairing is None and config.layer_pairs == [[i, i] for i in range(4)]


@pytest.mark.parametrize(
    ("pairing", "words"),
    [
        ([[0, 1], [2, 4]], ["has 2 pairs", "3 pairs"]),
        ([[0, 1], [1, 3], [2, 4], [2, 4]], ["has 4 pairs"]),
        ([[0, 1], [1, 3], [2, 5]], ["does not exist", "[2, 5]", "5 in image_config"]),
        ([[-1, 0], [1, 3], [2, 4]], ["does not exist", "[-1, 0]"]),
        ([[0, 3], [1, 1], [2, 4]], ["does not go up", "[0, 3] to [1, 1]"]),
        ([[0, 1], [1, 1], [2, 4]], ["does not go up", "[0, 1] to [1, 1]"]),
        ([[0, 1], [0, 3], [2, 4]], ["does not go up", "[0, 1] to [0, 3]"]),
        ([[1, 0], [3, 1], [4, 2]], ["does not exist", "[3, 1]"]),
        ([[0, 1], [1, 3], [2]], ["the entry [2]"]),
    ],
)
def test_wrong_pairings_are_refused(pairing, words):
    with pytest.raises(ValueError) as error:
        config_of(*parents_of("llama", (3, 5)), layer_pairing=pairing)
    for word in [*words, "[[0, 1], [1, 3], [2, 4]]"]:  # the last: what it would be by itself
        assert word in str(error.value)


def test_a_pairing_where_it_has_no_place_is_refused():
    text, _ = parents_of("llama", (3, 5))
    with pytest.raises(ValueError, match="fusion_mode='cross'"):
        JamConfig(fusion_mode="uniform", text_config=text.config, vq_config=dict(VQ_SETTINGS), layer_pairing=[[0, 0]])
    config = config_of(*parents_of("llama", (3, 5)))
    config.text_config.num_hidden_layers = 2  # the pairing that was derived speaks of three
    with pytest.raises(ValueError, match="`layer_pairing` has 3 pairs"):
        JamForCausalLM(config)


# ----- function preservation ------------------------------------------------------------------------------------------


@every_case
def test_both_parents_are_reproduced_bit_for_bit(families, depths):
    text, image = parents_of(families, depths)
    assert differences(preserving(text, image, PAIRS[depths]), text, image) == [False, False]


@pytest.mark.parametrize("depths", PAIRS)
def test_a_planted_error_is_seen_at_every_depth(depths):
    text, image = parents_of("llama", depths)
    model = preserving(text, image, PAIRS[depths])
    for layer in model.model.language_model.layers:
        for stream, part in enumerate((layer.text_layer, layer.image_layer)):
            if part is not None:
                weight = part.mlp.down_proj.weight.data.view(-1)
                kept = weight[5].clone()
                weight[5] += 0.1
                assert differences(model, text, image)[stream]
                weight[5] = kept
    assert differences(model, text, image) == [False, False]


def test_a_pairing_of_the_users_own_is_used_and_saved(tmp_path):
    text, image = parents_of("llama", (3, 5))
    own = [[0, 0], [1, 1], [2, 2]]
    model = preserving(text, image, own, layer_pairing=own)
    assert [layer.text_layer is not None for layer in model.model.language_model.layers] == [True] * 3 + [False] * 2
    assert differences(model, text, image) == [False, False]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_pairing"] == own
    assert AutoConfig.from_pretrained(tmp_path).layer_pairing == own
    assert differences(JamForCausalLM.from_pretrained(tmp_path).eval(), text, image) == [False, False]


@every_case
def test_saved_and_loaded(families, depths, tmp_path):
    model = build(families, depths, alive=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_pairing"] == PAIRS[depths]
    again = JamForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_pairing == PAIRS[depths]
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    names = [name for name in again.state_dict() if ".layers." in name]
    deeper = "image" if depths[1] > depths[0] else "text"
    for stream in ("text", "image"):
        found = sorted({int(name.split(".")[3]) for name in names if f".{stream}_layer." in name})
        paired = [max(pair) for pair in PAIRS[depths]]
        assert found == (list(range(max(depths))) if stream == deeper else paired)


# ----- with living cross blocks ---------------------------------------------------------------------------------------


def cross_by_hand(block: nn.Module, states: torch.Tensor, other: torch.Tensor, config, rotary) -> torch.Tensor:
    """A cross block, head by head and position by position; `rotary` is (cos, sin), or None for learned positions."""
    attention = block.cross_attn
    size = config.hidden_size // config.num_attention_heads
    normed = block.cross_attn_layer_norm(states)
    query, key, value = (
        projection(source).unflatten(-1, (-1, size)).transpose(1, 2)
        for projection, source in ((attention.q_proj, normed), (attention.k_proj, other), (attention.v_proj, other))
    )
    if rotary is not None:
        query, key = apply_rotary_pos_emb(query, key, *rotary)
    group = query.shape[1] // key.shape[1]
    rows = []
    for row in range(states.shape[0]):
        positions = []
        for t in range(states.shape[1]):
            heads = []
            for head in range(query.shape[1]):
                seen, values = key[row, head // group, : t + 1], value[row, head // group, : t + 1]
                weights = (seen @ query[row, head, t] / size**0.5).softmax(0)
                heads.append(weights @ values)
            positions.append(torch.cat(heads))
        rows.append(torch.stack(positions))
    states = states + attention.o_proj(torch.stack(rows))
    return states + block.mlp(block.final_layer_norm(states))


def oracle(model: JamForCausalLM, parents: tuple[nn.Module, nn.Module], pairs: list[list[int]], ids: torch.Tensor):
    """Logits by a plain loop: each pair of layers is run up to, one stream after the other, then they exchange
    states.
    """
    states, positions = [], torch.arange(ids.shape[1])[None]
    for parent in parents:
        decoder = decoder_of(parent)
        embedded = decoder.embed_tokens(ids)
        if hasattr(decoder, "rotary_emb"):
            states.append((embedded, decoder.rotary_emb(embedded, positions)))
        else:
            embedded = embedded if decoder.project_in is None else decoder.project_in(embedded)
            states.append((embedded + decoder.embed_positions(torch.ones_like(ids), 0), None))
    (text, text_rotary), (image, image_rotary) = states
    blocks = [(layer.text_cross, layer.image_cross) for layer in model.model.language_model.layers if layer.text_cross]

    def run(parent: nn.Module, layers: range, hidden: torch.Tensor, rotary) -> torch.Tensor:
        for layer in layers:
            hidden = decoder_of(parent).layers[layer](hidden, position_embeddings=rotary)
        return hidden

    done = [0, 0]
    for number, (text_layer, image_layer) in enumerate(pairs):
        text = run(parents[0], range(done[0], text_layer + 1), text, text_rotary)
        image = run(parents[1], range(done[1], image_layer + 1), image, image_rotary)
        done = [text_layer + 1, image_layer + 1]
        if number % model.config.cross_attention_interval == 0:
            text_cross, image_cross = blocks.pop(0)
            text, image = (
                cross_by_hand(text_cross, text, image, parents[0].config, text_rotary),
                cross_by_hand(image_cross, image, text, parents[1].config, image_rotary),
            )
    assert not blocks
    text = run(parents[0], range(done[0], len(decoder_of(parents[0]).layers)), text, text_rotary)
    image = run(parents[1], range(done[1], len(decoder_of(parents[1]).layers)), image, image_rotary)
    logits = []
    for parent, hidden in zip(parents, (text, image)):
        decoder = decoder_of(parent)
        hidden = decoder.norm(hidden) if hasattr(decoder, "norm") else decoder.final_layer_norm(hidden)
        if getattr(decoder, "project_out", None) is not None:
            hidden = decoder.project_out(hidden)
        logits.append(parent.get_output_embeddings()(hidden))
    first = model.config.image_token_offset
    return torch.cat((logits[0][..., :first], logits[1][..., first:]), dim=-1)


@pytest.mark.parametrize("interval", [1, 2])
@every_case
@torch.no_grad()
def test_cross_blocks_connect_the_paired_layers(families, depths, interval):
    parents = parents_of(families, depths)
    model = build(families, depths, alive=True, cross_attention_interval=interval)
    ids = random_ids(model, 2, 7)
    ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, oracle(model, parents, PAIRS[depths], ids), rtol=1e-4, atol=1e-4)
    if depths == (3, 5):  # the comparison sees a pair that is off by one layer
        shifted = oracle(model, parents, [[0, 0], *PAIRS[depths][1:]], ids)
        assert (ours - shifted).abs().max() > 0.05


@pytest.mark.parametrize("form", ["preserving", "paper"])
@every_case
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(families, depths, form):
    if form == "paper":
        text, image = (parent_model(FAMILIES[families][0], VOCABULARY, 1) for _ in range(2))  # one embedding feeds both
        text.config.num_hidden_layers, image.config.num_hidden_layers = depths
        torch.manual_seed(0)
        model = JamForCausalLM(config_of(text, image, cross_form="paper")).eval()
        randomise(model, seed=4)
    else:
        model = build(families, depths, alive=True)
    inputs = inputs_of(model)
    mask = inputs["attention_mask"]
    mask[1] = 1  # steps cannot follow right padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    full = model(**inputs, position_ids=positions).logits[mask.bool()]
    entries = sum(depths) + 2 * math.ceil(min(depths) / 2)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        steps = []
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            output = model(
                input_ids=inputs["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1)[mask.bool()], full, rtol=1e-4, atol=1e-4)
        assert len(cache.layers) == len(model.config.per_layer_config) == entries


@every_case
@torch.no_grad()
def test_the_cache_is_filled_in_the_order_of_the_visits(families, depths):
    model = build(families, depths, alive=True)

    class Recorder(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            visits.append((layer_idx, key_states.shape[1]))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    visits: list[tuple[int, int]] = []
    model(input_ids=random_ids(model, 1, 4), past_key_values=Recorder(config=model.config))
    expected = []
    for config in model.config.per_layer_config:
        expected.append(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert visits == list(enumerate(expected))


def test_outputs_of_both_streams():
    for depths in ((3, 5), (5, 3)):
        model = build("llama", depths, alive=True, attn_implementation="eager")
        output = model.model(input_ids=random_ids(model, 2, 6), output_hidden_states=True, output_attentions=True)
        assert (len(output.hidden_states), len(output.image_hidden_states)) == (6, 5)
        assert (len(output.attentions), len(output.image_attentions)) == depths
        assert len(output.cross_attentions) == len(output.image_cross_attentions) == 2
        alone = [output.hidden_states[depth + 1] is output.hidden_states[depth] for depth in range(5)]
        assert alone == ([True, False, True, False, False] if depths == (3, 5) else [False] * 5)
        picked = model.model(input_ids=random_ids(model, 2, 6), output_hidden_states=[-1]).hidden_states
        assert [states is not None for states in picked] == [False] * 5 + [True]
        assert torch.equal(picked[-1], output.hidden_states[-1])


def test_gradient_checkpointing_changes_no_gradient():
    for depths in PAIRS:
        model = build("llama", depths, alive=True).train()
        ids = random_ids(model, 2, 8)
        gradients = []
        for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            model.zero_grad()
            if settings is not None:
                model.activation_checkpointing_enable(settings)
                if settings["use_reentrant"]:
                    model.enable_input_require_grads()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        wanted = {n for n, _ in model.named_parameters() if "vq_model" not in n}
        for found in gradients:
            assert set(found) == wanted
            for name in wanted:
                torch.testing.assert_close(found[name], gradients[0][name], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_depths_may_lie_on_disk(tmp_path):
    model = build("llama", (3, 5), alive=True)
    model.save_pretrained(tmp_path / "model")
    parts = {name: "cpu" for name, _ in model.model.language_model.named_children() if name != "layers"}
    device_map = {f"model.language_model.{name}": device for name, device in parts.items()}
    device_map |= {f"model.language_model.layers.{depth}": "disk" if depth in (0, 1) else "cpu" for depth in range(5)}
    device_map |= {"model.vq_model": "cpu", "lm_head": "cpu", "image_head": "cpu"}
    spread = JamForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    ).eval()
    assert spread.model.language_model.layers[0].image_layer.mlp.up_proj.weight.device.type == "meta"
    inputs = inputs_of(model)
    assert torch.equal(spread(**inputs).logits, model(**inputs).logits)


def test_generation_agrees_cached_and_not():
    for depths in PAIRS:
        model = build("llama", depths, alive=True)
        ids = random_ids(model, 2, 6)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        alone = model.generate(input_ids=ids, use_cache=False, **settings)
        for cache in (None, "static"):
            assert torch.equal(model.generate(input_ids=ids, cache_implementation=cache, **settings), alone)
