"""`jam-hf quickstart`: the project's main job on a small world of its own, stage by stage, in one folder."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


# The quickstart's stages in words: importing the stages themselves would bring along all that they train and measure
# with.
STAGES = {
    "picture-world": "Make the picture world: texts, caption-image pairs, how-tos",
    "tokenizer": "Train the BPE tokenizer that the parents share, or one for each of unlike parents",
    "train-vq": "Train the VQ model on pictures, and measure what the scorer reads after a round trip",
    "encode": "Turn every document into token ids, the pictures' codes computed once",
    "train-llm": "Train the LLM parent on text",
    "train-image-model": "Train the image parent on captions and image tokens",
    "fuse": "Fuse the parents as uniform, width and cross; unlike parents as cross",
    "pretrain": "Stage 1: continued pretraining on texts and caption-image pairs with the CM3 objective",
    "instruct": "Stage 2: instruct tuning on how-to dialogues, with pretraining data mixed in",
    "write": "Let the fused model write interleaved documents and draw unseen captions",
    "evaluate": "Measure perplexity, divergence from the parents, and the share of unseen captions drawn right",
    "page": "Put it all on one page, `index.html`",
}
RESUMES = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """a toy from nothing to a picture book: data, parents, fusions, training and a page; or one STAGE of it"""

    stage: str | None = option(
        "one stage alone",
        None,
        unset="all that are not done, in order",
        nargs="?",
        choices=tuple(STAGES),
        positional=True,
    )
    run: str = option("folder of the run: a new one, or one that an earlier run made", "runs/quickstart")
    seed: int = option("of data, initialisation and training", 0)
    family: str = option(
        "architecture of the parents; unlike: a Qwen2 and a Chameleon, with different tokenizers",
        "llama",
        choices=("llama", "opt", "unlike"),
    )
    train_all: bool = option("train jam-uniform and jam-width as well", False)
    small: bool = option("the whole path in seconds, learning nothing", False)
    force: bool = option("run the stage although its result is there", False)


def run(options: Options) -> None:
    if options.force and options.stage is None:
        raise ValueError("--force is for one stage: name it, or delete the folder of the run to begin again.")
    from dataclasses import replace

    from jam_hf.quickstart.stages import QuickstartSettings, Run, run_all, run_stage

    settings = QuickstartSettings.of_family(options.family, options.small)
    run = Run(options.run, replace(settings, seed=options.seed, train_all=options.train_all))
    if options.stage is None:
        print(f"The page lies at {run_all(run)}")
    elif run_stage(run, options.stage, options.force):
        print(f"{options.stage}: done, in {run.folder}")
    else:
        print(f"{options.stage}: its result is in {run.folder} already (--force runs it again)")
