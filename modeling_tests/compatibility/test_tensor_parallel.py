"""Tensor parallelism, `tp_plan="auto"`: two processes compute what one does, which is the oracle."""

import copy
import traceback
from typing import Any

import numpy as np
import processes
import pytest
import torch
from conftest import NUM_CODES, VQ_SETTINGS, parent_model, random_ids, randomise
from nightly import every_day
from transformers import AutoConfig
from transformers.distributed.configuration_utils import DistributedConfig

from jam_hf import JamConfig, JamForCausalLM


SECTION = "Sharding"
# name -> (mode, cross form, families of the streams, changes to each stream's config)
CASES: dict[str, tuple[str, str, tuple[str, ...], tuple[dict[str, Any], ...]]] = {}
for family in ("llama", "llama-tied", "opt", "opt-paper", "opt-projected"):
    CASES[f"uniform-{family}"] = ("uniform", "preserving", (family,), ({},))
WIDE = {"hidden_size": 64, "num_attention_heads": 8}
CASES["width-llama"] = ("width", "preserving", ("llama",), (WIDE | {"num_key_value_heads": 4},))
CASES["width-opt"] = ("width", "preserving", ("opt",), (WIDE | {"word_embed_proj_dim": 64},))
for form, families in (("preserving", ("llama", "opt", "opt-projected")), ("paper", ("llama-tied", "opt-paper"))):
    for family in families:
        CASES[f"cross-{form}-{family}"] = ("cross", form, (family, family), ({}, {}))
UNEQUAL = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
CASES["cross-unequal-heads"] = ("cross", "preserving", ("llama", "llama"), ({}, UNEQUAL))
CASES["cross-two-families"] = ("cross", "preserving", ("llama", "opt"), ({}, {}))
# Three key/value heads in one stream cannot be shared out between two processes.
INDIVISIBLE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
CASES["uniform-indivisible"] = ("uniform", "preserving", ("llama",), (INDIVISIBLE,))
CASES["cross-indivisible"] = ("cross", "preserving", ("llama", "llama"), ({}, INDIVISIBLE))
# Families whose stock plans have norms on heads, windows or biases, or which have no stock plan.
WINDOW = {"sliding_window": 6}
LAYERWISE = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
CASES["uniform-qwen3"] = ("uniform", "preserving", ("qwen3",), ({"head_dim": 16, **LAYERWISE},))
CASES["uniform-qwen3-indivisible"] = ("uniform", "preserving", ("qwen3",), ({"head_dim": 16, **INDIVISIBLE},))
CASES["uniform-emu3"] = ("uniform", "preserving", ("emu3_text_model",), ({},))
CASES["cross-qwen2-qwen3"] = ("cross", "preserving", ("qwen2", "qwen3"), (LAYERWISE, {"head_dim": 16}))
CASES["cross-mistral-emu3"] = ("cross", "preserving", ("mistral", "emu3_text_model"), (WINDOW, UNEQUAL))
CASES["cross-qwen3-chameleon"] = ("cross", "preserving", ("qwen3", "chameleon"), ({"head_dim": 16}, UNEQUAL))
DAILY = ("uniform-llama", "uniform-qwen3", "width-opt", "cross-preserving-llama", "cross-preserving-opt-projected")
DAILY += (
    "cross-paper-llama-tied",
    "cross-unequal-heads",
    "cross-indivisible",
    "cross-qwen3-chameleon",
)  # others: nightly
DRAWN = ("uniform-llama", "width-opt", "cross-preserving-llama")


def config_of(family: str, change: dict[str, Any]) -> Any:
    if family.startswith(("llama", "opt")):
        return parent_model(family, 301, 1, **change).config
    settings = {"vocab_size": 301, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}
    return AutoConfig.for_model(family, **{**settings, "bos_token_id": 1, "eos_token_id": 2, **change})


def build(case: str) -> JamForCausalLM:
    mode, form, families, changes = CASES[case]
    configs = [config_of(family, change) for family, change in zip(families, changes)]
    config = JamConfig(
        fusion_mode=mode,
        cross_form=form,
        text_config=configs[0],
        image_config=configs[1] if mode == "cross" else None,
        vq_config=copy.deepcopy(VQ_SETTINGS),
    )
    torch.manual_seed(0)
    model = JamForCausalLM(config)
    randomise(model, seed=5)
    model.tie_weights()
    return model.eval()


