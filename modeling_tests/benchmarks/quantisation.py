"""What quantisation costs a JAM: perplexity, KL per token to the float model, codes of the VQ model, and bytes.

    python modeling_tests/benchmarks/quantisation.py --checkpoint runs/quickstart/jam-cross

Without a checkpoint it makes a tiny one, whose VQ model has attention, and trains it for a minute. Documents are
picture world's validation texts and pairs. Each variant is loaded by `from_pretrained` as a user would; a "plain call"
names no module.
Only by hand is the VQ model quantised (its weights rounded, one scale for each output channel): no library finds it.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from datasets import Dataset
from PIL import Image
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from jam_hf import JamConfig, JamForCausalLM, JamImageProcessor, JamProcessor, JamVQConfig, JamVQModel
from jam_hf.data.collator import JamDataCollator
from jam_hf.data.sequences import encode_documents
from jam_hf.evaluation.perplexity import divergence, perplexity
from jam_hf.model.modeling_jam_vq import JamVQLinear
from jam_hf.picture_world.dataset import PictureWorldSizes, build_pairs, build_texts, build_vq_pictures
from jam_hf.training.tokenizer import train_tokenizer
from jam_hf.training.vq import VQTrainingSettings, encode_images, train_vq


CROSS = [r".*text_cross", r".*image_cross", r".*output_projection"]
HEADS = ["lm_head", "image_head"]


def _torchao(skip: list[str] | None) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)


def _eight(skip: list[str] | None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)


def _four(skip: list[str] | None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)


# Name: how the configuration is made, modules that are kept, bits of the VQ model's weights (None: float).
VARIANTS: dict[str, tuple[Callable, list[str] | None, int | None]] = {
    "torchao int8, everything": (_torchao, ["-"], 8),
    "torchao int8, heads too": (_torchao, ["-"], None),
    "torchao int8, plain call": (_torchao, None, None),
    "torchao int8, cross blocks kept": (_torchao, [*HEADS, *CROSS], None),
    "bitsandbytes 8-bit, plain call": (_eight, None, None),
    "bitsandbytes 8-bit, cross blocks kept": (_eight, [*HEADS, *CROSS], None),
    "bitsandbytes 4-bit, VQ model too": (_four, None, 4),
    "bitsandbytes 4-bit, plain call": (_four, None, None),
    "bitsandbytes 4-bit, cross blocks kept": (_four, [*HEADS, *CROSS], None),
}


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored, scales included."""

    def size(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        scales = []
        if isinstance(tensor, Params4bit) and tensor.quant_state is not None:
            scales = [tensor.quant_state.absmax]
        elif isinstance(tensor, Int8Params) and tensor.SCB is not None:
            scales = [tensor.SCB]
        return sum(part.numel() * part.element_size() for part in (tensor.data, *scales))

    return sum(size(tensor) for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def round_vq(model: JamVQModel, bits: int) -> None:
    """Round the weights of convolutions and linear layers in place: symmetric, one scale for each output channel."""
    largest = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, JamVQLinear)):
            scale = module.weight.abs().flatten(1).amax(1).clamp(min=1e-12) / largest
            scale = scale.view(-1, *[1] * (module.weight.dim() - 1))
            module.weight.copy_((module.weight / scale).round() * scale)


