"""The quickstart's parents: two of one family over one tokenizer, or two unlike ones, each with a tokenizer of its own.

What depends on the pair is in their files: tokenizers, classes, how each parent's documents are encoded. How long
anything is trained, and in which order, is stages.py.
"""

from __future__ import annotations

from .lessons import Lesson
from .run import Run
from .shared_parents import SharedParents
from .unlike_parents import UnlikeParents, chameleon_like, qwen_like, with_image_logits


# jam_hf.quickstart.parents had all of these; imports by that name come here (_moved.py).
__all__ = ["Lesson", "SharedParents", "UnlikeParents", "chameleon_like", "parents_of", "qwen_like", "with_image_logits"]


def parents_of(run: Run) -> SharedParents | UnlikeParents:
    return UnlikeParents(run) if run.settings.family == "unlike" else SharedParents(run)
