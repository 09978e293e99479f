"""Small parents of the real classes, with tokenizers of their own kind, and what each parent itself says of a document.

Text parents: Llama and Mistral with SentencePiece-like tokenizers, Qwen2, Qwen3 and OPT with byte-level ones. Image parents: a
plain causal LM whose vocabulary ends in codes, Chameleon, Emu3, Janus. No tokenizer is another's; no two vocabularies agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jam_hf import JamVQConfig, JamVQModel


NUM_CODES = 16
GRID = 4
TEXT_KINDS = ("llama", "mistral", "qwen2", "qwen3", "opt")
IMAGE_KINDS = ("plain", "chameleon", "emu3", "janus")
SENTENCES = {
    "text": ["a small red circle in the top left of a picture", "a ruby is red and the sky is blue, the sea is deep"],
    "image": ["the large blue square in the centre of the picture", "a red ruby and a deep sea, in the sky"],
}


@dataclass(frozen=True)
class Sizes:
    hidden: int = 32
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 48


def randomise(model: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Weights that leave nothing at zero or one, so that no comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * std if parameter.dim() > 1 else parameter + 0.1 * noise)


def byte_level_tokenizer(texts: list[str], size: int, specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def sentencepiece_like_tokenizer(texts: list[str], size: int, specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """As Llama's: a space is U+2581, a text gets one in front, unknown letters fall back to bytes `<0x41>`."""
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, max_token_length=12))
    learned = json.loads(trained.to_str())["model"]
    names = [
        "<unk>",
        *specials,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *specials])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **roles)


SMALL = Sizes()


def text_parent(kind: str, sizes: Sizes = SMALL, seed: int = 1) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal LM with random weights, and its tokenizer."""
    common = {"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "hidden_size": sizes.hidden}
    rotary = {**common, "intermediate_size": sizes.ffn, "num_key_value_heads": sizes.kv_heads, "max_position_embeddings": 256}
    if kind in ("llama", "mistral"):
        tokenizer = sentencepiece_like_tokenizer(SENTENCES["text"], 80, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    elif kind == "opt":
        tokenizer = byte_level_tokenizer(
            SENTENCES["text"], 300, ["<s>", "<pad>", "</s>"], bos_token="</s>", eos_token="</s>", pad_token="<pad>"
        )
    else:
        tokenizer = byte_level_tokenizer(
            SENTENCES["text"], 300, ["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )
        tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = len(tokenizer) + 5  # padded, as public vocabularies are
    if kind == "llama":
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=size, rope_parameters=rope, **rotary, **ids))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(vocab_size=size, sliding_window=None, head_dim=8, **rotary, **ids))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=size, tie_word_embeddings=True, **rotary, **ids))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=size, head_dim=16, **rotary, **ids))
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=size,
                ffn_dim=sizes.ffn,
                dropout=0.0,
                max_position_embeddings=256,
                word_embed_proj_dim=sizes.hidden,
                **common,
                **ids,
            )
        )
    randomise(model, seed)
    return model.eval(), tokenizer


def image_parent(
    kind: str, sizes: Sizes = SMALL, seed: int = 2, like: str = "llama"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An image model with random weights, and its tokenizer. `like`: the family of a plain one."""
    codes = {
        "plain": [f"<img:{i}>" for i in range(NUM_CODES)],
        "chameleon": [f"IMGIMG{''.join(chr(ord('A') + int(c)) for c in str(i))}Z" for i in range(NUM_CODES)],
        "emu3": [f"<|visual token {i:06d}|>" for i in range(NUM_CODES)],
        "janus": [],
    }[kind]
    markup = {
        "plain": ["<break>"],
        "chameleon": ["<racm3:break>", "<eoss>", "<image>"],
        "emu3": ["<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>", "<image>"],
        "janus": ["<begin_of_image>", "<end_of_image>", "<image_placeholder>"],
    }[kind]
    marks = {
        "plain": {},
        "chameleon": {"boi_token": "<racm3:break>", "eoi_token": "<eoss>", "image_token": "<image>"},
        "emu3": {
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
            "image_token": "<image>",
        },
        "janus": {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    }[kind]
    # Codes and markup first and in a wild order: no row stands where a plain range would have it.
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [codes[i] for i in order] if kind != "plain" else []
    tokenizer = byte_level_tokenizer(
        SENTENCES["image"],
        320 + len(shuffled),
        ["<s>", "<pad>", "</s>", "<unk>", *markup, *shuffled],
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=marks,
    )
    if kind == "plain":
        tokenizer.add_tokens([AddedToken(code, special=True) for code in codes])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rotary = {
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 256,
        "vocab_size": len(tokenizer),
    }
    if kind == "plain":
        model, _ = text_parent(like, sizes, seed)
        config = model.config
        config.vocab_size = len(tokenizer)
        for name, value in ids.items():
            setattr(config, name, value)
        model = type(model)(config)
    elif kind == "chameleon":
        vq = {
            "embed_dim": 4,
            "num_embeddings": NUM_CODES,
            "latent_channels": 4,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        }
        config = ChameleonConfig(vocabulary_map=tokenizer.get_vocab(), vq_config=vq, **rotary, **ids)
        model = ChameleonForConditionalGeneration(config)
    elif kind == "emu3":
        vq = {
            "codebook_size": NUM_CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
        }
        config = Emu3Config(vocabulary_map=tokenizer.get_vocab(), vq_config=vq, text_config={**rotary, **ids})
        model = Emu3ForConditionalGeneration(config)
    else:
        vq = {
            "embed_dim": 4,
            "num_embeddings": NUM_CODES,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "projection_dim": sizes.hidden,
            "image_token_embed_dim": sizes.hidden,
        }
        vision = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": sizes.hidden,
        }
        config = JanusConfig(
            text_config={"model_type": "llama", **rotary, **ids},
            vision_config=vision,
            vq_config=vq,
            image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
            tie_word_embeddings=False,
        )
        model = JanusForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval(), tokenizer


