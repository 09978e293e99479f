"""The shared tokenizer of a JAM's parents: byte-level BPE, the special tokens, and the image codes.

It knows strings. Ids follow from the order below; `JamConfig` is their home once a model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# What the assistant writes, its end included, is marked, so that a trainer can learn from that alone
# (assistant_only_loss).
CHAT_TEMPLATE = (
    "{% macro written(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('a part of a message must be text or image, got ' + part['type']) }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, got ' + message['role']) }}{% endif %}"
    "{% if message['content'] is not defined or message['content'] is none %}"
    "{{ raise_exception('a message has no content; expected a text, or a list of parts') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ written(message['content']) }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ written(message['content']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def special_tokens(num_mask_tokens: int = 8) -> list[str]:
    """The special tokens in the order of their ids: 0 `<pad>`, 1 `<s>`, 2 `</s>`, 3 `<break>`, 4 `<image>`, 5
    `<mask>`, ...
    """
    if num_mask_tokens < 1:
        raise ValueError(f"num_mask_tokens must be at least 1, got {num_mask_tokens}.")
    sentinels = ["<mask>", *(f"<mask:{i}>" for i in range(1, num_mask_tokens))]
    return ["<pad>", "<s>", "</s>", "<break>", "<image>", *sentinels, "</mask>", *ROLES]


def byte_level_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """Train byte-level BPE. Ids: `specials` in their order, the bytes, then what was learned.

    Raises:
        ValueError: if `vocab_size` (specials included) leaves no room for the bytes.
    """
    if vocab_size < len(specials) + 256:
        raise ValueError(
            f"vocab_size must be at least {len(specials) + 256} ({len(specials)} special tokens and 256 bytes), got "
            f"{vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, num_image_tokens: int, num_mask_tokens: int = 8
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that knows the image codes.

    Args:
        texts: training texts.
        vocab_size: specials and BPE together, at most; at least specials + 256 bytes.
        num_image_tokens: K; `<img:0>` ... `<img:K-1>` follow the text vocabulary, at the end.
        num_mask_tokens: CM3 sentinels.
    Returns:
        a tokenizer that puts `<s>` first, pads on the left, and has a chat template with images.
    Raises:
        ValueError: if `vocab_size` leaves no room for the bytes.
    """
    specials = special_tokens(num_mask_tokens)
    if num_image_tokens < 1:
        raise ValueError(f"num_image_tokens must be at least 1, got {num_image_tokens}.")
    tokenizer = byte_level_bpe(texts, vocab_size, specials)
    tokenizer.add_special_tokens([AddedToken(f"<img:{i}>", special=True) for i in range(num_image_tokens)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", specials.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
