"""Training the image tokenizer: it learns, it repeats, and its codebook is cared for."""

import numpy as np
import pytest
import torch
from conftest import VQ_SETTINGS

from jam_hf import JamVQConfig, JamVQModel
from jam_hf.picture_world.dataset import build_vq_pictures
from jam_hf.training.vq import VQTrainingSettings, _kmeans, encode_images, pixels_of, train_vq


def _model():
    torch.manual_seed(0)
    return JamVQModel(JamVQConfig(**{**VQ_SETTINGS, "sample_size": 24, "num_vq_embeddings": 48, "latent_channels": 16}))


def test_training_learns_and_repeats():
    images = build_vq_pictures(0, 64)
    settings = VQTrainingSettings(steps=100, warmup_steps=75, batch_size=8)
    runs = []
    for _ in range(2):
        model = _model()
        history = train_vq(model, images, settings)
        runs.append((history, encode_images(model, images[:8])))
    (history, codes), (_, again) = runs
    assert history[-1]["reconstruction"] < 0.25 * pixels_of(images, _model()).var().item()  # three quarters explained
    assert history[-1]["codes"] > 5 and not model.training
    assert codes.shape == (8, 36) and codes.dtype == np.int64
    assert np.array_equal(codes, again) and runs[0][0] == runs[1][0]


def test_kmeans_finds_clusters_and_puts_the_surplus_away():
    generator = torch.Generator().manual_seed(0)
    places = 10 * torch.randn(6, 3, generator=generator)
    points = places.repeat(30, 1)
    centres = _kmeans(points, 10, generator)
    nearest = torch.cdist(places, centres)
    assert nearest.amin(1).max() < 0.1
    assert len(torch.cdist(points, centres).argmin(1).unique()) == 6
    assert (torch.cdist(points, centres).amin(0) > 1.0).sum() == 4


def test_bad_settings():
    with pytest.raises(ValueError, match="warmup_steps"):
        VQTrainingSettings(steps=5, warmup_steps=5)
    with pytest.raises(ValueError, match="at least batch_size=16 pictures, got 3"):
        train_vq(_model(), build_vq_pictures(0, 3))
