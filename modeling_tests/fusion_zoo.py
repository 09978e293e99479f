"""Small parents of the real classes, with tokenizers of their own kind, and what each parent itself says of documents.

Text parents: Llama and Mistral with SentencePiece-like tokenizers, Qwen2, Qwen3 and OPT with byte-level ones. Image
parents: a plain causal LM whose vocabulary ends in codes, Chameleon, Emu3, Janus. No tokenizer is another's; no two
vocabularies agree, unless a tokenizer is given.
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

from jam_hf import JamConfig, JamVQConfig, JamVQModel


NUM_CODES = 16
GRID = 4
TEXT_KINDS = ("llama", "mistral", "qwen2", "qwen3", "opt")
IMAGE_KINDS = ("plain", "chameleon", "emu3", "janus")
# Every image parent: name -> arguments of `image_parent`.
IMAGE_PARENTS = {
    **{f"{like}-lm": {"kind": "plain", "like": like} for like in TEXT_KINDS},
    "chameleon": {"kind": "chameleon"},
    "chameleon-swin": {"kind": "chameleon", "swin_norm": True},
    "emu3": {"kind": "emu3"},
    "janus": {"kind": "janus"},
}
# Families that compute the same from the same weights may be averaged and widened with each other: text kind -> image
# parents.
SAME_ARITHMETIC = {
    "llama": {"llama-lm", "mistral-lm", "emu3", "janus"},
    "mistral": {"llama-lm", "mistral-lm", "emu3", "janus"},
    "qwen2": {"qwen2-lm"},
    "qwen3": {"qwen3-lm"},
    "opt": {"opt-lm"},
}
# Settings that rotary families have different defaults for; with these, their decoders are alike.
EQUAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rms_norm_eps": 1e-5}
PICTURES = [[(7 * i + 3 * j) % NUM_CODES for i in range(GRID * GRID)] for j in range(2)]
PROMPTS = ["the small circle is red, ruby", "a sea"]
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


def randomise(model: torch.nn.Module, seed: int, std: float) -> None:
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
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def sentencepiece_like_tokenizer(
    texts: list[str], size: int, specials: list[str], **roles: str
) -> PreTrainedTokenizerFast:
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


def padded(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of a vocabulary: more than it has tokens, and a multiple of 64, as public ones are.

    Where it is no multiple of 4, BLAS does the last columns by another kernel, with other last bits.
    """
    return 64 * (len(tokenizer) // 64 + 1)


_CAUSAL_LMS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
}


def text_parent(
    kind: str, sizes: Sizes = SMALL, seed: int = 1, tokenizer: PreTrainedTokenizerFast | None = None, **changes
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal LM with random weights, and its tokenizer. `changes`: fields of its config."""
    common = {"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "hidden_size": sizes.hidden}
    rotary = {
        **common,
        "intermediate_size": sizes.ffn,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 256,
    }
    if tokenizer is not None:
        pass
    elif kind in ("llama", "mistral"):
        tokenizer = sentencepiece_like_tokenizer(
            SENTENCES["text"], 80, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>"
        )
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
    size = padded(tokenizer)
    if kind == "llama":
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        settings = {"rope_parameters": rope, **rotary}
    elif kind == "mistral":
        settings = {"sliding_window": None, "head_dim": 8, **rotary}
    elif kind == "qwen2":
        settings = {"tie_word_embeddings": True, **rotary}
    elif kind == "qwen3":
        settings = {"head_dim": 16, **rotary}
    else:
        settings = {
            "ffn_dim": sizes.ffn,
            "dropout": 0.0,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": sizes.hidden,
            **common,
        }
    config_class, model_class = _CAUSAL_LMS[kind]
    model = model_class(config_class(**{"vocab_size": size, **settings, **ids, **changes}))
    randomise(model, seed, sizes.hidden**-0.5)
    return model.eval(), tokenizer


def image_parent(
    kind: str, sizes: Sizes = SMALL, seed: int = 2, like: str = "llama", **changes
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An image model with random weights, and its tokenizer.

    like: the family of a plain one. changes: fields of its config, or of that of its decoder.
    """
    codes = code_names(kind) or []
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
        "vocab_size": padded(tokenizer),
    }
    tied = {"tie_word_embeddings": changes.get("tie_word_embeddings", False)}
    rotary |= ids
    if kind == "plain":
        return text_parent(like, sizes, seed, tokenizer, **changes)
    rotary |= changes
    if kind == "chameleon":
        vq = {
            "embed_dim": 4,
            "num_embeddings": NUM_CODES,
            "latent_channels": 4,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        }
        config = ChameleonConfig(vocabulary_map=tokenizer.get_vocab(), vq_config=vq, **rotary)
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
        config = Emu3Config(vocabulary_map=tokenizer.get_vocab(), vq_config=vq, text_config=rotary, **tied)
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
            text_config={"model_type": "llama", **rotary},
            vision_config=vision,
            vq_config=vq,
            image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
            **tied,
        )
        model = JanusForConditionalGeneration(config)
    randomise(model, seed, sizes.hidden**-0.5)
    return model.eval(), tokenizer


