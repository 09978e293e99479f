"""An index of captioned pictures: built with a JAM's VQ model and CLIP, searched with FAISS, put before prompts and
documents.

The model knows nothing of this folder: what it asks of a retriever is a protocol in generation/retrieval_prompts.py.
FAISS is an extra: `pip install jam_hf[retrieval]`.
"""

from .augmentation import documents_with_memory, documents_with_retrieval, stack_codes
from .build import build_index
from .embedder import ClipEmbedder, Embedder
from .index import MemoryIndex, RetrievalIndex, RetrievalSettings, RetrievedDocument, load_index


__all__ = [
    "ClipEmbedder",
    "Embedder",
    "MemoryIndex",
    "RetrievalIndex",
    "RetrievalSettings",
    "RetrievedDocument",
    "build_index",
    "documents_with_memory",
    "documents_with_retrieval",
    "load_index",
    "stack_codes",
]