def inputs_of(model: JamForCausalLM) -> dict[str, torch.Tensor]:
    """Two rows, the second padded on the left, each with a picture."""
    length = model.config.image_seq_length
    ids = random_ids(model, 2, length + 6)
    ids[ids == model.config.image_token_id] = 20
    ids[:, 4 : 4 + length] = model.config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def compute(model: JamForCausalLM, picture: bool) -> dict[str, Any]:
    """Logits, loss, gradients and what is written, as arrays, of a model that may be spread over processes."""

    def whole(tensor: torch.Tensor) -> np.ndarray:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy()

    inputs = inputs_of(model)
    with torch.no_grad():
        found = {"logits": model(**inputs).logits.numpy()}
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    found["loss"] = output.loss.item()
    found["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}
    for cache in (None, "static"):
        found[f"written-{cache}"] = model.generate(**inputs, cache_implementation=cache, **settings).numpy()
    if picture:
        settings["max_new_tokens"] = model.config.image_seq_length + 2
        found["written-picture"] = model.generate(
            **inputs, generation_mode="image", guidance_scale=2.0, **settings
        ).numpy()
    return found


def worker(folders: dict[str, str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, folder in folders.items():
        try:
            model = JamForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
            results[case] = compute(model, case in DRAWN)
            local = {
                n: p.to_local().numel() if hasattr(p, "to_local") else p.numel() for n, p in model.named_parameters()
            }
            results[case]["local"] = local
            model.save_pretrained(f"{folder}-saved")
        except Exception:
            results[case] = traceback.format_exc()
    return results if torch.distributed.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def both(tmp_path_factory, pytestconfig):
    """`both(case)` -> folder, what one process computes, what two compute. All cases run in one start of the
    processes.
    """
    root = tmp_path_factory.mktemp("tensor-parallel")
    cases = CASES if pytestconfig.getoption("--nightly") else DAILY
    for case in cases:
        build(case).save_pretrained(root / case)
    parallel = processes.run(worker, 2, {case: str(root / case) for case in cases})[0]

    def get(case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        if isinstance(parallel[case], str):
            pytest.fail(parallel[case])
        return root / case, compute(JamForCausalLM.from_pretrained(root / case).eval(), case in DRAWN), parallel[case]

    return get


def _cases(mode: str) -> list[str]:
    return [case for case in CASES if CASES[case][0] == mode and "indivisible" not in case]


ALL = [(CASES[case][0], case) for mode in ("uniform", "width", "cross") for case in _cases(mode)]
ALL += [(CASES[case][0], case) for case in CASES if "indivisible" in case]


@pytest.mark.feature(SECTION, "tensor parallelism (`tp_plan='auto'`): logits, gradients, generation, saving")
@pytest.mark.parametrize(("mode", "case"), every_day(ALL, *[(CASES[case][0], case) for case in DAILY]))
def test_two_processes_compute_what_one_does(mode, case, both):
    folder, alone, parallel = both(case)
    np.testing.assert_allclose(parallel["logits"], alone["logits"], rtol=1e-4, atol=1e-4)
    assert parallel["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert set(parallel["gradients"]) == set(alone["gradients"])
    for name, gradient in alone["gradients"].items():
        scale = max(1e-3, float(np.abs(gradient).max()))
        np.testing.assert_allclose(parallel["gradients"][name], gradient, rtol=1e-3, atol=1e-4 * scale, err_msg=name)
    written = [name for name in alone if name.startswith("written")]
    for name in written:
        np.testing.assert_array_equal(parallel[name], alone[name], err_msg=name)
    if case in DRAWN:
        codes = parallel["written-picture"][:, -JamConfig.from_pretrained(folder).image_seq_length - 1 : -1]
        assert (codes >= 301 - NUM_CODES).all()
    saved = JamForCausalLM.from_pretrained(f"{folder}-saved").state_dict()
    for name, tensor in JamForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize(("case",), every_day([(case,) for _, case in ALL], *[(case,) for case in DAILY]))
def test_every_large_matrix_is_split(case, both):
    """Half of every matrix of layers, cross blocks, embeddings and heads stands in each process; the VQ model is
    whole.
    """
    folder, _, parallel = both(case)
    whole_parts = ("vq_model", "norm", "embed_positions", "project_in", "project_out")
    for name, parameter in JamForCausalLM.from_pretrained(folder).named_parameters():
        share = parallel["local"][name] / parameter.numel()
        if any(part in name for part in whole_parts) or name.endswith(("o_proj.bias", "out_proj.bias", "fc2.bias")):
            assert share == 1.0, name
        else:
            assert 0.45 <= share <= 0.55, name


def test_a_plan_names_nothing_that_the_model_has_not():
    for case in CASES:
        model = build(case)
        names = {
            ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()
        }
        assert set(model.tp_plan) <= names
        assert set(model.fsdp_plan) <= names
        assert "lm_head" in model.tp_plan
        assert not model.supports_pp_plan


def test_pipeline_parallelism_is_refused():
    model = build("uniform-llama")
    with pytest.raises(ValueError, match="no pipeline parallel plan.*device_map"):
        type(model).maybe_distribute_model(model, DistributedConfig(pp_size=2), None)
