"""convert_vq against the original classes: equal codes, pixels within 1e-5, on random weights and random pictures.

transformers' Chameleon, Janus and Emu3 are their own oracles. taming's encoder is transformers' ChameleonVQVAE, its
decoder transformers' JanusVQVAEDecoder with the levels counted the other way and attention put where a checkpoint has
it; where the package taming-transformers-rom1504 is installed, its own classes are asked too.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CODES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock, JanusVQVAEDecoder

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor, JamVQModel
from jam_hf.conversion.vq import convert_vq
from jam_hf.conversion.vq_tables import LLAMAGEN_TO_JANUS, rename, taming_to_diffusers
from jam_hf_cli import main


CODES, EMBED, SIZE = 64, 8, 16
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which signals keep their size, nothing is zero or one, and pictures have many codes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "quantize.embedding" in name:
                parameter.copy_(noise(parameter))
            elif parameter.dim() > 1:
                parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.1 * noise(buffer))
    return model.eval()


def pictures(size: int = SIZE, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def chameleon_config(**changes) -> ChameleonVQVAEConfig:
    settings = {
        "embed_dim": EMBED,
        "num_embeddings": CODES,
        "latent_channels": 16,
        "resolution": SIZE,
        "base_channels": 32,
    }
    settings |= {"channel_multiplier": [1, 2], "num_res_blocks": 1}
    return ChameleonVQVAEConfig(**{**settings, **changes})


def janus_config(**changes) -> JanusVQVAEConfig:
    settings = {
        "embed_dim": EMBED,
        "num_embeddings": CODES,
        "latent_channels": 16,
        "base_channels": 32,
        "num_patches": 8,
    }
    settings |= {"channel_multiplier": [1, 2], "num_res_blocks": 1, "image_token_embed_dim": 32, "projection_dim": 32}
    return JanusVQVAEConfig(**{**settings, **changes})


def emu3_config(**changes) -> Emu3VQVAEConfig:
    settings = {"codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 64}
    settings |= {"channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1]}
    return Emu3VQVAEConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def chameleon() -> ChameleonVQVAE:
    return enliven(ChameleonVQVAE(chameleon_config()))


@pytest.fixture(scope="module")
def janus() -> JanusVQVAE:
    return enliven(JanusVQVAE(janus_config()))


@pytest.fixture(scope="module")
def emu3() -> Emu3VQVAE:
    model = enliven(Emu3VQVAE(emu3_config()))
    seen = []
    hook = model.quantize.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(pictures(), [(SIZE, SIZE)] * 3)
    hook.remove()
    latents = seen[0].transpose(1, 2).flatten(2).transpose(1, 2).flatten(0, 1)  # they lie close together
    with torch.no_grad():
        codebook = model.quantize.embedding.weight
        codebook.copy_(latents.mean(0) + latents.std(0) * codebook)
    return model


# ----- taming ---------------------------------------------------------------------------------------------------------


class Taming(nn.Module):
    """taming's VQModel out of transformers' parts, under taming's names."""

    def __init__(self, channel_multiplier, num_res_blocks, attention):
        super().__init__()
        levels = len(channel_multiplier)
        shape = {"channel_multiplier": channel_multiplier, "num_res_blocks": num_res_blocks}
        resolutions = [SIZE // 2**level for level in attention]
        encoder = ChameleonVQVAE(chameleon_config(attn_resolutions=resolutions, **shape))
        self.encoder, self.quantize = encoder.encoder, encoder.quantize
        self.quant_conv, self.post_quant_conv = encoder.quant_conv, encoder.post_quant_conv
        self.decoder = JanusVQVAEDecoder(janus_config(**shape))
        for index, up in enumerate(self.decoder.up):
            level, channels = levels - 1 - index, up.block[0].conv2.weight.shape[0]
            blocks = num_res_blocks + 1 if level in attention else 0
            up.attn = nn.ModuleList(JanusVQVAEAttnBlock(channels) for _ in range(blocks))
        self.levels = levels

    def checkpoint(self) -> dict[str, torch.Tensor]:
        def other_way(key: str) -> str:
            head, *rest = key.split("decoder.up.")
            if not rest:
                return key
            index, tail = rest[0].split(".", 1)
            return f"{head}decoder.up.{self.levels - 1 - int(index)}.{tail}"

        return {other_way(key): tensor.clone() for key, tensor in self.state_dict().items()}

    @torch.no_grad()
    def encode(self, pixels):
        return self.quantize(self.quant_conv(self.encoder(pixels)))[2].view(len(pixels), -1)

    @torch.no_grad()
    def decode(self, codes):
        grid = SIZE // 2 ** (self.levels - 1)
        latents = self.quantize.embedding(codes).view(len(codes), grid, grid, EMBED).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))


