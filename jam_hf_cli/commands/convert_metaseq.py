"""`jam-hf convert-metaseq`: metaseq's OPT or CM3leon files. It calls the library and knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


RESUMES = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """metaseq's OPT or CM3leon files to an OPT checkpoint of transformers"""

    source: list[str] = option("folder with the .pt files, or the files of one checkpoint", nargs="+")
    output: str = option("folder of the OPT checkpoint")
    num_attention_heads: int | None = option("attention heads", None, unset="what the files say")
    activation_function: str | None = option("relu (OPT's), gelu, ...", None, unset="what the files say")
    post_norm: bool = option("LayerNorm behind attention and FFN, as in OPT-350m", False)
    vocab_size: int | None = option("leave out the rows behind, with which metaseq pads", None, unset="all rows")
    dtype: str | None = option("float32, float16 or bfloat16", None, unset="that of the files")
    max_shard_size: str = option("of the safetensors files", "2GB")
    overwrite: bool = option("replace the output folder", False)


def run(options: Options) -> None:
    from jam_hf.conversion.metaseq import convert_metaseq

    path = convert_metaseq(
        options.source,
        options.output,
        num_attention_heads=options.num_attention_heads,
        activation_function=options.activation_function,
        post_norm=options.post_norm,
        vocab_size=options.vocab_size,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    print(f"converted: {path}")
