"""Device maps and offloading: a depth stays together, hidden states hop no more than in a plain stack, numbers stay
equal.

Several devices are played on one machine: tensors without data that remember a device, under accelerate's own hooks. An
operation on tensors of two devices raises there as it would on accelerators, and each copy from device to device is
counted.
"""

import copy
from unittest import mock

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from conftest import VQ_SETTINGS, parent_model, random_ids, randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel
from transformers.integrations import accelerate as device_maps

from jam_hf import JamConfig, JamForCausalLM


SECTION = "Sharding"
LENGTH = 7
MODES = (("uniform", "preserving"), ("width", "preserving"), ("cross", "preserving"), ("cross", "paper"))


def build(family: str, mode: str, form: str, depth: int = 8) -> JamForCausalLM:
    vq_settings = copy.deepcopy(VQ_SETTINGS) | {"sample_size": 8}  # pictures of four codes
    parent = parent_model(family, 301, 1, num_hidden_layers=depth).config
    config = JamConfig(fusion_mode=mode, cross_form=form, text_config=parent, vq_config=vq_settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return JamForCausalLM(config).eval()


def infer(model: nn.Module, devices: int) -> dict[str, int]:
    """The map that `device_map="auto"` finds on so many devices, balanced between them."""
    memory = dict.fromkeys(range(devices), 10**9)
    with mock.patch.object(
        device_maps, "get_max_memory", lambda max_memory: dict(max_memory)
    ):  # there is no such device
        return device_maps._get_device_map(model, "auto", memory, None)


def device_of(name: str, device_map: dict[str, int]) -> int:
    (found,) = (device for part, device in device_map.items() if f"{name}.".startswith(f"{part}."))
    return found


class CountMoves(TorchDispatchMode):
    """Counts how often states `[1, LENGTH, more than a head]` are copied from device to device."""

    def __init__(self):
        super().__init__()
        self.moves: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dim() == 3 and args[0].shape[1] == LENGTH:
            if args[0].device != result.device and args[0].shape[2] in (32, 64):
                self.moves.append((str(args[0].device), str(result.device)))
        return result


def count_moves(model: nn.Module, device_map: dict[str, int]) -> list[tuple[str, str]]:
    """The copies of states between devices in one forward of a model that is spread by the map."""
    places = {part: torch.device(f"cpu:{device}") for part, device in device_map.items()}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for name, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        place = torch.device(f"cpu:{device_of(f'{name}.{key}', device_map)}")
                        empty = torch.empty(tensor.shape, device=place)
                        tensors[key] = nn.Parameter(empty) if tensors is module._parameters else empty
        attach_align_device_hook_on_blocks(
            model,
            execution_device=places | {"": torch.device("cpu:0")},
            offload=dict.fromkeys(places, False),
            skip_keys=model._skip_keys_device_placement,
        )
        ids = torch.zeros(1, LENGTH, dtype=torch.int64, device="cpu:0")
        with CountMoves() as counter:
            model(input_ids=ids, use_cache=False)
    return counter.moves


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "`device_map='auto'` keeps each depth on one device")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("mode", "form"), MODES)
def test_a_device_map_splits_no_depth(mode, form, family):
    model = build(family, mode, form)
    for devices in (2, 3, 5):
        device_map = infer(model, devices)
        assert len(set(device_map.values())) >= min(devices, 3)
        places = []
        for depth in range(model.config.num_hidden_layers):
            names = [n for n, _ in model.named_parameters() if n.startswith(f"model.language_model.layers.{depth}.")]
            (place,) = {device_of(name, device_map) for name in names}
            places.append(place)
        assert places == sorted(places)  # never back
        assert len({device_of(n, device_map) for n, _ in model.model.vq_model.named_parameters("model.vq_model")}) == 1
        assert device_of("model.language_model.embed_tokens", device_map) == 0


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "hidden states hop between devices as often as in a plain stack")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("mode", "form"), MODES)
def test_states_hop_as_often_as_in_the_stock_decoder(mode, form, family):
    """Each stream of a cross JAM makes the journey that the states of one stock decoder make."""
    for devices in (2, 4):
        stock = parent_model(
            family, 301, 1, num_hidden_layers=8, tie_word_embeddings=False, attn_implementation="eager"
        )
        stock_moves = count_moves(stock, infer(stock, devices))
        model = build(family, mode, form)
        device_map = infer(model, devices)
        pieces = len(set(device_map.values()))
        moves = count_moves(model, device_map)
        if mode != "cross":
            assert pieces - 1 <= len(moves) <= len(stock_moves)
            continue
        there = [(f"cpu:{device}", f"cpu:{device + 1}") for device in range(pieces - 1)]
        assert moves[: 2 * len(there)] == [move for move in there for _ in range(2)]
        behind = moves[2 * len(there) :]
        if family == "llama":
            assert not behind
        else:  # as in stock OPT, the final norm stands before the layers: back to it, and forth to a head at the end
            last = f"cpu:{pieces - 1}"
            back_and_forth = [(last, "cpu:0"), ("cpu:0", last)]
            assert stock_moves[-2:] == [(stock_moves[-2][0], "cpu:0"), ("cpu:0", stock_moves[-2][0])]
            assert behind == (
                back_and_forth[:1] if form == "paper" else [move for move in back_and_forth for _ in range(2)]
            )


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "a device map written by hand")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("mode", "form"), MODES)
def test_every_part_may_stand_on_a_device_of_its_own(mode, form, family):
    model = build(family, mode, form, depth=2)
    parts = [
        f"model.language_model.{name}" for name, _ in model.model.language_model.named_children() if name != "layers"
    ]
    parts += [f"model.language_model.layers.{depth}" for depth in range(2)]
    parts += ["model.vq_model"] + [name for name, _ in model.named_children() if name != "model"]
    moves = count_moves(model, {part: device for device, part in enumerate(parts)})
    assert len(moves) >= 3  # and no operation had tensors of two devices