def vq_model() -> JamVQModel:
    """A VQ model over as many codes as the parents have."""
    torch.manual_seed(0)
    model = JamVQModel(
        JamVQConfig(
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            sample_size=GRID * 4,
            num_vq_embeddings=NUM_CODES,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    ).eval()
    with torch.no_grad():  # codes far apart, so that no near tie decides
        model.vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def code_rows(kind: str, tokenizer: PreTrainedTokenizerFast) -> torch.LongTensor | None:
    """The parent's id of each code, by its own names; None for Janus, whose codes are no tokens."""
    names = {
        "plain": lambda i: f"<img:{i}>",
        "chameleon": lambda i: f"IMGIMG{''.join(chr(ord('A') + int(c)) for c in str(i))}Z",
        "emu3": lambda i: f"<|visual token {i:06d}|>",
    }
    if kind == "janus":
        return None
    return torch.tensor([tokenizer.convert_tokens_to_ids(names[kind](i)) for i in range(NUM_CODES)])


@torch.no_grad()
def image_parent_logits(
    kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: list[str], codes: torch.LongTensor
) -> torch.Tensor:
    """What the parent itself thinks of a caption and a picture: logits of the codes, `[T, K]`.

    tokens: the caption and the opening mark, as the parent's own tokens. codes: int64, the picture so far.
    """
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    if kind == "janus":
        text = model.get_input_embeddings()(ids)
        pictures = model.prepare_embeddings_for_image_generation(codes)
        states = model.model.language_model(inputs_embeds=torch.cat((text, pictures))[None]).last_hidden_state
        return model.model.generation_head(states)[0]
    rows = code_rows(kind, tokenizer)
    ids = torch.cat((ids, rows[codes]))[None]
    if kind == "chameleon":  # its own forward masks the codes
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state)
    else:
        logits = model(input_ids=ids).logits
    return logits[0][:, rows]
