"""Chats whose messages are lists of parts: the pictures that they name, and whether a chat template writes the parts as
text.

It renders by a function that it is given and opens no picture. A chat is a list of messages; a part is `{"type":
"text", "text": ...}` or `{"type": "image"}`, with the picture under "image", "url", "path" or "base64" or, as OpenAI
has it, under "image_url".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any


PICTURE_KEYS = ("image", "url", "path", "base64")
_UNKNOWN_KEY, _SENTINEL = "jam_part", "a-part-that-no-template-reads"


def prepared_chats(processor: Any, render: Callable[..., Any], call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ProcessorMixin.apply_chat_template` (`render`) in place of those of a call of the JAM's, see
    there.

    Raises:
        ValueError: if the template would not write the parts as text or leaves out a picture; with `tokenize=True`, if
            a picture part brings no picture, or more pictures came than places.
    """
    conversation = call["conversation"]
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return call
    batched = isinstance(conversation[0], (list, tuple))
    chats = [plain_chat(chat) for chat in (conversation if batched else [conversation])]
    # What the template itself reads, without what is about tokens.
    others = {
        "conversation",
        "tokenize",
        "return_tensors",
        "return_dict",
        "processor_kwargs",
        "sanitize_control_tokens",
    }
    others |= {"images", "return_assistant_tokens_mask", "continue_final_message", "load_audio_from_video"}
    reads = {name: value for name, value in call.items() if name not in others}
    for chat in chats:
        check_that_parts_are_written(chat, partial(render, **reads), processor.image_token)
    call = call | {"conversation": chats if batched else chats[0]}
    if call.get("tokenize"):
        settings = dict(call.get("processor_kwargs") or {})
        beside = call.pop("images", None) if "images" in call else settings.pop("images", None)
        pictures = _pictures_of_chats(
            chats, processor.image_token, beside, typed=not call.get("sanitize_control_tokens")
        )
        if any(pictures):
            settings["images"] = pictures if batched else pictures[0]
        call["processor_kwargs"] = settings
    return call


def _pictures_of_chats(chats: list[list[Any]], image_token: str, beside: Any, typed: bool) -> list[list[Any]]:
    """The pictures of each chat in reading order; `beside` came in `images=`, see
    `JamProcessor.apply_chat_template`.
    """
    if beside is not None and not isinstance(beside, (list, tuple)):
        beside = [beside]
    nested = beside is not None and any(entry is None or isinstance(entry, (list, tuple)) for entry in beside)
    if nested and len(beside) != len(chats):
        raise ValueError(
            f"images has {len(beside)} list(s) of pictures for {len(chats)} chat(s); expected one for each."
        )
    stocks: list[Any]
    if nested:
        stocks = [
            list(entry) if isinstance(entry, (list, tuple)) else [entry] * (entry is not None) for entry in beside
        ]
    else:
        stocks = [None if beside is None else list(beside)] * len(chats)  # one list, which the chats use up in order
    pictures = [chat_pictures(chat, image_token, stock, typed) for chat, stock in zip(chats, stocks)]
    left = sum(map(len, stocks if nested else stocks[:1])) if beside is not None else 0
    if left:
        raise ValueError(
            f"images has {left} picture(s) more than the chat(s) have places without one. Expected one for each image "
            f"part that names none and each {image_token} in a text."
        )
    return pictures


def plain_chat(messages: Sequence[Any]) -> list[Any]:
    """The messages anew, in one form: keys whose value is None (`datasets` fills them in) left out, "image_url" as
    "url".
    """
    chat = []
    for message in messages:
        if not isinstance(message, dict):
            return list(messages)  # whatever it is, transformers says what it expects
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(message.get("content"), (list, tuple)):
            message["content"] = [_plain_part(part) for part in message["content"]]
        chat.append(message)
    return chat


def _plain_part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image_url" or (part.get("type") == "image" and "image_url" in part):
        named = part.pop("image_url", None)
        url = named.get("url") if isinstance(named, dict) else named
        part = {**part, "type": "image"} if url is None else {**part, "type": "image", "url": url}
    return part


