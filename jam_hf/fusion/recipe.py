"""The recipe of a fusion: every setting of `fuse` that can be written down, as one dataclass and as one YAML file.

The YAML file is the experiment: `jam-hf fuse recipe.yaml` does again what it says. It knows names and numbers only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..contents import public_name
from ..version import __version__


@dataclass
class FusionRecipe:
    """Settings of a fusion; see [`fuse`], whose arguments of the same names they are.

    text, image, vq, tokenizer, image_tokenizer: folders or Hub ids; `vq` and the tokenizers are the parents' own where
    None.
    text_revision, image_revision: branch, tag or commit on the Hub.
    """

    text: str
    image: str
    mode: str = "cross"
    init: str | None = None
    vq: str | None = None
    tokenizer: str | None = None
    image_tokenizer: str | None = None
    tokenizer_reading: str = "transformers"
    text_revision: str | None = None
    image_revision: str | None = None
    image_size: int | None = None
    image_token_offset: int | None = None
    break_token: str = "<break>"
    image_token: str = "<image>"
    mask_token: str = "<mask>"
    mask_end_token: str = "</mask>"
    special_tokens: dict[str, str] = field(default_factory=dict)
    cross_attention_interval: int = 2
    dtype: str | None = None
    seed: int = 0
    max_shard_size: str = "2GB"

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, **changes: Any) -> FusionRecipe:
        """Read a recipe; `changes` that are not None win over the file. Paths in it start where the command runs.

        Raises:
            ValueError: if it is no mapping of known settings, or one has another type.
        """
        path = Path(path)
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"The recipe {path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"The recipe {path} must be a YAML mapping such as 'text: a/b', got {type(found).__name__}."
            )
        return cls.of(
            {**found, **{key: value for key, value in changes.items() if value is not None}}, f"The recipe {path}"
        )

    @classmethod
    def of(cls, settings: dict[str, Any], where: str) -> FusionRecipe:
        """From a mapping; `where` names it in messages. Raises `ValueError` on unknown, missing or ill-typed
        settings.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(settings) - set(fields)))
        if unknown:
            raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}. Known: {', '.join(fields)}.")
        missing = [name for name in ("text", "image") if not settings.get(name)]
        if missing:
            raise ValueError(f"{where} lacks {' and '.join(missing)}: folders or Hub ids of the parents.")
        expected = {"int": int, "str": str, "dict": dict}
        for name, value in settings.items():
            kind = expected[str(fields[name].type).split("[")[0].split(" |")[0]]
            optional = "None" in str(fields[name].type)
            if not (value is None and optional) and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{where}: {name} must be {fields[name].type}, got {value!r}.")
        recipe = cls(**settings)
        if not all(isinstance(text, str) for pair in recipe.special_tokens.items() for text in pair):
            raise ValueError(
                f"{where}: special_tokens must be tokens by tokens, both text, got {recipe.special_tokens!r}."
            )
        return recipe

    def to_yaml(self) -> str:
        """What differs from the defaults, as YAML; a parent in a folder by the folder's name alone."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name in ("text", "image", "mode", "init") or getattr(self, f.name) not in (f.default, None, {})
        }
        for name in ("text", "image", "vq", "tokenizer", "image_tokenizer"):
            if name in values:
                values[name] = public_name(values[name])
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def digest(self, *contents: str | None) -> str:
        """Hash of the settings and of what the inputs are (`contents`), wherever they lie."""
        values = dataclasses.asdict(self)
        for name in ("text", "image", "vq", "tokenizer", "image_tokenizer", "max_shard_size"):
            values.pop(name)
        text = json.dumps([values, contents, __version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
