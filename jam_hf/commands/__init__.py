"""The commands of `jam-hf` beside the quickstart's stages: a module each, with `add_arguments` and `run`.

`fuse` is a stage too, and explains itself by that; the others have `HELP`.

`run` imports what it needs when it is called, so that the command line itself stays light.
"""

DEFAULT_RUN = "runs/quickstart"

# The quickstart's stages in words: importing the stages themselves would bring along all that they train and measure with.
STAGE_HELP = {
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
