"""JamVQModel against diffusers' own VQModel."""

import pytest
import torch
from conftest import NUM_CODES, VQ_SETTINGS
from diffusers import VQModel
from transformers import AutoModel

from jam_hf import JamVQConfig, JamVQModel


@torch.no_grad()
def test_codes_and_pixels_equal_those_of_diffusers(vq):
    original = VQModel(
        **{**VQ_SETTINGS, "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    )
    original.load_state_dict(vq.vq.state_dict())
    original.eval()
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = original.encode(pixels).latents
    _, _, (_, _, codes) = original.quantize(latents)
    ours = vq.encode(pixels)
    assert torch.equal(ours.flatten(), codes.flatten())
    assert ours.shape == (3, vq.config.image_seq_length)
    torch.testing.assert_close(vq.decode(ours), original.decode(latents).sample, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # a planted error is seen
        original.quantize.embedding.weight.neg_()
    assert (original.decode(latents).sample - vq.decode(ours)).abs().max() > 1e-2


def test_saving_and_loading(vq, tmp_path):
    vq.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is JamVQModel
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(pixels), vq.encode(pixels))


def test_autocast_does_not_lower_the_precision_of_codes_and_pixels(vq):
    """Trainers with `bf16=True` run the whole forward under autocast; near ties between codes would flip."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, again = vq.encode(pixels), vq.decode(vq.encode(pixels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq.encode(pixels), codes)
        assert torch.equal(vq.decode(codes), again)
        assert vq.vq.decoder.conv_in.weight.dtype == torch.float32
        lowered = vq.vq.decode(vq.vq.encode(pixels).latents).sample  # the stock model is lowered
    assert lowered.dtype == torch.bfloat16


def test_initialisation_is_diffusers_scale():
    torch.manual_seed(0)
    ours, theirs = (
        JamVQModel(JamVQConfig(**VQ_SETTINGS)),
        VQModel(
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ),
    )
    a, b = ours.vq.encoder.conv_in.weight.std(), theirs.encoder.conv_in.weight.std()
    assert 0.7 < a / b < 1.4


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (torch.zeros(1, 15, dtype=torch.int64), "exactly that many codes"),
        (torch.full((1, 16), NUM_CODES), "0..15"),
        (torch.full((1, 16), -1), "image_token_offset"),
    ],
)
def test_bad_codes_are_refused(vq, codes, words):
    with pytest.raises(ValueError) as error:
        vq.decode(codes)
    assert words in str(error.value)


def test_bad_pixels_are_refused(vq):
    with pytest.raises(ValueError, match=r"\[pictures, 3, 16, 16\], got \[1, 3, 8, 16\]"):
        vq.encode(torch.zeros(1, 3, 8, 16))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.full((1, 3, 16, 16), float("nan")), "got a value of size nan"),
        (torch.full((1, 3, 16, 16), 255.0), "got a value of size 255"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(0, 3, 16, 16), r"got \[0, 3, 16, 16\]"),
        ([0.0], "got list"),
    ],
)
def test_pixels_that_no_processor_made_are_refused(vq, pixels, words):
    with pytest.raises(ValueError, match=words):
        vq.encode(pixels)
