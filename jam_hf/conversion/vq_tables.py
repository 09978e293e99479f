"""The layouts in which VQ models of public parents come: tables of keys, and the architecture that tensor shapes tell.

They know key names and shapes; they read and write nothing. A row of a table is a piece of a key as the parent has it
and as the stock class has it, `{}` standing for a number; rows apply in order and, backwards, in the reverse order.
Layouts:

- "taming": taming-transformers' VQModel (VQGAN, Make-A-Scene's kind, Chameleon's vqgan.ckpt);
- "chameleon": transformers' ChameleonVQVAE, which is taming's encoder under taming's names;
- "llamagen": LlamaGen's tokenizer, and DeepSeek's own Janus;
- "janus", "emu3": transformers' JanusVQVAE and Emu3VQVAE.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass


Table = list[tuple[str, str]]

LAYOUTS = ("taming", "chameleon", "llamagen", "janus", "emu3")

# Where the VQ model stands in a checkpoint: transformers (now, and Emu3 before), DeepSeek's Janus, alone.
PREFIXES = ("model.vqmodel.", "vqmodel.", "gen_vision_model.", "")

# Losses with their discriminator, averaged copies, running counts of codes: needed for training only.
TRAINING_ONLY = re.compile(
    r"(loss|discriminator|model_ema|ema)\..*|quantize\.(embedding\.)?(cluster_size|embed_avg|initted)|quantize\.codebook_used"
)

LLAMAGEN_TO_JANUS: Table = [
    ("encoder.conv_blocks.", "encoder.down."),
    ("decoder.conv_blocks.", "decoder.up."),  # both count from the smallest grid, unlike taming
    (".{}.res.{}.", ".{}.block.{}."),
    (".mid.0.", ".mid.block_1."),
    (".mid.1.", ".mid.attn_1."),
    (".mid.2.", ".mid.block_2."),
]


def taming_to_diffusers(levels: int) -> Table:
    """taming's names to those of `diffusers.VQModel`, whose decoder counts its levels from the smallest grid."""
    return [
        ("encoder.norm_out.", "encoder.conv_norm_out."),
        ("decoder.norm_out.", "decoder.conv_norm_out."),
        ("encoder.down.{}.", "encoder.down_blocks.{}."),
        *((f"decoder.up.{level}.", f"decoder.up_blocks.{levels - 1 - level}.") for level in range(levels)),
        (".nin_shortcut.", ".conv_shortcut."),
        (".downsample.", ".downsamplers.0."),
        (".upsample.", ".upsamplers.0."),
        (".block.{}.", ".resnets.{}."),
        (".attn.{}.", ".attentions.{}."),
        (".mid.block_1.", ".mid_block.resnets.0."),
        (".mid.block_2.", ".mid_block.resnets.1."),
        (".mid.attn_1.", ".mid_block.attentions.0."),
        (".attentions.{}.norm.", ".attentions.{}.group_norm."),
        (".attentions.{}.q.", ".attentions.{}.to_q."),
        (".attentions.{}.k.", ".attentions.{}.to_k."),
        (".attentions.{}.v.", ".attentions.{}.to_v."),
        (".attentions.{}.proj_out.", ".attentions.{}.to_out.0."),
    ]


# diffusers computes with linear layers what taming computes with 1x1 convolutions.
LINEAR_IN_DIFFUSERS = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def rename(key: str, table: Table, back: bool = False) -> str:
    """The parent's key in the stock class' words; `back`: the other way."""
    for row in reversed(table) if back else table:
        ours, theirs = row[::-1] if back else row
        pattern = re.escape(ours).replace(r"\{\}", r"(\d+)")
        key = re.sub(pattern, lambda match, place=theirs: str(place).format(*match.groups()), key)  # type: ignore[misc]
    return key


def find_prefix(keys: Collection[str]) -> str | None:
    """What stands before the VQ model's own names; `None` if there is no VQ model."""
    for prefix in PREFIXES:
        if any(f"{prefix}{name}" in keys for name in ("quantize.embedding.weight", "quantize.embed.weight")):
            return prefix
    return None


