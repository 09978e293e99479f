"""Quantised JAMs by transformers' own calls: torchao int8 and bitsandbytes 8 and 4 bit, here on the CPU.

The oracle is the float model with the weights that the library itself gives back (dequantised). The VQ model here has
attention, so that there are linear layers in it which must stay as they are.
"""

import copy

import pytest
import torch
from conftest import VQ_SETTINGS, parent_model, random_ids
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import jam_hf
from jam_hf import JamForCausalLM, JamVQConfig, JamVQModel
from jam_hf.training.adapters import lora_config


pytest.importorskip("torchao")
bitsandbytes = pytest.importorskip("bitsandbytes")
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402
from torchao.utils import TorchAOBaseTensor  # noqa: E402


METHODS = {
    "torchao": lambda **kwargs: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kwargs.get("skip")),
    "8bit": lambda **kwargs: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kwargs.get("skip")),
    "4bit": lambda **kwargs: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kwargs.get("skip")
    ),
}
LABELS = {"torchao": "torchao int8 weight-only", "8bit": "bitsandbytes 8-bit", "4bit": "bitsandbytes 4-bit (nf4)"}
MODES = [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")]


def every_method_and_mode(feature: str, modes: list[tuple[str, str]] = MODES):
    """Parametrised by method, mode and init; each method is a feature of its own."""
    return pytest.mark.parametrize(
        ("method", "mode", "init"),
        [
            pytest.param(method, *mode, marks=pytest.mark.feature("Quantisation", feature.format(LABELS[method])))
            for method in METHODS
            for mode in modes
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """`folder(mode, init)` -> a JAM whose VQ model has attention and whose cross blocks say something.

    Its sizes are multiples of 64, the block of bitsandbytes' 4-bit weights.
    """
    parents = []
    for seed, role in ((1, "text"), (2, "image")):
        parent = parent_model("llama", len(tokenizer), seed, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        with torch.no_grad():  # of a size that keeps attention from deciding between near ties
            for parameter in parent.parameters():
                parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
        parents.append(tmp_path_factory.mktemp(role))
        parent.save_pretrained(parents[-1])
        tokenizer.save_pretrained(parents[-1])
    torch.manual_seed(0)
    vq = JamVQModel(JamVQConfig(**{**VQ_SETTINGS, "mid_block_add_attention": True})).eval()
    with torch.no_grad():  # each code is what the encoder says of some place, so that many are in use
        latents = vq.vq.encode(pictures()).latents.permute(0, 2, 3, 1).flatten(0, 2)
        vq.vq.quantize.embedding.weight.copy_(latents[: vq.config.num_vq_embeddings])
    made = {}

    def make(mode, init):
        if (mode, init) not in made:
            path = jam_hf.fuse(*parents, mode, tmp_path_factory.mktemp("quantised") / "jam", init=init, vq_model=vq)
            model = JamForCausalLM.from_pretrained(path)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "_cross." in name and parameter.dim() > 1:
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(path)
            made[mode, init] = path
        return made[mode, init]

    return make


def load(path, method, **kwargs) -> JamForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=METHODS[method](**kwargs), device_map="cpu"
    ).eval()


def quantised(model: nn.Module) -> set[str]:
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) or isinstance(getattr(module, "weight", None), TorchAOBaseTensor)
    }


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.sampled
@every_method_and_mode("{}")
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_weights(method, mode, init, folder):
    model, original = load(folder(mode, init), method), JamForCausalLM.from_pretrained(folder(mode, init)).eval()
    ids = random_ids(original, 2, 10)
    logits, exact = model(input_ids=ids).logits, original(input_ids=ids).logits
    if method == "torchao":
        oracle = copy.deepcopy(original)
        for name in quantised(model):
            oracle.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    else:
        oracle = load(folder(mode, init), method).dequantize().eval()
    assert quantised(model) and not quantised(oracle)
    expected = oracle(input_ids=ids).logits
    # bitsandbytes computes in half precision, and rounds the activations to 8 bits as well
    assert _distance(logits, expected, exact) < {"torchao": 1e-5, "8bit": 0.03, "4bit": 0.02}[method]
    assert 0 < _distance(expected, exact, exact) < (0.4 if method == "4bit" else 0.03)


def _distance(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations of `scale`."""
    return float((one - other).square().mean().sqrt() / scale.std())


@pytest.mark.sampled
@every_method_and_mode("{}")
def test_heads_and_the_vq_model_are_not_quantised(method, mode, init, folder):
    original = JamForCausalLM.from_pretrained(folder(mode, init))
    linear = {name: module for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    expected = {
        name
        for name, module in linear.items()
        # bitsandbytes leaves subclasses of nn.Linear: the last projections of a cross block, which start at zero
        if "language_model" in name and (method == "torchao" or type(module) is nn.Linear)
    }
    assert quantised(load(folder(mode, init), method)) == expected


@pytest.mark.sampled
@every_method_and_mode("{}: the VQ model keeps its codes", MODES[2:3])
@pytest.mark.parametrize("skip", [None, ["lm_head"]], ids=["plain call", "skip list of the user"])
@torch.no_grad()
def test_codes_and_pixels_are_those_of_the_float_model(method, skip, mode, init, folder):
    model, original = load(folder(mode, init), method, skip=skip), JamForCausalLM.from_pretrained(folder(mode, init))
    codes = original.get_image_tokens(pictures())
    assert len(codes.unique()) > 2
    assert torch.equal(model.get_image_tokens(pictures()), codes)
    assert torch.equal(model.decode_image_tokens(codes), original.decode_image_tokens(codes))
    assert not any("vq_model" in name for name in quantised(model))
    assert not any(parameter.requires_grad for parameter in model.model.vq_model.parameters())
    assert ("image_head" in quantised(model)) == (
        skip is not None
    )  # as the stock skip list: what it names, and no more


@pytest.mark.sampled
@every_method_and_mode("{}: saved and loaded")
@torch.no_grad()
def test_a_quantised_checkpoint_comes_back(method, mode, init, folder, tmp_path):
    model = load(folder(mode, init), method)
    # Saved before it runs: on CPUs for which bitsandbytes repacks 4-bit weights, it spoils a model (a stock Llama too)
    # that is saved after it has run.
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, JamForCausalLM) and quantised(again) == quantised(model) != set()
    ids = random_ids(model, 2, 10)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(again.get_image_tokens(pictures()), model.get_image_tokens(pictures()))
    sizes = [sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (tmp_path, folder(mode, init))]
    assert sizes[0] < sizes[1]


@pytest.mark.sampled
@every_method_and_mode("{}: pictures are drawn", MODES[:3])
def test_pictures_are_drawn(method, mode, init, folder, processor):
    model = load(folder(mode, init), method)
    prompt = processor(text="a red circle", return_tensors="pt")
    output = model.generate(**prompt, generation_mode="image", do_sample=False)
    for segments in processor.post_process_interleaved(output, model, prompt["input_ids"].shape[1]):
        assert [s["image"].size for s in segments if s["type"] == "image"] == [(16, 16)]


@pytest.mark.sampled
@every_method_and_mode("{}: LoRA on top (QLoRA)", MODES[:3])
def test_an_adapter_on_a_quantised_base_learns(method, mode, init, folder, processor):
    model = prepare_model_for_kbit_training(load(folder(mode, init), method))
    peft_model = get_peft_model(model, lora_config(model, r=4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    text = processor.tokenizer("red<break>" + "<image>" * 16 + "<break></s>", return_tensors="pt")["input_ids"].repeat(
        2, 1
    )
    batch = {"input_ids": text, "labels": text, "pixel_values": pictures(2)}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, value in model.state_dict().items():
        if name in before and not isinstance(value, TorchAOBaseTensor):
            assert torch.equal(value, before[name]) == (name not in trainable), name