def make_checkpoint(folder: Path) -> Path:
    """A tiny JAM-Cross with attention in its VQ model, trained for about a minute on picture world."""
    sizes = PictureWorldSizes(texts=300, pairs=300, howtos=1, validation=1, unseen=1)
    texts, pairs = build_texts(1, sizes)["train"], build_pairs(1, sizes)["train"]
    vq_config = {"block_out_channels": (8, 16, 32, 64), "layers_per_block": 1, "latent_channels": 32, "sample_size": 48}
    torch.manual_seed(0)
    vq = JamVQModel(JamVQConfig(**vq_config, num_vq_embeddings=128, norm_num_groups=4, mid_block_add_attention=True))
    train_vq(vq, build_vq_pictures(1, 300), VQTrainingSettings(steps=150, warmup_steps=100))
    tokenizer = train_tokenizer([*texts["text"], *pairs["caption"]], 500, 128)
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.06}
    model = JamForCausalLM(JamConfig(text_config=text, vq_config=vq.config))
    model.model.vq_model.load_state_dict(vq.state_dict())
    documents = [*encode(texts, tokenizer, vq), *encode(pairs, tokenizer, vq)]
    collator = JamDataCollator(0, len(tokenizer))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        chosen = torch.randint(len(documents), (16,), generator=generator).tolist()
        model(**collator([documents[i] for i in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    JamProcessor(JamImageProcessor.from_size(48), tokenizer, image_seq_length=36).save_pretrained(folder)
    return folder


def encode(dataset: Dataset, tokenizer: Any, vq: JamVQModel) -> Dataset:
    return encode_documents(dataset, tokenizer, lambda images: encode_images(vq, images))


def measure(
    model: JamForCausalLM, original: JamForCausalLM, texts: Dataset, pairs: Dataset, images: list[Image.Image]
) -> dict[str, float]:
    """Perplexities, KL(original || model) per token over the whole vocabulary, and the VQ model against the original's.

    codes_agree: share of codes that both make of `images`. pixel_error: root mean square between their pixels (of [-1,
    1]) for the same codes.
    """
    first, vocabulary = original.config.image_token_offset, (0, original.config.vocab_size)
    codes = (first, first + original.config.num_image_tokens)
    result = {"megabytes": stored_bytes(model) / 2**20}  # before it runs: bitsandbytes repacks on some CPUs
    pair = perplexity(model, pairs, codes)
    result |= {"text": perplexity(model, texts, codes).perplexity}
    result |= {"caption": pair.text_perplexity, "image": pair.image_perplexity}
    result["kl_texts"] = divergence(original, model, texts, vocabulary)
    result["kl_pairs"] = divergence(original, model, pairs, vocabulary)
    vq, original_vq = model.model.vq_model, original.model.vq_model
    expected = encode_images(original_vq, images)
    result["codes_agree"] = float((encode_images(vq, images) == expected).mean())
    pixels = [candidate.decode(torch.from_numpy(expected)) for candidate in (vq, original_vq)]
    result["pixel_error"] = float((pixels[0] - pixels[1]).square().mean().sqrt())
    return {name: round(value, 6) for name, value in result.items()}


def print_row(name: str, row: dict[str, float]) -> None:
    print(f"{name:38s}" + "".join(f"{value:12.5f}" for value in row.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", help="folder of a JAM whose tokenizer is beside it; a tiny one is made where left out"
    )
    parser.add_argument("--documents", type=int, default=100, help="validation texts, and as many pairs")
    arguments = parser.parse_args()
    for name in ("bitsandbytes", "torchao", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.checkpoint) if arguments.checkpoint else make_checkpoint(Path(scratch))
        original = JamForCausalLM.from_pretrained(folder).eval()
        tokenizer = JamProcessor.from_pretrained(folder).tokenizer
        sizes = PictureWorldSizes(texts=1, pairs=1, howtos=1, validation=arguments.documents, unseen=1)
        splits = build_texts(0, sizes)["validation"], build_pairs(0, sizes)["validation"]
        texts, pairs = (encode(split, tokenizer, original.model.vq_model) for split in splits)
        images = list(splits[1]["image"])
        results = {"float32": measure(original, original, texts, pairs, images)}
        print(f"{'':38s}" + "".join(f"{column:>12s}" for column in results["float32"]))
        print_row("float32", results["float32"])
        for name, (make, skip, bits) in VARIANTS.items():
            model = JamForCausalLM.from_pretrained(folder, quantization_config=make(skip), device_map="cpu").eval()
            if bits is not None:
                round_vq(model.model.vq_model, bits)
            results[name] = measure(model, original, texts, pairs, images)
            print_row(name, results[name])
    tokens = {"documents": arguments.documents, "checkpoint": arguments.checkpoint or "tiny"}
    print(json.dumps({"benchmark": "quantisation", **tokens, "variants": results, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
