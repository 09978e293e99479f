"""`jam-hf index`: a memory of captioned pictures for a JAM. It parses arguments and calls the library."""

from __future__ import annotations

import argparse


HELP = "build an index of captioned pictures, as generate(memory=...) takes it"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="JAM that will use it: folder or Hub id")
    command.add_argument(
        "--pairs", required=True, help="folder of pictures with metadata.jsonl, or of a saved dataset with image and text"
    )
    command.add_argument("--output", required=True, help="folder of the index")
    command.add_argument("--embedder", help="CLIP model: folder or Hub id (default: openai/clip-vit-base-patch32)")
    command.add_argument("--embedder-revision", help="branch, tag or commit on the Hub")
    command.add_argument("--num-documents", type=int, default=2, help="documents put before a prompt, at most (default: 2)")
    command.add_argument("--max-score", type=float, default=0.9, help="what scores more is a near-duplicate (default: 0.9)")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..data.readers import read_pairs
    from ..files import check_apart, check_free
    from ..model.processing_jam import JamProcessor
    from ..retrieval import ClipEmbedder, RetrievalSettings, build_index
    from ..retrieval.build import load_vq_model
    from ..retrieval.embedder import DEFAULT_EMBEDDER
    from ..retrieval.index import check_faiss

    try:
        check_faiss()
    except ImportError as error:
        raise ValueError(str(error)) from error
    settings = RetrievalSettings(args.num_documents, args.max_score)
    check_apart(args.output, args.model, args.pairs, args.embedder)
    check_free(args.output, args.overwrite)
    pairs = read_pairs(args.pairs)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    embedder = ClipEmbedder(args.embedder or DEFAULT_EMBEDDER, args.embedder_revision, device)
    index = build_index(
        pairs,
        load_vq_model(args.model).to(device),
        JamProcessor.from_pretrained(args.model, trust_remote_code=False),
        args.output,
        embedder=embedder,
        settings=settings,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    print(f"index: {args.output} ({len(index)} documents)")