def guess_layout(keys: Collection[str]) -> str | None:
    """The layout of a VQ model's own names (without what stands before them)."""
    if any(key.startswith("encoder.down_block.") for key in keys):
        return "emu3"
    if any(key.startswith("encoder.conv_blocks.") for key in keys):
        return "llamagen"
    if not any(key.startswith("encoder.down.") for key in keys):
        return None
    if not any(key.startswith("decoder.") for key in keys):
        return "chameleon"
    # taming counts the decoder's levels from the pictures' size, Janus from the smallest grid, where upsampling starts
    return "janus" if "decoder.up.0.upsample.conv.weight" in keys else "taming"


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a model with taming's or Janus' names tell. Attention is a set of levels, 0 is the
    pictures' size.
    """

    in_channels: int
    out_channels: int
    base_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    encoder_attention: frozenset[int]
    decoder_attention: frozenset[int]
    mid_attention: bool
    latent_channels: int
    embed_dim: int
    num_embeddings: int
    has_decoder: bool

    @property
    def channel_multiplier(self) -> list[int]:
        return [channels // self.base_channels for channels in self.channels]


def infer_architecture(shapes: Mapping[str, tuple[int, ...]], smallest_first: bool) -> Architecture:
    """Read the architecture off the shapes by taming's names (Janus' are the same).

    Args:
        smallest_first: whether the decoder counts its levels from the smallest grid (Janus).
    Raises:
        ValueError: if a tensor that decides is missing, or two contradict each other; the message names them.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"tensor '{key}' is missing.")
        return shapes[key]

    def count(pattern: str) -> int:
        found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
        return max(found, default=-1) + 1

    def half(
        name: str, list_name: str, levels: int, reverse: bool
    ) -> tuple[tuple[int, ...], list[int], frozenset[int]]:
        """Channels and number of blocks by level, and the levels with attention."""
        order = [levels - 1 - level if reverse else level for level in range(levels)]
        places = [f"{name}.{list_name}.{index}" for index in order]
        channels = tuple(shape(f"{place}.block.0.conv1.weight")[0] for place in places)
        blocks = [count(rf"{re.escape(place)}\.block\.(\d+)\.") for place in places]
        attention = frozenset(i for i, place in enumerate(places) if count(rf"{re.escape(place)}\.attn\.(\d+)\."))
        return channels, blocks, attention

    has_decoder = any(key.startswith("decoder.") for key in shapes)
    levels = count(r"encoder\.down\.(\d+)\.")
    channels, blocks, encoder_attention = half("encoder", "down", levels, reverse=False)
    if len(set(blocks)) != 1:
        raise ValueError(f"the levels of the encoder have {blocks} blocks; expected as many in each.")
    latent, quantised = shape("encoder.conv_out.weight")[0], shape("quant_conv.weight")
    if latent == 2 * quantised[1]:
        raise ValueError(
            f"'encoder.conv_out.weight' makes {latent} channels, 'quant_conv.weight' reads {quantised[1]}: the encoder "
            "draws its latents from a distribution (double_z), which no nearest code is searched for."
        )
    mid_attention, decoder_attention = "encoder.mid.attn_1.q.weight" in shapes, encoder_attention
    if has_decoder:
        theirs = count(r"decoder\.up\.(\d+)\.")
        if theirs != levels:
            raise ValueError(f"the encoder has {levels} levels ('encoder.down'), the decoder {theirs} ('decoder.up').")
        decoder_channels, decoder_blocks, decoder_attention = half("decoder", "up", levels, reverse=smallest_first)
        if decoder_channels != channels:
            raise ValueError(
                f"the encoder has {channels} channels by level, the decoder {decoder_channels}; expected the same."
            )
        if set(decoder_blocks) != {blocks[0] + 1}:
            raise ValueError(f"the decoder has {decoder_blocks} blocks by level; expected {blocks[0] + 1} in each.")
        if ("decoder.mid.attn_1.q.weight" in shapes) != mid_attention:
            raise ValueError("only one of encoder and decoder has attention in the middle ('mid.attn_1').")
    codes, embed_dim = shape("quantize.embedding.weight")
    return Architecture(
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0] if has_decoder else shape("encoder.conv_in.weight")[1],
        base_channels=shape("encoder.conv_in.weight")[0],
        channels=channels,
        num_res_blocks=blocks[0],
        encoder_attention=encoder_attention,
        decoder_attention=decoder_attention,
        mid_attention=mid_attention,
        latent_channels=latent,
        embed_dim=embed_dim,
        num_embeddings=codes,
        has_decoder=has_decoder,
    )