SHAPES = (  # channels by level, blocks, levels with attention
    ([1, 2], 1, ()),
    ([1, 1, 2], 2, (2,)),
    ([1, 3, 2], 1, (0, 2)),
)


def assert_equal_to(original, converted: JamVQModel) -> None:
    pixels = pictures(converted.config.sample_size)
    codes = original.encode(pixels)
    assert codes.unique().numel() > 8
    assert torch.equal(converted.encode(pixels), codes)
    torch.testing.assert_close(converted.decode(codes), original.decode(codes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_taming(shape, tmp_path, capsys):
    original = enliven(Taming(*shape))
    checkpoint = original.checkpoint()
    save_file(checkpoint, tmp_path / "vqgan.safetensors")
    convert_vq(tmp_path / "vqgan.safetensors", tmp_path / "vq", sample_size=SIZE)
    converted = JamVQModel.from_pretrained(tmp_path / "vq")
    assert_equal_to(original, converted)
    assert converted.decode(converted.encode(pictures())).is_contiguous()  # attention did not turn the layout
    assert "encoder and decoder" in capsys.readouterr().out

    # As Lightning writes it, with what only training uses.
    training = {"loss.discriminator.main.0.weight": torch.ones(2), "quantize.embedding.cluster_size": torch.ones(CODES)}
    torch.save({"state_dict": checkpoint | training, "epoch": 3}, tmp_path / "vqgan.ckpt")
    convert_vq(tmp_path / "vqgan.ckpt", tmp_path / "old", sample_size=SIZE, allow_pickle=True)
    said = capsys.readouterr().out
    assert "2 tensors that only training uses are left out" in said and "'state_dict' of vqgan.ckpt" in said
    old = JamVQModel.from_pretrained(tmp_path / "old").state_dict()
    assert all(torch.equal(tensor, old[key]) for key, tensor in converted.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_taming_by_its_own_classes(shape, tmp_path):
    model = pytest.importorskip("taming.modules.diffusionmodules.model")
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    multiplier, blocks, attention = shape
    settings = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": multiplier,
        "num_res_blocks": blocks,
        "in_channels": 3,
        "resolution": SIZE,
    }
    settings |= {"attn_resolutions": [SIZE // 2**level for level in attention], "z_channels": 16, "double_z": False}
    original = nn.Module()
    original.encoder, original.decoder = model.Encoder(**settings), model.Decoder(**settings)
    original.quantize = quantize.VectorQuantizer2(CODES, EMBED, beta=0.25)
    original.quant_conv, original.post_quant_conv = nn.Conv2d(16, EMBED, 1), nn.Conv2d(EMBED, 16, 1)
    enliven(original)
    save_file(original.state_dict(), tmp_path / "vqgan.safetensors")
    convert_vq(tmp_path / "vqgan.safetensors", tmp_path / "vq", sample_size=SIZE)
    converted = JamVQModel.from_pretrained(tmp_path / "vq")

    pixels, grid = pictures(), converted.config.grid_size
    with torch.no_grad():
        quantised, _, (_, _, codes) = original.quantize(original.quant_conv(original.encoder(pixels)))
        expected = original.decoder(original.post_quant_conv(quantised))
    assert codes.unique().numel() > 8
    assert torch.equal(converted.encode(pixels), codes.view(len(pixels), grid * grid))
    torch.testing.assert_close(converted.decode(converted.encode(pixels)), expected, rtol=0, atol=1e-5)


def test_the_tables_are_undone_by_themselves():
    """A missing tensor is named by the parent's key, so each row must read backwards."""
    keys = list(Taming([1, 3, 2], 1, (0, 2)).checkpoint())
    renamed = [rename(key, taming_to_diffusers(3)) for key in keys]
    assert len(set(renamed)) == len(keys) and not set(renamed) & {
        key for key in keys if ".block" in key or ".mid" in key
    }
    assert [rename(key, taming_to_diffusers(3), back=True) for key in renamed] == keys
    keys = list(to_llamagen(JanusVQVAE(janus_config()).state_dict()))
    assert [rename(rename(key, LLAMAGEN_TO_JANUS), LLAMAGEN_TO_JANUS, back=True) for key in keys] == keys


# ----- transformers ---------------------------------------------------------------------------------------------------


def test_chameleon_alone_and_whole(chameleon, tmp_path, capsys):
    whole = ChameleonForConditionalGeneration(
        ChameleonConfig(**TEXT, vq_config=chameleon_config(), vocabulary_map={"<image>": 5})
    )
    whole.model.vqmodel.load_state_dict(chameleon.state_dict())
    chameleon.save_pretrained(tmp_path / "alone")
    whole.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    for name in ("alone", "whole"):
        convert_vq(tmp_path / name, tmp_path / f"vq-{name}")
        assert "encoder only" in capsys.readouterr().out
        converted = JamVQModel.from_pretrained(tmp_path / f"vq-{name}")
        assert converted.config.sample_size == SIZE and not converted.config.has_decoder
        assert not [key for key in converted.state_dict() if "decoder" in key or "post_quant_conv" in key]
        codes = chameleon.encode(pictures()).image_tokens.view(3, -1)
        assert codes.unique().numel() > 8 and torch.equal(converted.encode(pictures()), codes)
        for call in (
            lambda model=converted, codes=codes: model.decode(codes),
            lambda model=converted: model(pictures()),
        ):
            with pytest.raises(ValueError, match="can encode pictures but not decode codes"):
                call()


class Janus:
    """transformers' class, with codes as `[B, N]`."""

    def __init__(self, model: JanusVQVAE):
        self.model = model

    def encode(self, pixels):
        return self.model.encode(pixels).image_tokens.view(len(pixels), -1)

    @torch.no_grad()
    def decode(self, codes):
        return self.model.decode(codes)


def test_janus_alone_and_whole(janus, tmp_path, capsys):
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=2, projection_dim=32
    )
    whole = JanusForConditionalGeneration(
        JanusConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, vq_config=janus_config())
    )
    whole.model.vqmodel.load_state_dict(janus.state_dict())
    janus.save_pretrained(tmp_path / "alone")
    whole.save_pretrained(tmp_path / "whole")
    for name in ("alone", "whole"):
        convert_vq(tmp_path / name, tmp_path / f"vq-{name}")
        converted = JamVQModel.from_pretrained(tmp_path / f"vq-{name}")
        assert "DeepSeek's own code normalises them" in capsys.readouterr().out
        assert converted.config.vq_class == "janus" and converted.config.sample_size == SIZE
        assert_equal_to(Janus(janus), converted)
    # Another size of picture, and weights without a config.
    convert_vq(tmp_path / "whole", tmp_path / "large", sample_size=24)
    file = tmp_path / "alone" / "model.safetensors"
    convert_vq(file, tmp_path / "file", sample_size=24)
    large, by_shapes = (JamVQModel.from_pretrained(tmp_path / name) for name in ("large", "file"))
    assert large.config.grid_size == 12
    again = JanusVQVAE(janus_config(num_patches=12)).eval()
    again.load_state_dict(janus.state_dict())
    assert_equal_to(Janus(again), large)
    assert_equal_to(Janus(again), by_shapes)


class Emu3:
    """transformers' class, with codes as `[B, N]`."""

    def __init__(self, model: Emu3VQVAE):
        self.model = model

    def encode(self, pixels):
        sizes = [tuple(pixels.shape[2:])] * len(pixels)
        return torch.stack(list(self.model.encode(pixels, sizes).image_tokens)).flatten(1)

    @torch.no_grad()
    def decode(self, codes):
        grid = int(codes.shape[1] ** 0.5)
        return self.model.decode(codes.view(-1, grid, grid))


def test_emu3_alone_and_whole(emu3, tmp_path):
    config = Emu3Config(
        text_config={**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vq_config=emu3_config(),
        vocabulary_map={"<image>": 3, "<|extra_200|>": 4},
    )
    whole = Emu3ForConditionalGeneration(config)
    whole.model.vqmodel.load_state_dict(emu3.state_dict())
    emu3.save_pretrained(tmp_path / "alone")
    whole.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    assert "vqmodel.quantize.embedding.weight" in tensors  # the older names; and the same under today's
    (tmp_path / "today").mkdir()
    (tmp_path / "today" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    save_file(
        {f"model.{k}" if k.startswith("vqmodel.") else k: v for k, v in tensors.items()}, tmp_path / "today" / file.name
    )
    for name in ("alone", "whole", "today"):
        for size in (16, 24):
            convert_vq(tmp_path / name, tmp_path / "vq", sample_size=size, overwrite=True)
            converted = JamVQModel.from_pretrained(tmp_path / "vq")
            assert converted.config.vq_class == "emu3" and converted.config.grid_size == size // 2
            assert_equal_to(Emu3(emu3), converted)
    for source, words in (
        (tmp_path / "alone", "size of the pictures"),
        (tmp_path / "alone" / file.name, "config.json"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_vq(source, tmp_path / "vq", overwrite=True)


# ----- LlamaGen -------------------------------------------------------------------------------------------------------


def to_llamagen(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Janus' names to LlamaGen's (tokenizer/tokenizer_image/vq_model.py there), whose class it comes from."""
    words = {
        "encoder.down.": "encoder.conv_blocks.",
        "decoder.up.": "decoder.conv_blocks.",
        ".block.": ".res.",
        ".mid.block_1.": ".mid.0.",
        ".mid.attn_1.": ".mid.1.",
        ".mid.block_2.": ".mid.2.",
    }
    renamed = {}
    for key, tensor in state.items():
        for janus_word, llamagen_word in words.items():
            key = key.replace(janus_word, llamagen_word)
        renamed[key] = tensor.clone()
    return renamed


class LlamaGen(Janus):
    """LlamaGen's arithmetic: latents and codebook are normalised before the search, and the codebook before
    decoding.
    """

    @torch.no_grad()
    def encode(self, pixels):
        latents = self.model.quant_conv(self.model.encoder(pixels)).permute(0, 2, 3, 1).reshape(-1, EMBED)
        latents = F.normalize(latents, dim=-1)
        codebook = F.normalize(self.model.quantize.embedding.weight, dim=-1)
        distances = latents.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * latents @ codebook.T
        return distances.argmin(1).view(len(pixels), -1)


def test_llamagen(janus, tmp_path, capsys):
    state = to_llamagen(janus.state_dict())
    assert "encoder.conv_blocks.1.attn.0.q.weight" in state and "decoder.conv_blocks.0.res.1.conv2.bias" in state
    state["quantize.codebook_used"] = torch.zeros(128)
    worse = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"model": worse, "ema": state, "optimizer": {}}, tmp_path / "vq_ds2.pt")
    save_file(
        {f"gen_vision_model.{k}": v for k, v in state.items()} | {"lm_head.weight": torch.ones(2)},
        tmp_path / "a.safetensors",
    )
    original = LlamaGen(janus)
    assert (original.encode(pictures()) != Janus(janus).encode(pictures())).sum() > 5  # the norms of the rows differ
    for name in ("vq_ds2.pt", "a.safetensors"):  # LlamaGen's own, and DeepSeek's Janus
        convert_vq(tmp_path / name, tmp_path / "vq", sample_size=SIZE, allow_pickle=True, overwrite=True)
        assert "1 tensors that only training uses are left out" in capsys.readouterr().out
        assert_equal_to(original, JamVQModel.from_pretrained(tmp_path / "vq"))
    # DeepSeek's arithmetic for transformers' Janus, which has only half of it.
    janus.save_pretrained(tmp_path / "janus")
    convert_vq(tmp_path / "janus", tmp_path / "vq", codebook_l2_norm=True, overwrite=True)
    assert "DeepSeek" not in capsys.readouterr().out
    assert_equal_to(original, JamVQModel.from_pretrained(tmp_path / "vq"))
    with pytest.raises(ValueError, match="JanusVQVAE's decoder normalises"):
        convert_vq(tmp_path / "a.safetensors", tmp_path / "vq", sample_size=SIZE, codebook_l2_norm=False)


# ----- what is refused ------------------------------------------------------------------------------------------------


def test_normalised_codes_are_janus_and_llamagens_alone(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codebook_l2_norm is for LlamaGen's .* of layout 'taming'.* Leave it out"):
        convert_vq(tmp_path / "a.safetensors", tmp_path / "vq", sample_size=SIZE, codebook_l2_norm=True)
    assert not (tmp_path / "vq").exists()


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return enliven(Taming(*SHAPES[2])).checkpoint()


DOWN, UP, MID = "encoder.down.1.block.0", "decoder.up.2.block.0", "encoder.mid.attn_1"
NAN = torch.full((96,), float("nan"))


@pytest.mark.parametrize(
    ("removed", "added", "words"),
    [
        ([f"{UP}.conv2.weight"], {}, rf"1 tensors are missing: '{UP}.conv2.weight' \(\[64, 64, 3, 3\]\)"),
        (["encoder.conv_out.weight"], {}, "read as layout 'taming': tensor 'encoder.conv_out.weight' is missing"),
        (
            [],
            {f"{DOWN}.conv2.weight": (96, 96, 1, 1)},
            rf"'{DOWN}.conv2.weight': expected \[96, 96, 3, 3\], got \[96, 96, 1, 1\]",
        ),
        ([], {f"{MID}.k.weight": (64, 32, 1, 1)}, rf"'{MID}.k.weight': expected \[64, 64\], got \[64, 32\]"),
        ([], {f"{MID}.k.bias": (1,)}, rf"'{MID}.k.bias': expected \[64\], got \[1\]"),
        ([], {"encoder.temb_proj.weight": (2, 3)}, r"1 tensors are unknown: 'encoder.temb_proj.weight' \(\[2, 3\]\)"),
        ([], {f"{DOWN}.conv1.bias": NAN}, f"'{DOWN}.conv1.bias' .* holds NaN"),
        ([], {"encoder.conv_out.weight": (32, 64, 3, 3)}, "makes 32 channels, 'quant_conv.weight' reads 16.*double_z"),
        ([], {"quantize.embed.weight": (2, 2)}, "Gumbel"),
        (["decoder.up.0.block.1."], {}, r"decoder has \[1, 2, 2\] blocks by level; expected 2"),
        (["decoder.mid.attn_1."], {}, "only one of encoder and decoder has attention in the middle"),
        ([], {"decoder.up.1.block.0.conv1.weight": (128, 64, 3, 3)}, r"the decoder \(32, 128, 64\)"),
        (["encoder.down.2.", "encoder.down.1.downsample"], {}, "the encoder has 2 levels .* the decoder 3"),
        ([], {"encoder.conv_in.weight": (64, 3, 3, 3)}, "makes 64 channels and the first level has 32"),
        (["quantize."], {}, "holds no VQ model"),
        (["encoder.", "decoder."], {"a": (1,)}, "of no known layout, e.g. 'a'"),
    ],
)
def test_tensors_that_do_not_fit(removed, added, words, checkpoint, tmp_path):
    tensors = {key: tensor for key, tensor in checkpoint.items() if not key.startswith(tuple(removed))}
    tensors |= {key: value if isinstance(value, torch.Tensor) else torch.ones(value) for key, value in added.items()}
    save_file(tensors, tmp_path / "vqgan.safetensors")
    with pytest.raises(ValueError, match=words):
        convert_vq(tmp_path / "vqgan.safetensors", tmp_path / "vq", sample_size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["vqgan.safetensors"]


def test_files_and_folders_that_are_refused(checkpoint, janus, tmp_path, capsys):
    def refused(words, source, **settings):
        with pytest.raises(ValueError, match=words):
            convert_vq(source, settings.pop("output", tmp_path / "vq"), **{"sample_size": SIZE, **settings})

    file, old = tmp_path / "vqgan.safetensors", tmp_path / "vqgan.ckpt"
    save_file(checkpoint, file)
    refused("sample_size=256", file, sample_size=None)
    refused("multiple of the downsampling factor 4", file, sample_size=18)
    refused("layout must be one of", file, layout="dalle")
    refused("as layout 'llamagen': the encoder has .* channels by level, the decoder", file, layout="llamagen")
    refused("as layout 'janus': the encoder has .* channels by level, the decoder", file, layout="janus")
    refused("as layout 'chameleon': the weights have a decoder", file, layout="chameleon")
    refused("as layout 'emu3': the weights alone do not say", file, layout="emu3")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    refused("cut.safetensors: .*damaged or cut short", tmp_path / "cut.safetensors")

    torch.save({"state_dict": checkpoint}, old)
    refused("--allow-old-files", old)
    (tmp_path / "cut.ckpt").write_bytes(old.read_bytes()[:-1000])
    refused("Cannot read .*cut.ckpt", tmp_path / "cut.ckpt", allow_pickle=True)
    torch.save({"state_dict": checkpoint, "hook": print}, tmp_path / "code.ckpt")
    refused("Cannot read .*code.ckpt with weights_only=True", tmp_path / "code.ckpt", allow_pickle=True)
    torch.save([1], tmp_path / "list.pt")
    refused("holds a list", tmp_path / "list.pt", allow_pickle=True)
    (tmp_path / "vqgan.onnx").write_bytes(b"")
    refused("expected a checkpoint folder", tmp_path / "vqgan.onnx")
    refused("neither|is not a folder", tmp_path / "nowhere")

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "llama")
    refused("is a 'llama' checkpoint; expected transformers' Chameleon, Janus or Emu3", tmp_path / "llama")
    janus.save_pretrained(tmp_path / "janus")
    refused("is also the input", tmp_path / "janus", output=tmp_path / "janus", overwrite=True)
    refused("holds the input", file, output=tmp_path, overwrite=True)
    broken = json.loads((tmp_path / "janus" / "config.json").read_text())
    (tmp_path / "janus" / "config.json").write_text(json.dumps(broken | {"num_embeddings": CODES + 1}))
    refused(r"'quantize.embedding.weight': expected \[65, 8\], got \[64, 8\]", tmp_path / "janus")
    assert not (tmp_path / "vq").exists()

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_vq(file, tmp_path / "used", sample_size=SIZE)
    assert (tmp_path / "used" / "x").is_file()


def test_a_config_that_contradicts_the_shapes_is_refused(chameleon, tmp_path):
    chameleon.save_pretrained(tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config | {"channel_multiplier": [1, 4]}))
    with pytest.raises(ValueError, match=r"channel_multiplier=\[1, 4\], the tensors' shapes say \[1, 2\]"):
        convert_vq(tmp_path / "alone", tmp_path / "vq")


# ----- what takes it --------------------------------------------------------------------------------------------------


def test_a_fused_jam_sees_and_draws_with_it(parents, tmp_path):
    """A whole JAM with the converted tokenizer: fused, loaded, a picture in, a picture out."""
    model = enliven(JanusVQVAE(janus_config(num_embeddings=NUM_CODES, num_patches=4)))
    model.save_pretrained(tmp_path / "janus")
    vq = convert_vq(tmp_path / "janus", tmp_path / "vq")
    jam = JamForCausalLM.from_pretrained(jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq)).eval()
    codes = Janus(model).encode(pictures(8))
    assert torch.equal(jam.get_image_tokens(pictures(8)), codes + jam.config.image_token_offset)
    processor = JamProcessor.from_pretrained(tmp_path / "jam")
    seen = processor(text="a <image>", images=Image.new("RGB", (8, 8), "red"), return_tensors="pt")
    assert seen["pixel_values"].shape == (1, 3, 8, 8)
    written = jam.generate(**seen, generation_mode="image", do_sample=False)[:, seen["input_ids"].shape[1] :]
    drawn = written[:, 1:17] - jam.config.image_token_offset
    expected = Janus(model).decode(drawn).clamp(-1, 1)
    torch.testing.assert_close(jam.decode_image_tokens(written[:, 1:17]), expected, rtol=0, atol=1e-5)


# ----- command line ---------------------------------------------------------------------------------------------------


def test_the_command_line(checkpoint, tmp_path, capsys):
    torch.save({"state_dict": checkpoint}, tmp_path / "vqgan.ckpt")
    command = ["convert-vq", "--source", str(tmp_path / "vqgan.ckpt"), "--output", str(tmp_path / "vq")]
    assert main(command) == 2 and "--allow-old-files" in capsys.readouterr().err
    command += ["--allow-old-files", "--sample-size", "32", "--layout", "taming"]
    assert main(command) == 0 and f"VQ model: {tmp_path / 'vq'}" in capsys.readouterr().out
    assert JamVQModel.from_pretrained(tmp_path / "vq").config.image_seq_length == 64
    assert main(command) == 2 and "not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    written = (tmp_path / "vq" / "config.json").read_text()
    assert str(tmp_path) not in written and "_name_or_path" not in written
