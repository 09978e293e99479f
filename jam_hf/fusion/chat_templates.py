"""Chat templates of text parents, made to take pictures: a preamble turns lists of parts into texts for the template.

It knows Jinja and the placeholder of a picture, no tokens and no model. The template itself stays as it is behind the
preamble, tools and marks of what the assistant writes (`{% generation %}`) included.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chats import as_texts, check_that_parts_are_written
from ..integrations.private import render_jinja_template


# Ends in `+%}`, so that whatever the template begins with is kept. What a tool returned may be a list of anything.
PREAMBLE = """\
{#- Parts of messages as texts, a picture as its placeholder (jam_hf). -#}
{%- set jam = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is defined and content is sequence and content is not string and content is not mapping -%}
    {%- set known = content | selectattr('type', 'in', ['text', 'image', 'image_url']) | list -%}
    {%- if message['role'] == 'tool' and known | length != content | length -%}
      {%- set jam.messages = jam.messages + [message] -%}
    {%- else -%}
      {%- set written = namespace(text='') -%}
      {%- for part in content -%}
        {%- if part['type'] == 'text' and part['text'] is string -%}
          {%- set written.text = written.text + part['text'] -%}
        {%- elif part['type'] == 'image' or part['type'] == 'image_url' -%}
          {%- set written.text = written.text + IMAGE_TOKEN -%}
        {%- else -%}
          {{- raise_exception('a part of a message must be text or image, got ' + part | string) -}}
        {%- endif -%}
      {%- endfor -%}
      {%- set jam.messages = jam.messages + [dict(message, content=written.text)] -%}
    {%- endif -%}
  {%- else -%}
    {%- set jam.messages = jam.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = jam.messages +%}"""

_TEXT, _PICTURE = {"type": "text", "text": "What is this?"}, {"type": "image"}
# Templates refuse some orders of roles, so several chats are tried; each should be written as if it came as texts.
_CHATS = (
    [{"role": "user", "content": [_PICTURE, _TEXT]}],
    [
        {"role": "user", "content": [_TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A hat."}, _PICTURE]},
    ],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [_TEXT, _PICTURE, {"type": "text", "text": "And this?"}, _PICTURE]},
        {"role": "assistant", "content": "A hat."},
        {"role": "user", "content": [_PICTURE]},
    ],
)

_TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
# Tools and documents for named templates that are about them, and refuse to be without.
_SURROUNDINGS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": [{"type": "function", "function": _TOOL}], "documents": [{"title": "Hats", "text": "A hat."}]},
)


def with_pictures(template: Any, image_token: str = "<image>") -> Any:
    """A template for text alone as one that takes parts and pictures; named templates (a `dict` or list of them)
    likewise.

    A template that has the preamble already is returned as it is.
    """
    if isinstance(template, dict):
        return {name: with_pictures(entry, image_token) for name, entry in template.items()}
    if isinstance(template, list):
        return [{**entry, "template": with_pictures(entry["template"], image_token)} for entry in template]
    preamble = PREAMBLE.replace("IMAGE_TOKEN", json.dumps(image_token))
    return template if template.startswith(preamble) else preamble + template


def fitted(tokenizer: PreTrainedTokenizerBase, image_token: str) -> tuple[Any, list[str]]:
    """The tokenizer's chat template or templates as the JAM needs them, and warnings.

    Each is tried with parts and pictures. One that writes them as it writes texts with placeholders stays; any other
    gets the preamble and is tried again.
    """
    template = tokenizer.chat_template
    if template is None:
        return None, []
    named = template if isinstance(template, dict) else {"default": template}
    done, warnings = {}, []
    for name, entry in named.items():
        done[name], trouble = _fitted(entry, image_token, tokenizer)
        if trouble:
            which = f"The chat template '{name}'" if isinstance(template, dict) else "The chat template"
            warnings.append(f"{which} of the tokenizer {trouble}.")
    return (done if isinstance(template, dict) else done["default"]), warnings


def _fitted(template: str, image_token: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    if _trouble(template, image_token, tokenizer) is None:
        return template, None
    wrapped = with_pictures(template, image_token)
    trouble = _trouble(wrapped, image_token, tokenizer)
    if trouble is None or trouble == _UNTRIED:
        return wrapped, trouble
    return template, f"takes no pictures and cannot be made to ({trouble}); chats with pictures will be refused"


_UNTRIED = (
    "could not be tried with pictures: it refuses every plain chat. It got the preamble that turns parts into texts"
)


def _trouble(template: str, image_token: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    tried = False
    for chat, surroundings in product(_CHATS, _SURROUNDINGS):
        render = partial(_render, template=template, tokenizer=tokenizer, surroundings=surroundings)
        try:
            expected = render(as_texts(chat, image_token))
        except Exception:  # roles that the template does not have, say
            continue
        tried = True
        try:
            check_that_parts_are_written(chat, render, image_token)
            found = render(chat)
        except Exception as error:  # a template raises what it likes
            return f"{type(error).__name__}: {error}"
        if found != expected:
            return "it writes parts otherwise than texts"
    return None if tried else _UNTRIED


def _render(
    chat: list[dict[str, Any]], template: str, tokenizer: PreTrainedTokenizerBase, surroundings: dict[str, Any]
) -> str:
    return render_jinja_template([chat], chat_template=template, **surroundings, **tokenizer.special_tokens_map)[0][0]
