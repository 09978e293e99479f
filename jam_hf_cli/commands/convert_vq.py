"""`jam-hf convert-vq`: an image parent's VQ model. It calls the library and knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


LAYOUTS = ("taming", "chameleon", "llamagen", "janus", "emu3")  # those of jam_hf.conversion.vq_tables
RESUMES = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """an image parent's VQ model, as `fuse --vq` takes it"""

    source: str = option(
        "folder or Hub id (transformers' Chameleon, Janus, Emu3) or file of weights (taming, LlamaGen)"
    )
    output: str = option("folder of the converted VQ model")
    layout: str | None = option("layout of the weights", None, unset="found by their keys", choices=LAYOUTS)
    sample_size: int | None = option("side of the pictures in pixels", None, unset="what the config says")
    codebook_l2_norm: bool = option(
        "transformers' Janus: codes as DeepSeek's own code has them", False, unset="as transformers has them"
    )
    allow_old_files: bool = option("read .ckpt, .pt, .pth and .bin (weights_only=True)", False)
    overwrite: bool = option("replace the output folder", False)


def run(options: Options) -> None:
    from jam_hf.conversion.vq import convert_vq

    path = convert_vq(
        options.source,
        options.output,
        layout=options.layout,
        sample_size=options.sample_size,
        codebook_l2_norm=options.codebook_l2_norm or None,
        allow_pickle=options.allow_old_files,
        overwrite=options.overwrite,
    )
    print(f"VQ model: {path}")
