"""The picture world: what is held out is held out, captions determine pictures, the scorer reads and refuses."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from jam_hf.picture_world import (
    Picture,
    PictureObject,
    PictureWorldSizes,
    build_howtos,
    build_pairs,
    build_texts,
    read_picture,
    render,
    sample_picture,
    score_picture,
)
from jam_hf.picture_world.captions import CELL_NAMES, SIZE_NAMES, caption
from jam_hf.picture_world.dataset import build_vq_pictures, training_pictures
from jam_hf.picture_world.knowledge import document
from jam_hf.picture_world.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    all_objects,
    is_held_out_object,
    is_held_out_pair,
    is_training_picture,
)


SIZES = PictureWorldSizes(texts=200, pairs=300, howtos=40, validation=30, unseen=200)


@pytest.fixture(scope="module")
def world():
    return build_texts(0, SIZES), build_pairs(0, SIZES), build_howtos(0, SIZES)


def _keys(picture: Picture):
    keys = [o.key for o in picture.objects]
    return set(keys), {tuple(sorted(p)) for p in itertools.combinations(keys, 2)}


def test_no_training_picture_shows_what_is_held_out(world):
    """Scanned, not argued: the objects and pairs of all training pictures, against those of the unseen captions."""
    _, pairs, howtos = world
    shown = list(training_pictures(0, 40_000))
    shown += [Picture.from_json(p) for row in howtos["train"]["pictures"] for p in row]
    shown += [read_picture(image).picture for image in build_vq_pictures(0, 100)]
    objects, couples = set(), set()
    for picture in shown:
        o, c = _keys(picture)
        objects |= o
        couples |= c
    for text in pairs["unseen_single"]["picture"]:
        (key,), _ = _keys(Picture.from_json(text))
        assert key not in objects
    for text in pairs["unseen_pair"]["picture"]:
        keys, couple = _keys(Picture.from_json(text))
        assert not couple & couples and keys <= objects
    assert [p.to_json() for p in itertools.islice(shown, 300)] == pairs["train"]["picture"][:]


def test_the_held_out_share_is_even():
    keys = {o.key for o in all_objects()}
    held = {k for k in keys if is_held_out_object(k)}
    assert 0.12 < len(held) / len(keys) < 0.25
    for axes in ((0, 1), (0, 2), (1, 2)):  # every shape with every colour, in every cell, is seen
        assert {tuple(k[a] for a in axes) for k in keys - held} == {tuple(k[a] for a in axes) for k in keys}
    couples = [c for c in itertools.combinations(sorted(keys), 2) if c[0][2] != c[1][2]]
    share = sum(is_held_out_pair(*c) for c in couples) / len(couples)
    assert 0.17 < share < 0.23
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a, b in couples[:200])


def _read_caption(text: str) -> Picture:
    """A reader of captions that knows the words only."""
    (background,) = re.findall("|".join(BACKGROUNDS), re.sub("|".join(COLOURS), "", text))
    places = sorted(((n, c) for c, names in CELL_NAMES.items() for n in names), key=lambda x: -len(x[0]))
    sizes = {name: size for size, names in SIZE_NAMES.items() for name in names}
    names = "|".join(name for name, _ in places)
    words = f"({'|'.join(sizes)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:in|at) the ({names})"
    found = re.findall(words, text)
    return Picture(tuple(PictureObject(dict(places)[p], s, c, sizes[z]) for z, c, s, p in found), background)


def test_captions_determine_their_pictures(world):
    _, pairs, _ = world
    for split in pairs:
        for row in pairs[split].select_columns(["caption", "picture"]):
            assert _read_caption(row["caption"]) == Picture.from_json(row["picture"])
    captions = pairs["train"]["caption"][:]
    assert len(set(captions)) > 290
    assert 0.15 < sum(text.startswith("Step 1. ") for text in captions) / len(captions) < 0.35


def test_lists_are_told_again_word_for_word(world):
    """What a request names comes back in the same words and order, each thing with its drawer."""
    item = (
        r"an? (?:small|little|large|big) \w+ [\w ]+?(?: in the (?:"
        + "|".join(n for c in CELL_NAMES.values() for n in c)
        + "))?"
    )
    retold = 0
    for text in world[0]["train"]["text"]:
        if " First " in text or "Step 1. " in text:
            request, answer = re.split(r" First |Step 1\. ", text)
            things = re.findall(item + r"(?=, | and a|\?|\.| at the | for )", request)
            assert 2 <= len(things) <= 3 and re.findall(item + r"(?=\.)", answer) == things
            retold += 1
    assert 80 < retold < 180


def test_splits_do_not_overlap_and_are_repeatable(world):
    texts, pairs, howtos = world
    assert not set(texts["train"]["text"]) & set(texts["validation"]["text"])
    assert [len(pairs[s]) for s in pairs] == [300, 30, 200, 200]
    assert len(set(pairs["unseen_single"]["caption"])) == len(set(pairs["unseen_pair"]["caption"])) == 200
    again = build_pairs(0, PictureWorldSizes(texts=1, pairs=5, howtos=1, validation=2, unseen=2))
    assert again["train"]["caption"][:] == pairs["train"]["caption"][:5]
    assert (
        build_pairs(1, PictureWorldSizes(texts=1, pairs=5, howtos=1, validation=2, unseen=2))["train"]["caption"][:]
        != again["train"]["caption"][:]
    )
    assert howtos["train"].num_rows == 40


def test_texts_hold_knowledge_and_no_picture(world):
    texts = " ".join(world[0]["train"]["text"])
    assert "ruby" in texts and "plus" in texts and "the shape of" in texts
    assert "top left" in texts and "background" not in texts and "picture" not in texts
    assert "ruby" not in " ".join(world[1]["train"]["caption"])
    assert document(np.random.default_rng(0)) == document(np.random.default_rng(0))


def test_howtos_build_up(world):
    for row in world[2]["train"].select(range(10)):
        messages = json.loads(row["messages"])
        content = messages[1]["content"]
        assert [part["type"] for part in content] == ["text", "image"] * len(row["images"])
        pictures = [Picture.from_json(p) for p in row["pictures"]]
        for number, (picture, image) in enumerate(zip(pictures, row["images"]), 1):
            assert len(picture.objects) == number and set(picture.objects) >= set(pictures[0].objects)
            assert is_training_picture(picture) and score_picture(image, picture).exact


# ----- scorer ---------------------------------------------------------------------------------------------------------


def test_every_single_object_is_read_exactly():
    for o, background in itertools.product(all_objects(), BACKGROUNDS):
        picture = Picture((o,), background)
        assert score_picture(render(picture), picture).exact


def test_reading_survives_size_blur_and_noise():
    rng = np.random.default_rng(0)
    for _ in range(40):
        picture = sample_picture(rng, int(rng.integers(1, 4)))
        image = render(picture)
        noisy = np.clip(np.asarray(image, float) + rng.normal(0, 8, (48, 48, 3)), 0, 255).astype(np.uint8)
        assert score_picture(Image.fromarray(noisy), picture).exact
        assert score_picture(image.resize((96, 96), Image.Resampling.NEAREST), picture).exact
        assert score_picture(image.filter(ImageFilter.GaussianBlur(0.4)), picture).correct


def test_wrong_pictures_are_refused():
    rng = np.random.default_rng(1)
    o = PictureObject((1, 1), "circle", "red", "large")
    picture = Picture((o,), "white")
    others = [
        Picture((PictureObject((1, 1), "circle", "red", "small"),), "white"),
        Picture((PictureObject((1, 2), "circle", "red", "large"),), "white"),
        Picture((PictureObject((1, 1), "cross", "red", "large"),), "white"),
        Picture((PictureObject((1, 1), "circle", "blue", "large"),), "white"),
        Picture((o, PictureObject((0, 0), "square", "green", "small")), "white"),
        Picture((), "white"),
    ]
    scores = [score_picture(render(other), picture) for other in others]
    assert [s.correct for s in scores] == [True, False, False, False, False, False]
    assert not any(s.exact for s in scores)
    assert score_picture(render(Picture((o,), "black")), picture).correct  # the background is not part of "correct"
    for _ in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
        assert read_picture(noise).picture is None and not score_picture(noise, picture).correct
    half = np.asarray(render(picture)).copy()
    half[:, :24] = 250
    assert not score_picture(Image.fromarray(half), picture).correct


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PictureObject((0, 0), "star", "red", "small"), "shape must be one of circle"),
        (lambda: PictureObject((3, 0), "circle", "red", "small"), "0..2"),
        (lambda: Picture((), "pink"), "background must be one of white"),
        (
            lambda: Picture(
                (PictureObject((0, 0), "circle", "red", "small"), PictureObject((0, 0), "cross", "red", "small")),
                "white",
            ),
            "at most one",
        ),
        (lambda: sample_picture(np.random.default_rng(0), 0), "1..9"),
        (lambda: sample_picture(np.random.default_rng(0), 2, "object"), "held_out"),
        (lambda: render(Picture((), "white"), 50), "multiple of 3"),
        (lambda: caption(np.random.default_rng(0), Picture((), "white")), "no objects"),
        (lambda: read_picture("picture.png"), "PIL picture"),
        (lambda: PictureWorldSizes(texts=0), "texts must be at least 1"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
