"""One vocabulary out of two: which rows of each parent's embedding make each row of the JAM's.

The text parent's tokenizer rules: its ids stay what they are, new special tokens and the image codes come behind. Rows
of the image parent are found by the text of a token, then by re-tokenising that text into the image parent's pieces
(their mean). It knows tokenizers and ids; it reads no tensor.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..data.code_names import name_codes, num_in_a_row
from ..integrations.private import bytes_to_unicode
from ..model.code_tokens_jam import UNUSED_NAME
from ..model.picture_layout_jam import PictureLayout


@dataclass(frozen=True)
class RowMap:
    """Row i of the JAM's vocabulary is the mean of the parent's rows `rows[offsets[i]:offsets[i + 1]]`.

    Where there is none, the parent has nothing to say of that token. offsets: int64 `[V + 1]`; rows: int64.
    identity: so many leading rows are the parent's own, one for one.
    padding: tokens that the parent does not know, though it has rows in their places: the padding of its vocabulary.
    """

    offsets: torch.LongTensor
    rows: torch.LongTensor
    identity: int
    padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, ...]]) -> RowMap:
        pieces = list(pieces)
        counts = torch.tensor([len(ids) for ids in pieces], dtype=torch.long)
        rows = torch.tensor([row for ids in pieces for row in ids], dtype=torch.long)
        identity = 0
        while identity < len(pieces) and pieces[identity] == (identity,):
            identity += 1
        return cls(torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))), rows, identity)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def without(self, first: int, last: int) -> RowMap:
        """The map of a tensor in which the parent has nothing to say of the tokens `[first, last)`."""
        counts = self.offsets.diff()
        counts[first:last] = 0
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
        rows = torch.cat((self.rows[: self.offsets[first]], self.rows[self.offsets[last] :]))
        return replace(self, offsets=offsets, rows=rows, identity=min(self.identity, first))

    @property
    def present(self) -> torch.Tensor:
        """bool `[V]`: whether the parent knows the token."""
        known = self.offsets.diff() > 0
        known[list(self.padding)] = False
        return known


@dataclass
class Coverage:
    """How many of the text tokens got a row of the image parent, and by which way."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, way: str, token: str) -> None:
        self.counts[way] += 1
        self.examples.setdefault(way, [])
        if len(self.examples[way]) < 3:
            self.examples[way].append(token)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        return [
            f"{way}: {count} ({100 * count / max(1, self.total):.1f} %), e.g. "
            f"{', '.join(map(repr, self.examples[way]))}"
            for way, count in self.counts.most_common()
        ]


