"""Training the image tokenizer: a `JamVQModel` (diffusers' VQModel) on pictures.

It knows pixels and codes, not what the pictures show. Codebooks collapse when they start far from what the encoder
says, and an autoencoder learns slowly through an untrained bottleneck. So training begins with a teacher [R]: the
principal components of the patch behind each code. The encoder learns to say them, the decoder learns to undo them,
both at once and neither waiting for the other; the codebook starts from k-means over them. Then comes ordinary VQ
training, in which codes that fall out of use are moved to latents that are badly served. Codes stay local, which a
language model learns easily.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from ..model.image_processing_jam import JamImageProcessor
from ..model.modeling_jam_vq import JamVQModel


@dataclass(frozen=True)
class VQTrainingSettings:
    """Settings of [`train_vq`].

    Args:
        steps: optimizer steps in all. warmup_steps: of them with the teacher, before quantisation.
        batch_size: pictures per step. learning_rate: the highest, of AdamW with a cosine schedule.
        commitment: weight of the commitment loss.
        revive_every: steps between revivals of unused codes (none in the last quarter, so that codes settle).
        seed: of batches, initialisation of the codebook and revivals.
    """

    steps: int = 600
    warmup_steps: int = 450
    batch_size: int = 16
    learning_rate: float = 4e-3
    commitment: float = 0.25
    revive_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(
                f"VQTrainingSettings: warmup_steps must be in 1..steps-1, got {self.warmup_steps} of {self.steps}."
            )


def pixels_of(images: Sequence[Image.Image], model: JamVQModel, batch_size: int = 512) -> torch.Tensor:
    """Pictures to float `[P, 3, H, W]` in `config.pixel_range`, by the same image processor that inference uses."""
    processor = JamImageProcessor.from_vq_config(model.config)
    parts = [
        processor(images[i : i + batch_size], return_tensors="pt")["pixel_values"]
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)


def encode_images(model: JamVQModel, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
    """Pictures to raw codes, int64 `[P, N]`."""
    device = model.device
    parts = [
        model.encode(pixels_of(images[i : i + batch_size], model).to(device)).cpu()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).numpy()


def _distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Distances `[P, C]`, exact: by way of a matrix product, a point would lie off its own centre."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def _kmeans(points: torch.Tensor, count: int, generator: torch.Generator, iterations: int = 10) -> torch.Tensor:
    """Centres `[count, E]` of `points` `[P, E]`: k-means++ seeding by blocks, then Lloyd's iterations.

    Where the points have fewer than `count` places, the surplus centres are put far from all of them: a second centre
    in the same place would be a synonym.
    """
    far = 4 * points.norm(dim=1).max() * F.normalize(torch.randn(count, points.shape[1], generator=generator), dim=1)
    negligible = 1e-4 * points.var(0).sum().sqrt()
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distances = _distances(points, centres).amin(1)
    while len(centres) < count and distances.max() > negligible:
        block = min(count - len(centres), max(1, len(centres) // 16))
        weights = torch.where(distances > negligible, distances.square(), 0.0)
        chosen = points[torch.multinomial(weights, block, replacement=True, generator=generator)].unique(dim=0)
        centres = torch.cat((centres, chosen))
        distances = torch.minimum(distances, _distances(points, chosen).amin(1))
    for _ in range(iterations):
        nearest = _distances(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), far[: len(centres)])
    return torch.cat((centres, far[len(centres) :]))


def train_vq(
    model: JamVQModel, images: Sequence[Image.Image], settings: VQTrainingSettings | None = None
) -> list[dict[str, float]]:
    """Train the tokenizer in place on PIL pictures.

    Returns:
        the loss curve: `{"step", "reconstruction", "commitment", "codes"}` every 25 steps; `codes` is how many codes
            the
        last 25 batches used.
    Raises:
        ValueError: if there are fewer pictures than a batch needs, or the model is not diffusers' VQModel.
    """
    settings = settings or VQTrainingSettings()
    if model.config.vq_class != "diffusers" or not model.config.has_decoder:
        raise ValueError(
            "train_vq: expected a VQ model of diffusers with encoder and decoder; converted ones of others stay frozen."
        )
    if len(images) < settings.batch_size:
        raise ValueError(f"train_vq: expected at least batch_size={settings.batch_size} pictures, got {len(images)}.")
    generator = torch.Generator().manual_seed(settings.seed)
    vq, device = model.vq, model.device
    vq.quantize.legacy = False  # diffusers' default puts the commitment weight on the codebook's term
    vq.quantize.beta = settings.commitment
    pixels = pixels_of(images, model)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    teacher = _teacher(model, pixels, generator)
    used = torch.zeros(vq.quantize.n_e, dtype=torch.long)
    recent = torch.zeros_like(used)
    history: list[dict[str, float]] = []
    model.train()
    with tqdm(range(settings.steps), desc="VQ model", unit="step") as progress:
        for step in progress:
            chosen = torch.randint(len(pixels), (settings.batch_size,), generator=generator)
            batch = pixels[chosen].to(device)
            latents = vq.encode(batch).latents
            if step < settings.warmup_steps:
                target = teacher(batch)
                commitment = F.mse_loss(latents, target)
                noise = torch.randn(target.shape, generator=generator).to(device)
                quantised = target + 0.05 * noise
            else:
                if step == settings.warmup_steps:
                    _start_codebook(model, pixels, teacher, generator)
                quantised, commitment, (_, _, codes) = vq.quantize(latents)
                counts = torch.bincount(codes.flatten().cpu(), minlength=len(used))
                used += counts
                recent += counts
            sample = vq.decode(quantised, force_not_quantize=True).sample
            reconstruction = F.mse_loss(sample, batch)
            optimizer.zero_grad(set_to_none=True)
            (reconstruction + commitment).backward()
            torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            since = step - settings.warmup_steps
            if since > 0 and since % settings.revive_every == 0 and step < 0.75 * settings.steps:
                _revive(model, used == 0, latents.detach(), generator)
                used.zero_()
            if (step + 1) % 25 == 0:
                row = {
                    "step": step + 1,
                    "reconstruction": reconstruction.item(),
                    "commitment": commitment.item(),
                    "codes": int((recent > 0).sum()),
                }
                history.append(row)
                recent.zero_()
                progress.set_postfix(loss=f"{row['reconstruction']:.4f}", codes=row["codes"])
    model.eval()
    return history


def _teacher(
    model: JamVQModel, pixels: torch.Tensor, generator: torch.Generator
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pixels `[B, C, H, W]` to what the latents `[B, E, G, G]` shall first be.

    The E principal components of the pixels behind a code, each divided by the fourth root of its variance (between the
    scale of pixels, where details drown, and whitening, where noise rises), scaled to unit variance in all.
    """
    factor, size = model.config.downsampling_factor, model.vq.quantize.embedding.weight.shape[1]
    sample = pixels[torch.randperm(len(pixels), generator=generator)[:1000]]
    patches = F.unfold(sample, factor, stride=factor).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = patches - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    count = min(size, len(variances))
    variances, directions = variances.flip(0)[:count].clamp(min=1e-6), directions.flip(1)[:, :count]
    weight = F.pad(directions / variances**0.25, (0, size - count))
    weight = weight / (centred @ weight).std()

    def teach(batch: torch.Tensor) -> torch.Tensor:
        columns = F.unfold(batch, factor, stride=factor).transpose(1, 2) - mean.to(batch)
        latents = (columns @ weight.to(batch)).transpose(1, 2)
        return latents.reshape(len(batch), size, model.config.grid_size, model.config.grid_size)

    return teach


@torch.no_grad()
def _start_codebook(
    model: JamVQModel,
    pixels: torch.Tensor,
    teacher: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> None:
    latents = teacher(pixels[torch.randperm(len(pixels), generator=generator)[:1500]])
    points = latents.permute(0, 2, 3, 1).flatten(0, 2)
    weight = model.vq.quantize.embedding.weight
    weight.copy_(_kmeans(points, weight.shape[0], generator))


@torch.no_grad()
def _revive(model: JamVQModel, unused: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> None:
    """Move unused codes to latents `[B, E, G, G]` of the last batch that lie far from their code.

    Far: more than four times the mean squared distance. Where all are served alike, more codes would only make
    synonyms.
    """
    points = latents.permute(0, 2, 3, 1).flatten(0, 2)
    weight = model.vq.quantize.embedding.weight
    distances = torch.cdist(points, weight).amin(1).square().cpu()
    distances = torch.where(distances > 4 * distances.mean(), distances, 0.0)
    count = min(int(unused.sum()), int((distances > 0).sum()))
    if count:
        chosen = torch.multinomial(distances, count, generator=generator)
        weight[unused.nonzero().flatten()[:count].to(weight.device)] = points[chosen.to(points.device)]