def vq_model(grid: int = GRID) -> JamVQModel:
    """A VQ model over as many codes as the parents have, for pictures of `grid` x `grid` codes."""
    torch.manual_seed(0)
    model = JamVQModel(
        JamVQConfig(
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            sample_size=grid * 4,
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


def code_names(kind: str) -> list[str] | None:
    """The parent's own names of the codes; None for Janus, whose codes are no tokens."""
    letters = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z" for i in range(NUM_CODES)]
    return {
        "plain": [f"<img:{i}>" for i in range(NUM_CODES)],
        "chameleon": letters,
        "emu3": [f"<|visual token {i:06d}|>" for i in range(NUM_CODES)],
        "janus": None,
    }[kind]


def parents_picture(kind: str, codes: list[int]) -> list[str | int]:
    """A square picture as the parent writes it, mark to mark: its tokens by their names, codes by their numbers."""
    grid = round(len(codes) ** 0.5)
    rows = [codes[first : first + grid] for first in range(0, len(codes), grid)]
    if kind == "emu3":
        row_ends = [entry for row in rows for entry in (*row, "<|extra_200|>")]
        size = (*str(grid), "*", *str(grid))
        return ["<|image start|>", *size, "<|image token|>", *row_ends, "<|extra_201|>", "<|image end|>"]
    begin, end = {
        "plain": ("<break>", "<break>"),
        "chameleon": ("<racm3:break>", "<eoss>"),
        "janus": ("<begin_of_image>", "<end_of_image>"),
    }[kind]
    return [begin, *codes, end]


def jams_picture(config: JamConfig, codes: list[int]) -> list[int]:
    """The same as a JAM writes it: token ids."""
    left = iter(codes)
    inside = [next(left) + config.image_token_offset if entry == -1 else entry for entry in config.picture_template]
    return [config.break_token_id, *inside, config.picture_end_token_id]


class ImageParent:
    """An image parent's own logits of the codes."""

    def __init__(self, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.kind, self.model, self.tokenizer = kind, model, tokenizer
        names = code_names(kind)
        self.rows = None if names is None else torch.tensor(tokenizer.convert_tokens_to_ids(names))

    @torch.no_grad()
    def logits(self, documents: list[list[str | int]], **kwargs) -> tuple[torch.Tensor, object]:
        """`[B, T, K]` and the cache; documents of one length, tokens by name and codes by number."""
        if self.kind == "janus":
            embeds = torch.stack([torch.cat([self._janus_row(entry) for entry in row]) for row in documents])
            output = self.model.model.language_model(inputs_embeds=embeds, **kwargs)
            return self.model.model.generation_head(output.last_hidden_state), output.past_key_values
        ids = torch.tensor(
            [
                [self.rows[e].item() if isinstance(e, int) else self.tokenizer.convert_tokens_to_ids(e) for e in row]
                for row in documents
            ]
        )
        if self.kind == "chameleon":  # its own forward masks the codes
            output = self.model.model(input_ids=ids, **kwargs)
            logits = self.model.lm_head(output.last_hidden_state)
        else:
            output = self.model(input_ids=ids, **kwargs)
            logits = output.logits
        return logits[..., self.rows], output.past_key_values

    def _janus_row(self, entry: str | int) -> torch.Tensor:
        if isinstance(entry, int):
            return self.model.prepare_embeddings_for_image_generation(torch.tensor([entry]))
        return self.model.get_input_embeddings()(torch.tensor([self.tokenizer.convert_tokens_to_ids(entry)]))


def readings(read, documents, pad):
    """What `read(documents, **kwargs) -> (logits, cache)` says of every token, `[tokens, ...]`: first of all documents
    at once, padded on the left, then of the longest in pieces, with a cache, the last five tokens one by one.
    """
    length = max(map(len, documents))
    padding = [length - len(document) for document in documents]
    mask = torch.tensor([[0] * pads + [1] * (length - pads) for pads in padding])
    together, _ = read([[pad] * pads + document for pads, document in zip(padding, documents)], attention_mask=mask)
    longest = max(documents, key=len)
    steps, cache = [], None
    for piece in [longest[:-5], *([token] for token in longest[-5:])]:
        logits, cache = read([piece], past_key_values=cache, use_cache=True)
        steps.append(logits)
    return torch.cat((together[mask.bool()], torch.cat(steps, dim=1)[0]))


def reader(model, first=0, last=None):
    """`read` of a causal LM; columns `[first, last)` of its logits."""

    def read(rows, **kwargs):
        with torch.no_grad():
            output = model(input_ids=torch.tensor(rows), **kwargs)
        return output.logits[..., first:last], output.past_key_values

    return read


def code_reader(model):
    first = model.config.image_token_offset
    return reader(model, first, first + NUM_CODES)


def common_tokens(jam_tokenizer, image_tokenizer):
    """Tokens of several letters that both tokenizers have: (the JAM's ids, the image parent's tokens)."""

    def letters(token):
        return token.replace("\u2581", " ").replace("\u0120", " ")

    ours = {letters(token): index for token, index in jam_tokenizer.get_vocab().items()}
    theirs = [
        token for token in sorted(image_tokenizer.get_vocab()) if len(token) > 1 and letters(token).strip().isalpha()
    ]
    both = [token for token in theirs if letters(token) in ours][:6]
    assert len(both) == 6
    return [ours[letters(token)] for token in both], both


def image_documents(kind, config, tokenizer, image_tokenizer):
    """Text alone; and text, picture, text, picture beside text, picture: (the JAM's ids, the parent's entries)."""
    ours, theirs = common_tokens(tokenizer, image_tokenizer)
    jams = [jams_picture(config, codes) for codes in PICTURES]
    parents = [parents_picture(kind, codes) for codes in PICTURES]
    return (
        ([ours, ours[:2]], [theirs, theirs[:2]]),
        (
            [ours[:3] + jams[0] + ours[2:] + jams[1], ours[1:2] + jams[1]],
            [theirs[:3] + parents[0] + theirs[2:] + parents[1], theirs[1:2] + parents[1]],
        ),
    )
