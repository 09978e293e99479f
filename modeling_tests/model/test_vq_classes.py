"""JamVQModel around transformers' Janus and Emu3 classes: what holds for diffusers' holds for them.

That their codes and pixels are the original classes' is in modeling_tests/conversion/test_convert_vq.py.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
import sysconfig

import processes
import pytest
import torch
from conftest import VQ_SETTINGS
from torch import nn
from transformers import AutoModel, Emu3VQVAEConfig, JanusVQVAEConfig
from transformers.integrations import accelerate as device_maps

from jam_hf import JamConfig, JamForCausalLM, JamVQConfig, JamVQModel
from jam_hf.model.modeling_jam_vq import JamVQLinear
from jam_hf.model.modeling_jam_vq_classes import VQ_CLASSES
from jam_hf.training.vq import train_vq


SHAPE = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "embed_dim": 4, "latent_channels": 4}
TEXT = {"model_type": "llama", "vocab_size": 301, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def janus(**changes) -> JanusVQVAEConfig:
    return JanusVQVAEConfig(**{**SHAPE, "num_embeddings": 64, "num_patches": 4, **changes})


def emu3(**changes) -> Emu3VQVAEConfig:
    return Emu3VQVAEConfig(**{**SHAPE, "codebook_size": 64, "hidden_size": 64, "attn_resolutions": [1], **changes})


def vq_config(name: str) -> JamVQConfig:
    if name == "janus":
        return JamVQConfig(vqvae_config=janus(), codebook_l2_norm=True)
    return JamVQConfig(vqvae_config=emu3(), sample_size=8)


def enliven(vq: JamVQModel) -> JamVQModel:
    """Running statistics that are not the defaults, and a codebook that lies where the latents are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in vq.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
        latents = VQ_CLASSES[vq.config.vq_class].latents(vq.eval().vq, pictures()).transpose(0, 1).flatten(1)
        codebook = vq.vq.quantize.embedding.weight.normal_(generator=generator)
        codebook.mul_(latents.std(1)).add_(latents.mean(1))
    return vq


def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def a_jam(name: str) -> JamForCausalLM:
    torch.manual_seed(0)
    model = JamForCausalLM(JamConfig(text_config={**TEXT, "num_hidden_layers": 2}, vq_config=vq_config(name))).eval()
    enliven(model.model.vq_model)
    return model


@pytest.fixture(scope="module", params=["janus", "emu3"])
def jam(request) -> JamForCausalLM:
    return a_jam(request.param)


def test_the_config_reads_what_the_inner_config_says(jam, tmp_path):
    config = jam.config.vq_config
    assert (config.num_vq_embeddings, config.sample_size, config.grid_size, config.image_seq_length) == (64, 8, 4, 16)
    assert (config.downsampling_factor, config.in_channels, config.vq_embed_dim) == (2, 3, 4)
    jam.config.save_pretrained(tmp_path)
    again = JamConfig.from_pretrained(tmp_path).vq_config
    assert again.to_dict() == config.to_dict() and again.vq_class == config.vq_class
    assert type(again.vqvae_config) is type(config.vqvae_config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vqvae_config": {**SHAPE}}, "must say its `model_type`, one of janus_vqgan, emu3_vqgan"),
        ({"vqvae_config": {"model_type": "llama"}}, "is a 'llama'; supported: 'janus_vqgan', 'emu3_vqgan'"),
        ({"vqvae_config": janus(double_latent=True)}, "`double_latent` must be False"),
        ({"vqvae_config": janus(), "has_decoder": False}, "`has_decoder` True"),
        ({"vqvae_config": janus(), "num_vq_embeddings": 32}, "`num_vq_embeddings` is 32, but `vqvae_config` says 64"),
        ({"vqvae_config": janus(), "block_out_channels": (32, 96)}, r"says \[32, 64\]"),
        ({"vqvae_config": janus(), "sample_size": 16}, "num_patches` 4 means 8 pixels"),
        ({"vqvae_config": emu3()}, "say which: sample_size="),
        ({"vqvae_config": emu3(), "sample_size": 9}, "multiple of the downsampling factor 2"),
        ({"vqvae_config": emu3(temporal_downsample_factor=3), "sample_size": 8}, "power of two, got 3"),
        ({"vqvae_config": emu3(), "sample_size": 8, "codebook_l2_norm": True}, "is for a Janus `vqvae_config`"),
        ({"codebook_l2_norm": True}, "is for a Janus `vqvae_config`"),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        JamVQConfig(**settings)


def test_diffusers_defaults_are_as_before():
    config = JamVQConfig()
    assert config.vq_class == "diffusers" and config.sample_size == 256 and config.grid_size == 32
    older = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("has_decoder", "vqvae_config", "codebook_l2_norm")
    }
    assert JamVQConfig.from_dict(older).to_dict() == config.to_dict()


def test_it_stays_as_it_is_in_training_in_half_precision_and_under_autocast(jam):
    vq = copy.deepcopy(jam.model.vq_model)
    codes, pixels = vq.encode(pictures()), vq.decode(vq.encode(pictures()))
    assert codes.unique().numel() > 4 and pixels.std() > 0.01
    state = {key: tensor.clone() for key, tensor in vq.state_dict().items()}
    vq.train()  # batch norms would count, and dropout would drop
    assert vq.training and not any(module.training for module in vq.vq.modules())
    vq.to(torch.bfloat16).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.encode(pictures()), codes)
        assert torch.equal(vq.decode(codes), pixels)
    assert all(
        torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype for key, tensor in vq.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in vq.parameters())


