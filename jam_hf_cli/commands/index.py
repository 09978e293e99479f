"""`jam-hf index`: captioned pictures that a JAM looks things up in. It calls the library and knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


RESUMES = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """build an index of captioned pictures, as `generate --retriever` takes it"""

    model: str = option("JAM that will use it: folder or Hub id")
    pairs: str = option("folder of pictures with metadata.jsonl, or of a saved dataset with image and text")
    output: str = option("folder of the index")
    embedder: str = option("CLIP model: folder or Hub id", "openai/clip-vit-base-patch32")
    embedder_revision: str | None = option("branch, tag or commit on the Hub", None, unset="its main branch")
    num_documents: int = option("documents put before a prompt, at most", 2)
    max_score: float = option("what scores more is a near-duplicate", 0.9)
    batch_size: int = option("pictures at a time", 64)
    device: str | None = option("cpu, cuda, ...", None, unset="a GPU where there is one")
    overwrite: bool = option("replace the output folder", False)


def run(options: Options) -> None:
    import torch

    from jam_hf import JamProcessor
    from jam_hf.data.readers import read_pairs
    from jam_hf.files import check_apart, check_free
    from jam_hf.retrieval import ClipEmbedder, RetrievalSettings, build_index
    from jam_hf.retrieval.build import load_vq_model
    from jam_hf.retrieval.index import check_faiss

    check_faiss()
    settings = RetrievalSettings(options.num_documents, options.max_score)
    check_apart(options.output, options.model, options.pairs, options.embedder)
    check_free(options.output, options.overwrite)
    pairs = read_pairs(options.pairs)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    embedder = ClipEmbedder(options.embedder, options.embedder_revision, device)
    index = build_index(
        pairs,
        load_vq_model(options.model).to(device),
        JamProcessor.from_pretrained(options.model, trust_remote_code=False),
        options.output,
        embedder=embedder,
        settings=settings,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    print(f"index: {options.output} ({len(index)} documents)")
