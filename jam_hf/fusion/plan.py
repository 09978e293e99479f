"""`FusionPlan`: a fusion before it is done, and what it will be, in words: the dry run, the provenance of a tensor."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.plan import TensorPlan, plan_shards
from ..checkpoints.tensor_files import file_size
from ..model.configuration_jam import JamConfig
from .parents import Decoder
from .recipe import FusionRecipe
from .vocabulary import Vocabulary


# Interpreter, torch and transformers, and the blocks in flight; measured with modeling_tests/benchmarks/fusion.py.
_BASE_BYTES = 700 << 20
_NAME_BYTES = 3 << 10  # of an added token, in a tokenizer that is made, copied and saved


@dataclass
class FusionPlan:
    """A fusion before it is done. `describe()` and `explain(key)` say what it will be; nothing has been written."""

    recipe: FusionRecipe
    config: JamConfig
    vocabulary: Vocabulary
    text: Decoder
    image: Decoder
    tensors: dict[str, TensorPlan]
    warnings: list[str]
    digest: str | None  # None: weights were not read, only their headers
    fingerprint: str | None  # None: an input is in memory, so that a stopped run cannot be taken up again
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of generation, by the JAM's names

    @property
    def num_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(plan.spec.nbytes for plan in self.tensors.values())

    def describe(self, tensors: bool = True) -> str:
        """Parameters, memory, disk, vocabulary, pairing of layers, warnings and (`tensors`) shapes, as text."""
        return describe(self, tensors)

    def explain(self, key: str) -> str:
        """Where a tensor comes from, as text. Raises `ValueError` for a tensor that the JAM does not have."""
        return explain(self, key)


def size(num_bytes: int) -> str:
    """`1536` -> "1.5 KiB"."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def peak_memory(plan: FusionPlan) -> int:
    """An estimate, in bytes: what is always there, the largest table of rows that is kept whole, and the names of
    codes.
    """
    names = _NAME_BYTES * len(plan.vocabulary.tokenizer.added_tokens_decoder)
    vq = sum(t.spec.nbytes for key, t in plan.tensors.items() if key.startswith("model.vq_model."))
    return _BASE_BYTES + names + vq + max((t.loads for t in plan.tensors.values()), default=0)


def preserved(mode: str, init: str) -> str:
    """What a fusion keeps of its parents, in one sentence."""
    if mode == "cross" and init == "preserving":
        return (
            "Both parents: text logits equal the text parent's and the logits of image codes the image parent's, on "
            "sequences that both can read. The cross blocks add nothing yet."
        )
    if mode == "cross":
        return (
            "Neither parent's logits: cross blocks and output projection are drawn at random, as in the paper; "
            "train it."
        )
    if mode == "width":
        return "Neither parent's logits: one norm reads both halves; a starting point for training."
    return "Neither parent's logits: the mean of two networks is a starting point for training."


# By the tensors' names, the first that is found.
_PARTS = (
    ("VQ model", r"model\.vq_model\."),
    ("cross blocks", r"_cross\.|output_projection"),
    ("text stream", r"\.text_\w+\."),
    ("image stream", r"\.image_\w+\."),
    ("embedding", r"embed"),
    ("heads", r"lm_head|image_head"),
    ("decoder", r""),
)
# Bytes a second: a disk of a rented machine, and a line to it. Stated with every estimate.
_DISK_RATE, _LINE_RATE = 200e6, 50e6


def parts(plan: FusionPlan) -> dict[str, tuple[int, int]]:
    """Parameters and bytes of each part of the JAM, the largest first."""
    found: dict[str, tuple[int, int]] = {}
    for key, tensor in plan.tensors.items():
        name = next(name for name, pattern in _PARTS if re.search(pattern, key))
        count, number = found.get(name, (0, 0))
        found[name] = count + tensor.spec.rows * tensor.spec.row_numel, number + tensor.spec.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def weight_bytes(plan: FusionPlan) -> int:
    """Bytes of all safetensors files of the JAM, their headers included."""
    specs = {key: tensor.spec for key, tensor in plan.tensors.items()}
    shards, _ = plan_shards(specs, plan.recipe.max_shard_size)
    return sum(file_size({key: specs[key] for key in keys}) for keys in shards.values())


def duration(plan: FusionPlan) -> str:
    """How long a fusion takes, in words: what is read and written, at rates that are said."""
    parents = [decoder.parent for decoder in (plan.text, plan.image)]
    read = sum(spec.nbytes for parent in parents for spec in parent.specs.values())
    fetched = sum(spec.nbytes for parent in parents if parent.headers_only for spec in parent.specs.values())
    took = _minutes((read + plan.num_bytes) / _DISK_RATE)
    line = f"about {took} to read {size(read)} and write {size(plan.num_bytes)} at 200 MB/s"
    if fetched:
        line += f"; before, about {_minutes(fetched / _LINE_RATE)} to fetch {size(fetched)} at 50 MB/s"
    return line


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(plan: FusionPlan, tensors: bool = True) -> str:
    """The dry run; without `tensors`, what is worth reading on every run."""
    config = plan.config
    shards, _ = plan_shards({key: t.spec for key, t in plan.tensors.items()}, plan.recipe.max_shard_size)
    parameters = sum(t.spec.rows * t.spec.row_numel for t in plan.tensors.values())
    lines = [
        f"JAM, fusion {plan.recipe.mode}, init {plan.recipe.init}"
        + (
            f", recipe {plan.digest[:16]}"
            if plan.digest
            else " (from "
            + (
                "config.json alone)"
                if any(d.parent.from_config for d in (plan.text, plan.image))
                else "the headers of the weights alone)"
            )
        ),
        *(
            f"  {d.parent.role}: {d.parent.name} ({d.kind}; {d.config.num_hidden_layers} layers, hidden size "
            f"{d.hidden_size}, {d.config.num_attention_heads} heads, vocabulary {d.vocab_size})"
            for d in (plan.text, plan.image)
        ),
        f"  vocabulary: {config.vocab_size}, image codes {config.image_token_range[0]}..{config.image_token_range[-1]}",
        f"  image codes of the image parent: {plan.vocabulary.codes_from}",
        f"  CM3 sentinels: {config.num_mask_tokens} from "
        f"{plan.vocabulary.tokenizer.convert_ids_to_tokens(config.mask_token_id)} on",
        f"  picture: {config.vq_config.sample_size}x{config.vq_config.sample_size} pixels, {config.image_seq_length} "
        "codes",
        f"  parameters: {parameters:,} ({config.dtype}; VQ model float32)",
        *(
            f"    {name}: {count:,} parameters, {size(number)}"
            for name, (count, number) in parts(plan).items()
            if tensors
        ),
        f"  disk: {size(plan.num_bytes)} in {len(shards)} file(s)"
        + (f", {weight_bytes(plan):,} bytes" if tensors else ""),
        f"  peak memory: about {size(peak_memory(plan))}",
        *([f"  time: {duration(plan)}"] if tensors else []),
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


def _grouped(plan: FusionPlan) -> dict[str, TensorPlan]:
    """One of each tensor that differs by its layer's number alone; the VQ model's are left out."""
    found: dict[str, tuple[str, TensorPlan]] = {}
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