def test_linear_layers_are_hidden_from_adapters(jam):
    kinds = [type(module) for module in jam.model.vq_model.modules()]
    assert not [kind for kind in kinds if issubclass(kind, nn.Linear)]
    # Emu3: the middle of both halves, and the blocks of the last level (1 + 2)
    assert kinds.count(JamVQLinear) == (20 if jam.config.vq_config.vq_class == "emu3" else 0)


def test_the_decoders_attention_is_not_its_own(jam):
    model, vq = copy.deepcopy(jam), jam.model.vq_model
    codes = vq.encode(pictures())
    for implementation in ("eager", "flex_attention", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config.text_config._attn_implementation == implementation
        assert model.model.vq_model.vq.config._attn_implementation == "sdpa"
        assert torch.equal(model.model.vq_model.encode(pictures()), codes)


def test_saving_and_loading_in_a_jam_and_alone(jam, tmp_path):
    vq = jam.model.vq_model
    codes = vq.encode(pictures())
    jam.save_pretrained(tmp_path / "jam")
    lower = JamForCausalLM.from_pretrained(tmp_path / "jam", dtype=torch.bfloat16)
    assert lower.lm_head.weight.dtype == torch.bfloat16
    for key, tensor in lower.model.vq_model.state_dict().items():
        assert torch.equal(tensor, vq.state_dict()[key]) and tensor.dtype != torch.bfloat16
    assert torch.equal(lower.model.vq_model.encode(pictures()), codes)
    vq.save_pretrained(tmp_path / "vq")
    alone = AutoModel.from_pretrained(tmp_path / "vq")
    assert type(alone) is JamVQModel and torch.equal(alone.encode(pictures()), codes)
    assert torch.equal(pickle.loads(pickle.dumps(alone)).encode(pictures()), codes)


@torch.no_grad()
def test_offloaded_to_disk_it_is_the_same(jam, tmp_path):
    jam.save_pretrained(tmp_path / "jam")
    budget = {"cpu": int(0.3 * device_maps.compute_module_sizes(jam)[0][""])}
    spread = JamForCausalLM.from_pretrained(
        tmp_path / "jam", device_map="auto", max_memory=budget, offload_folder=tmp_path / "offload"
    ).eval()
    vq, spread_vq = jam.model.vq_model, spread.model.vq_model
    assert {parameter.device.type for parameter in spread_vq.parameters()} == {"meta"}
    assert torch.equal(spread_vq.encode(pictures()), vq.encode(pictures()))
    assert torch.equal(spread_vq.decode(vq.encode(pictures())), vq.decode(vq.encode(pictures())))


def test_meta_device_and_missing_weights(jam, tmp_path):
    """Where a checkpoint lacks weights, they are drawn, not left as memory was."""
    with torch.device("meta"):
        assert {p.device.type for p in JamVQModel(jam.config.vq_config).parameters()} == {"meta"}
    torch.manual_seed(0)
    vq = JamVQModel(jam.config.vq_config)
    one = "vq.encoder.conv_in.bias"
    vq.save_pretrained(tmp_path, state_dict={one: vq.state_dict()[one]})
    drawn = JamVQModel.from_pretrained(tmp_path).state_dict()
    assert torch.equal(drawn[one], vq.state_dict()[one])
    for key, tensor in vq.state_dict().items():
        if tensor.numel() > 500:
            assert 0.8 < drawn[key].std() / tensor.std() < 1.25, key
        elif "norm" in key and tensor.dim() == 1 and key.endswith(("weight", "running_var")):
            assert (drawn[key] == 1).all(), key


def test_a_tokenizer_without_decoder_cannot_decode(tmp_path):
    vq = JamVQModel(JamVQConfig(**VQ_SETTINGS, has_decoder=False))
    assert not [key for key in vq.state_dict() if "decoder" in key or "post_quant" in key]
    pixels = torch.zeros(1, 3, 16, 16)
    vq.save_pretrained(tmp_path)
    again = JamVQModel.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pixels), vq.encode(pixels))
    for call in (lambda: again.decode(vq.encode(pixels)), lambda: again(pixels)):
        with pytest.raises(ValueError, match="not decode codes.*vqgan.ckpt"):
            call()
    with pytest.raises(ValueError, match="encoder and decoder"):
        train_vq(vq, [])


def test_only_diffusers_models_are_trained(jam):
    with pytest.raises(ValueError, match="expected a VQ model of diffusers"):
        train_vq(jam.model.vq_model, [])


CHILD = """
import json, sys
folders, sites = json.loads(sys.argv[1])
sys.path.extend(sites)
import importlib.util
assert importlib.util.find_spec("jam_hf") is None
import torch
from transformers import AutoModel
pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    print(json.dumps([type(model).__module__.split(".")[0], model.encode(pixels).tolist()]))
"""


@pytest.mark.slow
def test_remote_code_without_jam_hf(tmp_path):
    expected = []
    for name in ("janus", "emu3"):
        vq = enliven(JamVQModel(vq_config(name)))
        vq.save_pretrained(tmp_path / name)
        expected.append(["transformers_modules", vq.encode(pictures()).tolist()])
    folders = [str(tmp_path / "janus"), str(tmp_path / "emu3")]
    sites = sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD, json.dumps([folders, sites])],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=processes.PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == expected