def _parts(chat: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The texts and parts of a chat in reading order, with the number of their message."""
    for index, message in enumerate(chat):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, (str, dict)):
                yield index, part


def chat_pictures(chat: Sequence[Any], image_token: str, beside: Any, typed: bool = True) -> list[Any]:
    """The pictures of a chat in reading order: those that its parts name, and in the other places those passed beside
    it.

    Args:
        chat: of `plain_chat`. image_token: the placeholder.
        beside: pictures that came beside the chat, which are taken off the list as they find their places; None: none
            came.
        typed: whether a placeholder that stands in a text is the place of a picture, too (not if it is to be text).
    Raises:
        ValueError: if a part names no picture and none is left beside, or names several.
    """
    found: list[Any] = []
    for index, part in _parts(chat):
        named: list[Any] = []
        if isinstance(part, dict) and part.get("type") == "image":
            places = 1
            named = [part[key] for key in PICTURE_KEYS if part.get(key) is not None]
        else:
            text = part.get("text") if isinstance(part, dict) else part
            places = text.count(image_token) if typed and isinstance(text, str) else 0
            if beside is None:  # what is missing then is counted where texts and pictures meet
                continue
        if len(named) > 1:
            keys = " and ".join(repr(key) for key in PICTURE_KEYS if part.get(key) is not None)
            raise ValueError(
                f"Message {index} has an image part that names a picture under {keys}; expected one of them."
            )
        if not named and places > len(beside or ()):
            raise ValueError(
                f"Message {index} has the place of a picture, but no picture: expected one under "
                f"{', '.join(PICTURE_KEYS)} or image_url in its part, or one for each such place in images=[...]."
            )
        found += named or [beside.pop(0) for _ in range(places)]
    return found


def as_texts(chat: Sequence[Any], image_token: str) -> list[Any] | None:
    """The chat with a text in place of each list of parts; None if a part is neither text nor picture."""
    texts = []
    for message in chat:
        content = message.get("content")
        if isinstance(content, list):
            written: list[Any] = [
                image_token if isinstance(part, dict) and part.get("type") == "image" else (part or {}).get("text")
                for part in (part if isinstance(part, dict) else None for part in content)
            ]
            if not all(isinstance(text, str) for text in written):
                return None
            message = {**message, "content": "".join(written)}
        texts.append(message)
    return texts


def check_that_parts_are_written(chat: Sequence[Any], render: Callable[[list[Any]], str], image_token: str) -> None:
    """Refuse a chat of which a template would not write the parts as text, or would leave out pictures.

    Templates for text alone either fail at a list or write it as Python or JSON does (`[{'type': 'text', ...`). So the
    chat is
    rendered once with a key in each part that no template reads: where its value is written, the part was.

    Args:
        chat: of `plain_chat`. render: chat to text, by the template in question.
    Raises:
        ValueError: as said; the message says what to do. Whatever `render` raises on texts, too.
    """
    if not any(isinstance(part, dict) for _, part in _parts(chat)):
        return
    marked = []
    for message in chat:
        content = message.get("content")
        pictures = isinstance(content, list) and any(
            isinstance(part, dict) and part.get("type") == "image" for part in content
        )
        if isinstance(content, list) and (
            pictures or message.get("role") != "tool"
        ):  # what a tool returned may be any JSON
            content = [{**part, _UNKNOWN_KEY: _SENTINEL} if isinstance(part, dict) else part for part in content]
            message = {**message, "content": content}
        marked.append(message)
    try:
        text = render(marked)
    except Exception as error:  # a template raises what it likes
        texts = as_texts(chat, image_token)
        if texts is None:
            raise
        render(texts)  # raises if the chat is at fault and not its form
        reason = f"it raises {type(error).__name__}: {error}"
        raise ValueError(_REFUSAL.format(reason=reason, token=image_token)) from error
    if _SENTINEL in text:
        reason = "it writes them as Python or JSON does, brackets and all"
        raise ValueError(_REFUSAL.format(reason=reason, token=image_token))
    expected = sum(
        1 if isinstance(part, dict) and part.get("type") == "image" else _text(part).count(image_token)
        for _, part in _parts(chat)
    )
    if text.count(image_token) < expected:
        reason = f"it writes {text.count(image_token)} {image_token} for {expected} picture(s)"
        raise ValueError(_REFUSAL.format(reason=reason, token=image_token))


def _text(part: str | dict[str, Any]) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


_REFUSAL = (
    "The chat template cannot write messages that are lists of parts: {reason}. Expected one that writes texts as they "
    "are and {token} for a picture. jam_hf.fusion.chat_templates.with_pictures(template) makes one of a template for "
    "text (put it into processor.chat_template and processor.tokenizer.chat_template). Or write messages as texts, "
    "{token} in the place of each picture."
)


__all__ = ["as_texts", "chat_pictures", "check_that_parts_are_written", "plain_chat", "prepared_chats"]
