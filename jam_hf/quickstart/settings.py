"""Everything that decides what a quickstart makes. It knows numbers; what they are for is stages.py and pairs.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..data.seeds import check_seed
from ..picture_world import PictureWorldSizes
from ..training.recipes import RecipeSettings
from ..training.vq import VQTrainingSettings


FAMILIES = ("llama", "opt", "unlike")


def _recipe(max_steps: int, learning_rate: float, muon_learning_rate: float, decay: float, **settings: Any) -> Any:
    """A field with a recipe of the quickstart's: Muon, small batches, linear decay over the last share `decay` of
    the steps.
    """
    return field(
        default_factory=lambda: RecipeSettings(
            max_steps=max_steps,
            batch_size=16,
            learning_rate=learning_rate,
            muon_learning_rate=muon_learning_rate,
            schedule="warmup_stable_decay",
            decay_steps=int(decay * max_steps),
            attn_implementation="eager",
            float32_matmul_precision="medium",
            **settings,
        )
    )


@dataclass(frozen=True)
class DecoderSizes:
    """An image parent unlike the text parent. text_vocab_size: of its own tokenizer, without markup and image codes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    text_vocab_size: int


@dataclass(frozen=True)
class QuickstartSettings:
    """Everything that decides what a quickstart makes; kept in `settings.json` of the run folder.

    `small()` is the same path in seconds, for tests: its models have learned nothing.
    """

    seed: int = 0
    sizes: PictureWorldSizes = field(default_factory=PictureWorldSizes)
    vq_pictures: int = 3000
    vq: VQTrainingSettings = field(default_factory=VQTrainingSettings)
    vq_channels: tuple[int, ...] = (8, 16, 32, 64)
    vq_latents: int = 32
    num_codes: int = 384
    text_vocab_size: int = 700
    family: str = "llama"
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    initializer_range: float = 0.06  # about d^-0.5; at 0.02 so narrow a model learns half as fast
    llm: RecipeSettings = _recipe(400, 3e-3, 0.01, decay=0.4, packing=True)
    image_model: RecipeSettings = _recipe(600, 3e-3, 0.006, decay=0.4, packing=True)
    pretrain: RecipeSettings = _recipe(300, 1.5e-3, 0.005, decay=0.3, warmup_steps=30, packing=True)
    instruct: RecipeSettings = _recipe(470, 1.2e-3, 0.004, decay=0.9, warmup_steps=15, packing=True)
    guidance_scale: float = 1.25
    num_documents: int = 8
    document_tokens: int = 320
    train_all: bool = False
    # What the image parent of unlike parents (unlike_parents.py) has of its own. The sizes above are then the text
    # parent's.
    num_key_value_heads: int | None = None
    image_parent: DecoderSizes | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, "QuickstartSettings")
        if self.family not in FAMILIES:
            raise ValueError(f"QuickstartSettings: family must be one of {', '.join(FAMILIES)}, got {self.family!r}.")
        if (self.family == "unlike") != (self.image_parent is not None):
            raise ValueError(
                "QuickstartSettings: the family 'unlike' and image_parent need each other; see of_family()."
            )
        if self.family == "unlike" and self.train_all:
            raise ValueError(
                "QuickstartSettings: unlike parents fuse as jam-cross only, so train_all has nothing to add. Leave it "
                "out."
            )

    @classmethod
    def of_family(cls, family: str, small: bool = False) -> QuickstartSettings:
        """The settings of a family, or the same path in seconds (`small`)."""
        settings = cls.small() if small else cls()
        if family != "unlike":
            return replace(settings, family=family)
        if small:
            return replace(
                settings,
                family=family,
                num_layers=3,
                num_key_value_heads=1,
                image_parent=DecoderSizes(24, num_layers=2, num_heads=3, intermediate_size=32, text_vocab_size=330),
            )
        return replace(
            settings,
            family=family,
            hidden_size=160,
            num_layers=5,
            num_key_value_heads=2,
            intermediate_size=432,
            image_parent=DecoderSizes(192, num_layers=4, num_heads=6, intermediate_size=512, text_vocab_size=600),
        )

    @classmethod
    def small(cls) -> QuickstartSettings:
        recipe = RecipeSettings(max_steps=3, batch_size=4, warmup_steps=1, save_steps=2, logging_steps=1, packing=True)
        return cls(
            sizes=PictureWorldSizes(texts=40, pairs=40, howtos=10, validation=6, unseen=4),
            vq_pictures=24,
            vq=VQTrainingSettings(steps=50, warmup_steps=25, batch_size=4),
            vq_channels=(4, 4, 4, 8),
            vq_latents=4,
            num_codes=24,
            text_vocab_size=400,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=24,
            llm=recipe,
            image_model=recipe,
            pretrain=recipe,
            instruct=recipe,
            num_documents=2,
            document_tokens=60,
        )


__all__ = ["FAMILIES", "DecoderSizes", "QuickstartSettings"]
