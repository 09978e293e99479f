"""What a fusion will be, in words: the dry run, the provenance of a tensor, and what a user should be warned of."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from ..model.configuration_jam import JamConfig
from .checkpoint import plan_shards
from .parents import Decoder
from .vocabulary import NONE, Vocabulary


if TYPE_CHECKING:
    from .fuse import FusionPlan


# Interpreter, torch and transformers, and the blocks in flight; measured with modeling_tests/benchmarks/fusion.py.
_BASE_BYTES = 700 << 20


def size(num_bytes: int) -> str:
    """`1536` -> "1.5 KiB"."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def peak_memory(plan: FusionPlan) -> int:
    """An estimate, in bytes: what is always there, and the largest table of rows that must be kept whole."""
    vq = sum(t.spec.nbytes for key, t in plan.tensors.items() if key.startswith("model.vq_model."))
    return _BASE_BYTES + vq + max((t.loads for t in plan.tensors.values()), default=0)


def preserved(mode: str, init: str) -> str:
    """What a fusion keeps of its parents, in one sentence."""
    if mode == "cross" and init == "preserving":
        return (
            "Both parents: text logits equal the text parent's and the logits of image codes the image parent's, on sequences "
            "that both can read. The cross blocks add nothing yet."
        )
    if mode == "cross":
        return "Neither parent's logits: cross blocks and output projection are drawn at random, as in the paper; train it."
    if mode == "width":
        return "Neither parent's logits: one norm reads both halves; a starting point for training."
    return "Neither parent's logits: the mean of two networks is a starting point for training."


def warnings(text: Decoder, image: Decoder, config: JamConfig, vocabulary: Vocabulary, mode: str, init: str) -> list[str]:
    """What may surprise a user."""
    found = []
    if (mode, init) != ("cross", "preserving"):
        found.append(preserved(mode, init))
    if (text.tied or image.tied) and not config.tie_word_embeddings:
        tied = " and ".join(d.parent.role for d in (text, image) if d.tied)
        found.append(f"The {tied} ties its output projection to its embedding; in the JAM they are two tensors.")
    if vocabulary.added:
        shown = ", ".join(vocabulary.added[:4]) + (" ..." if len(vocabulary.added) > 4 else "")
        found.append(
            f"The tokenizer got {len(vocabulary.added)} special tokens ({shown}). What neither parent knows starts as the mean "
            "of all rows, or as a row of the text parent's padding, and must be trained."
        )
    if vocabulary.coverage is not None:
        missing = vocabulary.coverage.counts[NONE]
        if missing > 0.02 * vocabulary.coverage.total:
            share = 100 * missing / vocabulary.coverage.total
            found.append(
                f"{share:.1f} % of the text tokens have no counterpart in the image parent's vocabulary: its stream reads the "
                "mean row for them."
            )
    licences = {d.parent.role: d.parent.license for d in (text, image) if d.parent.license}
    if len(set(licences.values())) > 1:
        listing = ", ".join(f"{role}: {name}" for role, name in licences.items())
        found.append(f"The parents' licences differ ({listing}); the JAM is bound by both.")
    limits = {d.parent.role: d.config.max_position_embeddings for d in (text, image)}
    if len(set(limits.values())) > 1:
        listing = ", ".join(f"{role}: {limit}" for role, limit in limits.items())
        found.append(f"The parents read contexts of different lengths ({listing} positions); the JAM reads the shorter.")
    return found


def describe(plan: FusionPlan, tensors: bool = True) -> str:
    """The dry run; without `tensors`, what is worth reading on every run."""
    config = plan.config
    shards, _ = plan_shards({key: t.spec for key, t in plan.tensors.items()}, plan.recipe.max_shard_size)
    parameters = sum(t.spec.rows * t.spec.row_numel for t in plan.tensors.values())
    lines = [
        f"JAM, fusion {plan.recipe.mode}, init {plan.recipe.init}"
        + (f", recipe {plan.digest[:16]}" if plan.digest else " (from the headers of the weights alone)"),
        *(
            f"  {d.parent.role}: {d.parent.name} ({d.kind}; {d.config.num_hidden_layers} layers, hidden size {d.hidden_size}, "
            f"{d.config.num_attention_heads} heads, vocabulary {d.vocab_size})"
            for d in (plan.text, plan.image)
        ),
        f"  vocabulary: {config.vocab_size}, image codes {config.image_token_offset}.."
        f"{config.image_token_offset + config.num_image_tokens - 1}",
        f"  image codes of the image parent: {plan.vocabulary.codes_from}",
        f"  CM3 sentinels: {config.num_mask_tokens} from "
        f"{plan.vocabulary.tokenizer.convert_ids_to_tokens(config.mask_token_id)} on",
        f"  picture: {config.vq_config.sample_size}x{config.vq_config.sample_size} pixels, {config.image_seq_length} codes",
        f"  parameters: {parameters:,} ({config.dtype}; VQ model float32)",
        f"  disk: {size(plan.num_bytes)} in {len(shards)} file(s)",
        f"  peak memory: about {size(peak_memory(plan))}",
    ]
    pairs = config.layer_pairs
    if pairs:
        crossed = set(config.cross_attention_layers)
        depths = config.text_layer_depths
        listing = " ".join(f"{t}:{i}{'x' if depths[t] in crossed else ''}" for t, i in pairs)
        lines.append(f"  layers side by side (text:image, x: cross blocks follow): {listing}")
    if plan.vocabulary.coverage is not None:
        lines.append(f"  rows of the image parent for {plan.vocabulary.coverage.total} text tokens:")
        lines += [f"    {line}" for line in plan.vocabulary.coverage.lines()]
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    if tensors:
        lines.append("  tensors:")
        lines += [f"    {key} {list(t.spec.shape)}: {t.what}" for key, t in _grouped(plan).items()]
    return "\n".join(lines)


def _grouped(plan: FusionPlan) -> dict[str, object]:
    """One of each tensor that differs by its layer's number alone; the VQ model's are left out."""
    found: dict[str, tuple[str, object]] = {}
    for key, tensor in plan.tensors.items():
        if key.startswith("model.vq_model."):
            continue
        found.setdefault(f"{re.sub(r'[.][0-9]+[.]', '.N.', key)} {tensor.spec.shape} {tensor.what}", (key, tensor))
    return dict(found.values())


def explain(plan: FusionPlan, key: str) -> str:
    """Where a tensor comes from."""
    if key not in plan.tensors:
        near = difflib.get_close_matches(key, plan.tensors, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " `--dry-run` lists them."
        raise ValueError(f"The JAM has no tensor '{key}'.{hint}")
    tensor = plan.tensors[key]
    lines = [f"{key}", f"  {list(tensor.spec.shape)} {tensor.spec.dtype}", f"  {tensor.what}"]
    for parent, name in tensor.inputs:
        spec = parent.require(name)
        lines.append(f"  {parent.role}: {name} {list(spec.shape)} {spec.dtype} in {parent.where(name)}")
    if not tensor.inputs:
        lines.append("  from no parent")
    return "\n".join(lines)
