"""Checkpoints read row by row and written shard by shard: the format, parents, plans of tensors, the writer."""

from .from_config import specs_of
from .parent import Parent
from .plan import Band, RowSource, TensorPlan, plan_shards
from .tensor_files import TensorFile, TensorFileWriter, TensorSpec, all_finite, row_blocks
from .writer import write_plans


__all__ = [
    "Band",
    "Parent",
    "RowSource",
    "TensorFile",
    "TensorFileWriter",
    "TensorPlan",
    "TensorSpec",
    "all_finite",
    "plan_shards",
    "row_blocks",
    "specs_of",
    "write_plans",
]