# The ways, in the order in which they are tried.
SAME_TEXT, SAME_ROLE, PIECES, BYTES, NONE = (
    "same text",
    "same role or declared",
    "mean of pieces",
    "mean of bytes",
    "none: starts as the mean row",
)


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def surfaces(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id stands for, by id; None for special tokens and for ids that are no token.

    Byte-level BPE writes bytes as letters, SentencePiece a space as U+2581 (in added tokens too: Gemma's runs of
    spaces) and lone bytes as `<0x41>`, WordPiece "##" where no space stands before; all are undone here.
    """
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    byte_level = "ByteLevel" in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()} if byte_level else None
    decoder = state.get("decoder") or {}
    inside = decoder.get("prefix") if decoder.get("type") == "WordPiece" else None
    special = set(tokenizer.all_special_ids)
    added = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        added[index] = token.content
        if token.special:
            special.add(index)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if index in added:
            found[index] = (token.replace("\u2581", " ") if letters is None and inside is None else token).encode()
        elif letters is not None:
            if all(letter in letters for letter in token):
                found[index] = bytes(letters[letter] for letter in token)
        elif inside is not None:
            found[index] = token.removeprefix(inside).encode() if token.startswith(inside) else f" {token}".encode()
        elif _BYTE_TOKEN.fullmatch(token):
            found[index] = bytes([int(token[3:5], 16)])
        else:
            found[index] = token.replace("\u2581", " ").encode()
    return found


def _marked(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special and added tokens, by id: those that encoding finds by their names, whatever the model would make
    of them.
    """
    specials = tokenizer.all_special_ids
    found = dict(zip(specials, tokenizer.convert_ids_to_tokens(specials)))
    return found | {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}


def transplant(
    text: PreTrainedTokenizerBase,
    image: PreTrainedTokenizerBase,
    num_rows: int,
    declared: dict[int, int],
    new: Collection[str] = (),
) -> tuple[list[tuple[int, ...]], Coverage]:
    """For each of `num_rows` ids of the text tokenizer, the rows of the image parent whose mean stands for it.

    Tokens match by what they spell. A character that the image parent has as an ordinary token and as a byte `<0x41>`
    is the ordinary one, which is what its training read; a byte token of the text parent is the image parent's byte
    token, where it
    has one. Special and added tokens match by name, and only special and added ones: an ordinary entry of that name may
    be nothing that the other tokenizer ever yields. An added token without a counterpart is what that tokenizer makes
    of its text.

    Args:
        declared: image parent's id by text id, which wins over everything else. new: tokens that the text tokenizer has
            just got; they are no part of the report, but for those that are declared.
    """
    ours, theirs = surfaces(text), surfaces(image)
    by_text: dict[bytes, int] = {}
    their_bytes: dict[bytes, int] = {}
    for index, name in enumerate(image.convert_ids_to_tokens(list(range(len(theirs))))):
        if theirs[index] is not None:
            is_byte = len(theirs[index]) == 1 and _BYTE_TOKEN.fullmatch(name) is not None
            (their_bytes if is_byte else by_text).setdefault(theirs[index], index)
    by_text = {**their_bytes, **by_text}
    single_bytes = {surface: index for surface, index in by_text.items() if len(surface) == 1}
    roles = dict(declared)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        mine, other = getattr(text, role), getattr(image, role)
        if mine is not None and other is not None:
            roles.setdefault(mine, other)
    marked, their_marked = _marked(text), {name: index for index, name in _marked(image).items()}
    names = text.convert_ids_to_tokens(list(range(len(ours))))
    pieces: list[tuple[int, ...]] = [()] * num_rows
    coverage = Coverage()
    left: list[int] = []
    for index in range(min(num_rows, len(ours))):
        surface, name = ours[index], names[index]
        if name is None or (name in new and index not in declared and name not in their_marked):
            continue
        if index in roles:
            pieces[index] = (roles[index],)
            coverage.add(SAME_ROLE, name)
        elif index in marked and name in their_marked:
            pieces[index] = (their_marked[name],)
            coverage.add(SAME_TEXT, name)
        elif surface in their_bytes and _BYTE_TOKEN.fullmatch(name):
            pieces[index] = (their_bytes[surface],)
            coverage.add(SAME_TEXT, name)
        elif surface is not None and surface in by_text and (index not in marked or not surface.strip()):
            pieces[index] = (by_text[surface],)
            coverage.add(SAME_TEXT, name)
        elif surface:
            left.append(index)
        else:
            coverage.add(NONE, name)
    for index, found in zip(left, _tokenised([ours[index] for index in left], image, theirs)):
        way = PIECES if len(found) > 1 else SAME_TEXT
        if not found and ours[index] in by_text:
            found = (by_text[ours[index]],)
        elif not found and all(bytes([byte]) in single_bytes for byte in ours[index]):
            found, way = tuple(single_bytes[bytes([byte])] for byte in ours[index]), BYTES
        pieces[index] = found
        coverage.add(way if found else NONE, names[index])
    return pieces, coverage


def _tokenised(
    texts: list[bytes], tokenizer: PreTrainedTokenizerBase, known: list[bytes | None]
) -> Iterable[tuple[int, ...]]:
    """The pieces of each text, or () where they do not spell exactly that text.

    Some tokenizers put a space before a text; behind a line feed (or what they make of it), which is then taken off,
    they do not.
    """

    def spelled(ids: list[int]) -> bytes | None:
        parts = [known[index] if index < len(known) else None for index in ids]
        return None if None in parts else b"".join(parts)

    def encode(strings: list[str]) -> list[list[int]]:
        if not strings:
            return []
        return tokenizer(strings, add_special_tokens=False)["input_ids"]

    readable: dict[int, str] = {}
    for position, text in enumerate(texts):
        try:
            readable[position] = text.decode()
        except UnicodeDecodeError:
            continue  # a part of a character: its bytes are all there is
    found: list[tuple[int, ...]] = [()] * len(texts)
    again = []
    for position, ids in zip(readable, encode(list(readable.values()))):
        if ids and spelled(ids) == texts[position]:
            found[position] = tuple(ids)
        else:
            again.append(position)
    for position, ids in zip(again, encode(["\n" + readable[position] for position in again])):
        for skip in range(1, len(ids)):
            if spelled(ids[skip:]) == texts[position]:
                found[position] = tuple(ids[skip:])
                break
    return found


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[str]:
    """Add what the tokenizer lacks, as special tokens, behind all others. Returns what was added, in the order of the
    ids.

    Raises:
        ValueError: if a token is an ordinary one, or the new ones did not get the ids behind all that are in use:
            tokenizers counts tokens, it does not look for the largest id.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    tokens = list(dict.fromkeys(tokens))
    ordinary = [token for token in tokens if token in vocabulary and token not in special]
    if ordinary:
        raise ValueError(
            f"The tokenizer has {ordinary[0]!r} as an ordinary token (id {vocabulary[ordinary[0]]}), so it cannot be "
            "markup. Name others for the JAM's markup: break_token=..., image_token=..., mask_token=..., "
            "mask_end_token=..."
        )
    missing = [token for token in tokens if token not in vocabulary]
    if not missing:
        return []
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    count = tokenizer.add_tokens(added, special_tokens=True)
    ids, first = tokenizer.convert_tokens_to_ids(missing), max(vocabulary.values(), default=-1) + 1
    if count != len(missing) or ids != list(range(first, first + len(missing))):
        used = set(vocabulary.values())
        holes = [index for index in range(first) if index not in used]
        raise ValueError(
            f"{len(missing)} new tokens ({missing[0]!r}, ...) should get the ids {first}..{first + len(missing) - 1}, "
            f"behind all others; {count} got ids, {sorted(ids)[:3]}... The tokenizer has {len(used)} tokens and ids up "
            f"to {first - 1}; {len(holes)} ids have no token, e.g. {holes[:3]}. Give each of them a token that no text "
            "has, in the vocabulary of its tokenizer.json."
        )
    return missing


def differing_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[str]:
    """Tokens of `ours` to which `theirs` gives another id, or none; in the order of their ids."""
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    return sorted((token for token in vocabulary if other.get(token) != vocabulary[token]), key=vocabulary.__getitem__)


@dataclass(frozen=True)
class TokenNames:
    """The JAM's special tokens, by their text in its tokenizer."""

    break_token: str = "<break>"
    image_token: str = "<image>"
    mask_token: str = "<mask>"
    mask_end_token: str = "</mask>"
    num_mask_tokens: int = 8

    @property
    def masks(self) -> list[str]:
        """CM3 sentinels: `<mask>`, `<mask:1>`, ..."""
        return [self.sentinel(i) for i in range(self.num_mask_tokens)]

    def sentinel(self, index: int) -> str:
        """The name of sentinel `index`: `<mask>`, `<mask:1>`, ...; `[MASK]`, `[MASK]:1`, ..."""
        if index == 0:
            return self.mask_token
        closing = ">" if self.mask_token.endswith(">") else ""
        return f"{self.mask_token.removesuffix('>')}:{index}{closing}"

    def with_new_sentinels(self, tokenizer: PreTrainedTokenizerBase) -> TokenNames:
        """These names, or `<jam:mask>` for `<mask>` where the tokenizer has some of the sentinels, but not all side by
        side.

        Raises:
            ValueError: if that is so of a `mask_token` that was asked for.
        """
        known = tokenizer.get_vocab()
        for name in (self.mask_token, "<jam:mask>", "<jam:mask/2>"):
            names = replace(self, mask_token=name)
            if (
                not any(mask in known for mask in names.masks)
                or num_in_a_row(tokenizer, names.sentinel) >= self.num_mask_tokens
            ):
                return names
            if name == self.mask_token != TokenNames.mask_token:
                break
        raise ValueError(
            f"The tokenizer has some of the {self.num_mask_tokens} sentinels {self.mask_token!r}, "
            f"{self.sentinel(1)!r}, ..., but not all with one id behind the other. Name another: mask_token=..."
        )

    def required(self) -> list[str]:
        return [self.break_token, self.image_token, self.mask_token, self.mask_end_token]


@dataclass
class Vocabulary:
    """The JAM's vocabulary and where its rows come from.

    size: text ids, new special tokens and image codes. ids: token ids for [`JamConfig`]. layout: tokens around a
    picture for [`JamProcessor`]. code_name: form of the codes' names in the tokenizer; None where it is not known.
    codes_from: what says
    which rows of the image parent are codes, in words. coverage: None where both parents have one vocabulary. added:
    special tokens that the tokenizer got, codes left out.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    text_map: RowMap
    image_map: RowMap
    ids: dict[str, Any]
    layout: dict[str, Any] = field(default_factory=dict)
    code_name: str | None = None
    codes_from: str = ""
    coverage: Coverage | None = None
    added: list[str] = field(default_factory=list)


def shared_vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, codes: torch.LongTensor, names: TokenNames
) -> Vocabulary:
    """Both parents have one vocabulary, image codes included: every row stands where it stood.

    Raises:
        ValueError: if the tokenizer lacks a special token.
    """
    known = set(_marked(tokenizer).values())  # an ordinary entry of that name may be nothing that encoding yields
    missing = [token for token in names.required() if token not in known]
    if missing:
        raise ValueError(
            f"The tokenizer has no special token {', '.join(map(repr, missing))}. Add them as special tokens before "
            "fusing (and give the parents' embeddings rows for them), or name the tokens that play their part: "
            "break_token=..., image_token=..., mask_token=..., mask_end_token=..."
        )
    row_map = RowMap(torch.arange(size + 1), torch.arange(size), size)
    code_name = name_codes(tokenizer, int(codes[0]), len(codes))
    return Vocabulary(tokenizer, size, row_map, row_map, _ids(tokenizer, names, int(codes[0])), code_name=code_name)


def joined_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    text_rows: int,
    image_tokenizer: PreTrainedTokenizerBase,
    codes: torch.LongTensor,
    pictures: PictureLayout | None,
    names: TokenNames,
    special_tokens: dict[str, str],
    kept: Collection[int] = (),
) -> Vocabulary:
    """The text parent's vocabulary, then new special tokens, then the image codes.

    Args:
        tokenizer: the text parent's; it gets what it lacks. text_rows: rows of its embedding, padding included.
        codes: the image parent's row of each code. pictures: its own way to write one; `None`: it has none.
        special_tokens: the image parent's token (text) by the JAM's (text), beyond those that `pictures` says.
        kept: ids that mean something to the text parent, though its tokenizer may have no tokens for them (where it
            stops): they get names (`<unused:305>`), and so do those before them, so that no new token takes their rows.
    Raises:
        ValueError: if `special_tokens` names a token that a tokenizer does not have.
    """
    end = max(tokenizer.get_vocab().values(), default=-1) + 1
    add_special_tokens(
        tokenizer, map(UNUSED_NAME.format, range(end, max((i for i in kept if i < text_rows), default=-1) + 1))
    )
    structure: dict[str, int] = {}  # the image parent's row by the JAM's token
    layout: dict[str, Any] = {}
    if pictures is not None:
        structure[names.break_token] = pictures.begin

    def dedicated(name: str) -> str:
        """The name, or another where an ordinary token has it."""
        entry = known.get(name)
        return name if entry is None or entry in _marked(tokenizer) else f"<jam:{name.removeprefix('<')}"

    known = tokenizer.get_vocab()
    if pictures is not None and pictures.end != pictures.begin:
        end = "</break>" if names.break_token == "<break>" else f"{names.break_token}/end"
        layout["image_end_token"] = dedicated(end)
        structure[layout["image_end_token"]] = pictures.end
    for field_name, stem, ids in (
        ("image_prefix_tokens", "picture", () if pictures is None else pictures.prefix),
        ("image_suffix_tokens", "/picture", () if pictures is None else pictures.suffix),
    ):
        if ids:
            layout[field_name] = [dedicated(f"<{stem}:{i}>") for i in range(len(ids))]
            structure |= dict(zip(layout[field_name], ids))
    if pictures is not None and pictures.row_end is not None:
        layout["image_row_end_token"] = dedicated("<row>")
        structure[layout["image_row_end_token"]] = pictures.row_end

    names = names.with_new_sentinels(tokenizer)
    wanted = [*names.required()[:2], *structure, *names.masks, names.mask_end_token]
    added = [] if tokenizer.pad_token_id is not None else ["<pad>"]
    added = add_special_tokens(tokenizer, [*added, *wanted])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<pad>"
    ours, theirs = tokenizer.get_vocab(), image_tokenizer.get_vocab()
    declared = {ours[token]: row for token, row in structure.items()}
    for token, other in special_tokens.items():
        for vocabulary, name, whose in (
            (ours, token, "the JAM's tokenizer"),
            (theirs, other, "the image parent's tokenizer"),
        ):
            if name not in vocabulary:
                raise ValueError(
                    f"special_tokens: {whose} has no token {name!r}. Expected {{JAM's token: image parent's}}."
                )
        declared[ours[token]] = theirs[other]
    base = max(text_rows, max(ours.values()) + 1)
    pieces, coverage = transplant(tokenizer, image_tokenizer, base, declared, set(added))
    size = base + len(codes)
    text_map = RowMap.of([*((row,) for row in range(text_rows)), *[()] * (size - text_rows)])
    text_map = replace(text_map, padding=tuple(ours[token] for token in added if ours[token] < text_rows))
    image_map = RowMap.of([*pieces, *((int(row),) for row in codes)])
    token_ids = _ids(tokenizer, names, base)
    for name, token_field in (
        ("image_end_token_id", "image_end_token"),
        ("image_prefix_token_ids", "image_prefix_tokens"),
        ("image_row_end_token_id", "image_row_end_token"),
        ("image_suffix_token_ids", "image_suffix_tokens"),
    ):
        if token_field in layout:
            token_ids[name] = tokenizer.convert_tokens_to_ids(layout[token_field])
    code_name = name_codes(tokenizer, base, len(codes))
    return Vocabulary(
        tokenizer, size, text_map, image_map, token_ids, layout, code_name, coverage=coverage, added=added
    )


def _ids(tokenizer: PreTrainedTokenizerBase, names: TokenNames, image_token_offset: int) -> dict[str, Any]:
    known = tokenizer.get_vocab()
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "break_token_id": known[names.break_token],
        "image_token_id": known[names.image_token],
        "mask_token_id": known[names.mask_token],
        "num_mask_tokens": num_in_a_row(tokenizer, names.sentinel),
        "mask_end_token_id": known[names.mask_end_token],
        "image_token_offset": image_token_offset,
    }
