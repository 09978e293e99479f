"""Streams of unequal depth, and an MLP as image head, spread over processes and devices: as one process computes.

The checks themselves are those of test_tensor_parallel.py, test_fsdp.py and test_device_maps.py.
"""

import copy
from typing import Any

import numpy as np
import processes
import pytest
import test_device_maps
import test_fsdp
import test_tensor_parallel
import torch
from conftest import VQ_SETTINGS, parent_model, random_ids, randomise

from jam_hf import JamConfig, JamForCausalLM


# name -> fusion mode, cross form, layers of the streams, hidden size of the image head
CASES: dict[str, tuple[str, str, tuple[int, ...], int | None]] = {
    "uniform, head": ("uniform", "preserving", (3,), 24),
    "text shallower": ("cross", "preserving", (2, 5), None),
    "image shallower, head": ("cross", "preserving", (4, 3), 24),
    "paper, image shallower, head": ("cross", "paper", (4, 3), 24),
}


def build(case: str, vocabulary: int = 301) -> JamForCausalLM:
    mode, form, depths, size = CASES[case]
    streams = [parent_model("llama", vocabulary, 1, num_hidden_layers=depth).config for depth in depths]
    torch.manual_seed(0)
    model = JamForCausalLM(
        JamConfig(
            fusion_mode=mode,
            cross_form=form,
            text_config=streams[0],
            image_config=streams[1] if mode == "cross" else None,
            vq_config=copy.deepcopy(VQ_SETTINGS),
            image_head_hidden_size=size,
        )
    )
    randomise(model, seed=5, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Folder of each case, and what two tensor-parallel processes compute."""
    root = tmp_path_factory.mktemp("split")
    folders = {case: str(root / case) for case in CASES}
    for case, folder in folders.items():
        build(case).save_pretrained(folder)
    return folders, processes.run(test_tensor_parallel.worker, 2, folders)[0]


@pytest.mark.parametrize("case", CASES)
def test_two_tensor_parallel_processes_compute_what_one_does(case, split):
    folders, parallel = split
    found: Any = parallel[case]
    assert not isinstance(found, str), found
    model = JamForCausalLM.from_pretrained(folders[case]).eval()
    alone = test_tensor_parallel.compute(model, picture=False)
    np.testing.assert_allclose(found["logits"], alone["logits"], rtol=1e-4, atol=1e-4)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert set(found["gradients"]) == set(alone["gradients"])
    for name, gradient in alone["gradients"].items():
        scale = max(1e-3, float(np.abs(gradient).max()))
        np.testing.assert_allclose(found["gradients"][name], gradient, rtol=1e-3, atol=1e-4 * scale, err_msg=name)
    for name in ("written-None", "written-static"):
        np.testing.assert_array_equal(found[name], alone[name])
    for name, parameter in model.named_parameters():
        if ".self_attn." in name or "vision_head" in name:
            assert found["local"][name] == parameter.numel() // 2, name
    saved = JamForCausalLM.from_pretrained(f"{folders[case]}-saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def fsdp_worker(root: str) -> dict[str, Any]:
    return {case: test_fsdp.native_worker(f"{root}/{case}", "sharded") for case in CASES}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Folder of all cases, and what two FSDP2 processes report."""
    root = tmp_path_factory.mktemp("sharded")
    for case in CASES:
        build(case, vocabulary=300).save_pretrained(root / case / "start")
    return root, processes.run(fsdp_worker, 2, str(root))[0]


@pytest.mark.parametrize("case", CASES)
def test_two_fsdp_processes_learn_what_one_does(case, sharded):
    root, parallel = sharded
    model = JamForCausalLM.from_pretrained(root / case / "start").train()
    losses = test_fsdp.train(model, test_fsdp.documents(model), torch.Tensor.backward, test_fsdp.optimizer_of(model))
    assert parallel[case]["losses"] == pytest.approx(losses, rel=1e-4)
    units = [f"model.language_model.layers.{depth}" for depth in range(model.config.num_hidden_layers)]
    assert [unit for unit in parallel[case]["units"] if ".layers." in unit] == units
    test_fsdp.check_checkpoint(root / case / "sharded", model.eval())


@pytest.mark.parametrize("case", CASES)
def test_states_hop_once_for_each_border(case):
    """A depth without a layer of one stream passes its states on, and costs no journey of its own."""
    model = build(case)
    model.set_attn_implementation("eager")
    device_map = test_device_maps.infer(model, 3)
    for depth, layer in enumerate(model.model.language_model.layers):
        names = [f"model.language_model.layers.{depth}.{name}" for name, _ in layer.named_parameters()]
        assert len({test_device_maps.device_of(name, device_map) for name in names}) == 1
    borders = [(f"cpu:{device}", f"cpu:{device + 1}") for device in range(len(set(device_map.values())) - 1)]
    assert borders
    moves = test_device_maps.count_moves(model, device_map)
    streams = 2 if model.config.fusion_mode == "cross" else 1
    assert moves[: streams * len(borders)] == [border for border in borders for _ in range(streams)]


@pytest.mark.parametrize("method", ["torchao", "8bit"])
@torch.no_grad()
def test_quantisers_take_an_mlp_unless_their_skip_list_names_it(method, tmp_path):
    """As they do in a stock Janus; a linear image head they leave by themselves, since it is the model's last
    module.
    """
    test_quantisation = pytest.importorskip("test_quantisation")
    model = build("uniform, head")
    model.save_pretrained(tmp_path)
    head = {"image_head.proj_out", "image_head.vision_head"}
    ids = random_ids(model, 2, 8)
    exact = model(input_ids=ids).logits
    for skip, expected in ((None, head), (["lm_head", "image_head"], set())):
        loaded = test_quantisation.load(tmp_path, method, skip=skip)
        found = test_quantisation.quantised(loaded)
        assert {name for name in found if "head" in name} == expected and len(found) > 2
        assert test_quantisation._distance(loaded(input_ids=ids).logits, exact, exact) < 0.05


def test_adapters_train_the_head_whole_or_not_at_all():
    peft = pytest.importorskip("peft")
    from jam_hf.training.adapters import lora_config

    for whole in ([], ["image_head"]):
        model = build("image shallower, head")
        settings = {"r": 4, "modules_to_save": whole} if whole else {"r": 4}
        adapted = peft.get_peft_model(model, lora_config(model, "image_stream", **settings)).train()
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert any("image_layer" in name for name in trained) and not any("text_layer" in name for name in trained)
        assert len([name for name in trained if "image_head" in name]) == (4 if whole else 0)
        ids = random_ids(model, 2, 8)
        adapted(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for name, p in adapted.named_parameters() if name in trained)