def test_nested_decoders_would_hop_at_cross_blocks():
    """What one module for each depth is for: two decoders side by side are cut where both streams must meet."""
    jam = build("llama", "cross", "preserving")
    cross = {name: module for name, module in jam.named_modules() if name.endswith("_cross")}
    nested = nn.Module()
    nested.text_model, nested.image_model = (
        LlamaModel(LlamaConfig(**jam.config.text_config.to_dict())) for _ in range(2)
    )
    nested.cross_blocks = nn.ModuleList(cross.values())
    nested._no_split_modules, nested.all_tied_weights_keys = {"LlamaDecoderLayer", "JamCrossBlock"}, {}
    for devices in (2, 4):
        device_map = infer(nested, devices)
        apart = [
            depth
            for depth in jam.config.cross_attention_layers
            if device_of(f"text_model.layers.{depth}", device_map)
            != device_of(f"image_model.layers.{depth}", device_map)
        ]
        # At each of them both streams travel there and back: 8 and 16 copies, where a JAM needs 2 and 4.
        assert len(apart) == {2: 2, 4: 4}[devices]


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """`offloaded(mode, form, family)` -> a model, and the same checkpoint with most of it on disk."""

    def make(mode: str, form: str, family: str) -> tuple[JamForCausalLM, JamForCausalLM]:
        folder = tmp_path_factory.mktemp("offload")
        model = build(family, mode, form, depth=3)
        randomise(model, seed=4)
        with torch.no_grad():  # codes far apart, so that pictures have many
            model.model.vq_model.vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.tie_weights()
        model.save_pretrained(folder / "jam")
        budget = {"cpu": int(0.8 * device_maps.compute_module_sizes(model)[0][""])}
        spread = JamForCausalLM.from_pretrained(
            folder / "jam", device_map="auto", max_memory=budget, offload_folder=folder / "offload"
        ).eval()
        return JamForCausalLM.from_pretrained(folder / "jam").eval(), spread

    return make


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.feature(SECTION, "CPU and disk offload: equal logits, generation with pictures, saving")
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("mode", "form"), MODES)
@torch.no_grad()
def test_an_offloaded_model_is_the_same_model(mode, form, family, offloaded, tmp_path):
    model, spread = offloaded(mode, form, family)
    places = spread.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert device_of("model.vq_model", places) == "disk"
    assert next(spread.model.vq_model.parameters()).device.type == "meta"

    length = model.config.image_seq_length
    ids = random_ids(model, 2, length + 5)
    ids[ids == model.config.image_token_id] = 20
    ids[:, 3 : 3 + length] = model.config.image_token_id
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = model.get_image_tokens(pixels)
    assert codes.unique().numel() >= 2
    assert torch.equal(spread.get_image_tokens(pixels), codes)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    assert torch.equal(spread(**inputs).logits, model(**inputs).logits)

    if family == "llama":
        settings = {"do_sample": False, "generation_mode": "image"}
        expected, written = (m.generate(**inputs, **settings) for m in (model, spread))
        assert torch.equal(written, expected)
        pictures = expected[:, ids.shape[1] + 1 : ids.shape[1] + 1 + length]
        assert torch.equal(spread.decode_image_tokens(pictures), model.decode_image_tokens(pictures))

    spread.save_pretrained(tmp_path / "saved")
    saved = JamForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[name], tensor), name
