"""Text-only documents with knowledge that no caption contains: colours and shapes of things, little sums, little
stories.

It knows facts and sentences, and borrows words from captions; it knows no pictures. Held-out documents are new
sentences of the same kinds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .captions import CELL_NAMES, join
from .world import COLOURS, SHAPES


THING_COLOURS = {
    "ruby": "red",
    "tomato": "red",
    "strawberry": "red",
    "brick": "red",
    "emerald": "green",
    "leaf": "green",
    "frog": "green",
    "cucumber": "green",
    "sapphire": "blue",
    "cornflower": "blue",
    "whale": "blue",
    "lemon": "yellow",
    "canary": "yellow",
    "sunflower": "yellow",
    "amethyst": "purple",
    "plum": "purple",
    "violet": "purple",
    "carrot": "orange",
    "pumpkin": "orange",
    "tiger": "orange",
    "snowflake": "white",
    "swan": "white",
    "panther": "black",
    "raven": "black",
    "elephant": "grey",
    "mouse": "grey",
}
THING_SHAPES = {
    "coin": "circle",
    "plate": "circle",
    "wheel": "circle",
    "full moon": "circle",
    "window": "square",
    "chessboard": "square",
    "tile": "square",
    "slice of pizza": "triangle",
    "tent": "triangle",
    "yield sign": "triangle",
    "plus sign": "cross",
    "crossroads": "cross",
    "kite": "diamond",
    "baseball field": "diamond",
}
_NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Felix", "Grace", "Hugo")
_PLACES = ("market", "garden", "harbour", "school", "forest", "museum")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
).split()
_COLOUR_FACTS = (
    "What colour is {a} {thing}? {A} {thing} is {colour}.",
    "{A} {thing} has the colour {colour}.",
    "If you see {a} {thing}, it is {colour}.",
    "Everybody knows that {a} {thing} is {colour}.",
    "The colour of {a} {thing} is {colour}.",
)
_SHAPE_FACTS = (
    "What shape has {a} {thing}? {A} {thing} has the shape of a {shape}.",
    "{A} {thing} looks like a {shape}.",
    "The shape of {a} {thing} is a {shape}.",
    "When you draw {a} {thing}, you draw a {shape}.",
)
_SUMS = (
    "{a} plus {b} is {c}.",
    "How much is {a} plus {b}? It is {c}.",
    "{c} minus {b} is {a}.",
    "Take {a} and add {b}: you get {c}.",
)
_STORIES = (
    "{name} went to the {place} and bought {a} {thing}. It was {colour}. {name} gave it to {friend}.",
    "{name} lost {a} {thing} in the {place}. {friend} looked for something {colour} and found it.",
    "In the {place}, {name} showed {friend} {a} {thing}. How {colour} it is, said {friend}.",
    "{name} had {n} coins. {friend} gave {name} {m} more at the {place}. Now {name} has {total} coins.",
    "{name} drew a {shape} and said to {friend}: this is {a} {shaped}. They hung it up in the {place}.",
)
# Stories that tell a list a second time, in order: who answers a request must be able to repeat it.
_RETOLD = (
    ("{name} wants to buy {things} at the {place}.", "{name} takes a {item}."),
    ("In the {place}, {friend} sees {things}.", "{friend} counts a {item}."),
    ("{name} packs {things} for {friend}.", "{friend} unpacks a {item}."),
)
# Requests that are answered in steps, about things in the nine drawers of a cupboard.
_TIDIED = (
    ("How does {name} tidy up {things}?", "{name} opens the drawers and puts a {item}.", "{name} adds a {item}."),
    ("{name} wants to put away {things}.", "{friend} brings a {item}.", "{friend} puts a {item}."),
    ("Please tidy up {things}, {name}.", "{name} starts with a {item}.", "{name} goes on with a {item}."),
)
_SIZES = ("small", "little", "large", "big")
_DRAWERS = tuple(name for names in CELL_NAMES.values() for name in names)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _choice(rng: np.random.Generator, values: tuple | list) -> Any:
    return values[rng.integers(len(values))]


def _sentence(rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind == 0:
        thing = _choice(rng, list(THING_COLOURS))
        a = _article(thing)
        text = _choice(rng, _COLOUR_FACTS)
        return text.format(a=a, A=a.capitalize(), thing=thing, colour=THING_COLOURS[thing])
    if kind == 1:
        thing = _choice(rng, list(THING_SHAPES))
        a = _article(thing)
        text = _choice(rng, _SHAPE_FACTS)
        return text.format(a=a, A=a.capitalize(), thing=thing, shape=THING_SHAPES[thing])
    if kind == 2:
        first, second = (int(i) for i in rng.integers(0, 10, 2))
        text = _choice(rng, _SUMS).format(a=_NUMBERS[first], b=_NUMBERS[second], c=_NUMBERS[first + second])
        return text[0].upper() + text[1:]
    name, friend = (_NAMES[i] for i in rng.choice(len(_NAMES), 2, replace=False))
    thing, shaped = _choice(rng, list(THING_COLOURS)), _choice(rng, list(THING_SHAPES))
    n, m = (int(i) for i in rng.integers(2, 10, 2))
    text = _choice(rng, _STORIES)
    return text.format(
        name=name,
        friend=friend,
        place=_choice(rng, _PLACES),
        a=_article(shaped if "{shaped}" in text else thing),
        thing=thing,
        colour=THING_COLOURS[thing],
        n=_NUMBERS[n],
        m=_NUMBERS[m],
        total=_NUMBERS[n + m],
        shape=THING_SHAPES[shaped],
        shaped=shaped,
    )


def _retold(rng: np.random.Generator) -> str:
    """A list of two or three things, and each of them again in the same words."""
    names = rng.choice(len(_NAMES), 2, replace=False)
    common = {"name": _NAMES[names[0]], "friend": _NAMES[names[1]], "place": _choice(rng, _PLACES)}
    things = rng.choice(len(THING_COLOURS), rng.integers(2, 4), replace=False)
    items = [f"{_choice(rng, _SIZES)} {list(THING_COLOURS.values())[i]} {list(THING_COLOURS)[i]}" for i in things]
    opening, again = _choice(rng, _RETOLD)
    told = [f"a {item}" for item in items]
    sentences = [opening.format(things=join(told), **common)]
    sentences += [f"{word} {again.format(item=item, **common)}" for word, item in zip(("First", "Then", "Now"), items)]
    return " ".join(sentences)


def _tidied(rng: np.random.Generator) -> str:
    """A request about two or three things and their drawers, and its answer in steps."""
    names = rng.choice(len(_NAMES), 2, replace=False)
    common = {"name": _NAMES[names[0]], "friend": _NAMES[names[1]]}
    items = []
    for drawer in rng.choice(len(_DRAWERS), rng.integers(2, 4), replace=False):
        toy = rng.integers(2) == 0
        thing = _choice(rng, SHAPES) if toy else _choice(rng, list(THING_COLOURS))
        colour = _choice(rng, tuple(COLOURS)) if toy else THING_COLOURS[thing]
        items.append(f"{_choice(rng, _SIZES)} {colour} {thing} in the {_DRAWERS[drawer]}")
    request, first, again = _choice(rng, _TIDIED)
    told = [request.format(things=join([f"a {item}" for item in items]), **common)]
    for number, item in enumerate(items, 1):
        told.append(f"Step {number}. " + (first if number == 1 else again).format(item=item, **common))
    return " ".join(told)


def document(rng: np.random.Generator) -> str:
    """One document: three or four sentences, a story with a list that is told again, or a request and its answer in
    steps.
    """
    kind = rng.integers(3)
    if kind == 0:
        return _retold(rng)
    if kind == 1:
        return _tidied(rng)
    return " ".join(_sentence(rng) for _ in range(rng.integers(3, 5)))
