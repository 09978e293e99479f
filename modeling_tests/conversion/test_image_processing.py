"""A JAM makes the pixel values that its image parent's own processor makes, bit for bit: where it fuses, loads and
trains.
"""

import json

import numpy as np
import pytest
import torch
from fusion_zoo import IMAGE_PARENTS, image_parent, save, text_parent, vq_model
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from jam_hf import JamImageProcessor, JamProcessor, JamVQConfig, fuse
from jam_hf.checkpoints.parent import Parent
from jam_hf.conversion.image_processing import image_processing_of
from jam_hf.conversion.vq import convert_vq
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.model.modeling_jam_vq import JamVQModel
from jam_hf.training.vq import encode_images, pixels_of


SIZE = 64
SIDES = [(64, 64), (65, 63), (101, 67), (37, 153), (23, 41), (300, 77), (1, 90)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
AREA = {"min_pixels": SIZE * SIZE, "max_pixels": SIZE * SIZE}
PROCESSORS = {
    "chameleon": ("chameleon", ChameleonImageProcessorPil, SQUARE),
    "chameleon, larger before the cut": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, "size": {"shortest_edge": 75}},
    ),
    "chameleon, smaller before the cut": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, "size": {"shortest_edge": 40}},
    ),
    "chameleon, squeezed before the cut": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, "size": {"height": 80, "width": 70}},
    ),
    "chameleon, two edges before the cut": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, "size": {"shortest_edge": 70, "longest_edge": 90}},
    ),
    "chameleon, cut alone": ("chameleon", ChameleonImageProcessorPil, {**SQUARE, "do_resize": False}),
    "chameleon, other values": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, **HALF, "resample": 2, "rescale_factor": 1 / 255},
    ),
    "chameleon, not normalised": ("chameleon", ChameleonImageProcessorPil, {**SQUARE, "do_normalize": False}),
    "chameleon, not rescaled": (
        "chameleon",
        ChameleonImageProcessorPil,
        {**SQUARE, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ),
    "chameleon, squeezed": (
        "chameleon",
        ChameleonImageProcessorPil,
        {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False, "resample": 0},
    ),
    "janus": ("janus", JanusImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}, **HALF}),
    "janus, its class's values": ("janus", JanusImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}}),
    "emu3": ("emu3", Emu3ImageProcessor, {**AREA, **HALF}),
    "emu3, its class's values": ("emu3", Emu3ImageProcessor, {**AREA, "resample": 1}),
}


def pictures(mode, sides):
    """Pictures like photographs: smooth, with edges and noise; where there is a fourth channel, of all
    transparencies.
    """
    found = []
    for width, height in sides:
        rng = np.random.default_rng([width, height])
        y, x = np.mgrid[0:height, 0:width]
        waves = [
            np.sin(x / (3 + c) + c) * np.cos(y / (5 + c)) * 90 + 128 + 20 * ((x + y * c) % 17 > 8) for c in range(4)
        ]
        pixels = np.clip(np.stack(waves, -1) + rng.normal(0, 6, (height, width, 4)), 0, 255).astype(np.uint8)
        found.append(Image.fromarray(pixels, "RGBA") if mode in ("RGBA", "LA") else Image.fromarray(pixels[..., :3]))
    return [picture.convert(mode) for picture in found]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return {
        kind: save(*image_parent(**IMAGE_PARENTS[kind]), root / kind)
        for kind in ("chameleon", "emu3", "janus", "llama-lm")
    }


@pytest.fixture
def parent(parents, tmp_path):
    """A function: the folder of an image parent with this image processor in it."""

    def made(kind, processor=None):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        for path in parents[kind].iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
        if processor is not None:
            processor.save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_are_the_parents(parent, name, mode):
    kind, processor_class, settings = PROCESSORS[name]
    if kind == "janus" and mode != "RGB":
        pytest.skip("Janus' own processor takes RGB pictures alone")
    folder = parent(kind, processor_class(**settings))
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    said, _ = image_processing_of(Parent(folder, "image parent"), None, SIZE)
    config = JamVQConfig(sample_size=SIZE, image_processing=json.loads(json.dumps(said)))
    ours = JamImageProcessor.from_vq_config(config)
    sides = (
        [(side, side) for side in (64, 65, 33, 131, 200)] if kind == "emu3" else SIDES
    )  # a JAM's pictures are squares
    for picture in pictures(mode, sides):
        expected = own(picture, return_tensors="np")["pixel_values"].reshape(-1, 3, SIZE, SIZE)
        found = ours(picture, return_tensors="np")["pixel_values"]
        assert np.array_equal(found, expected), picture.size
        low, high = config.pixel_range
        assert low <= found.min() and found.max() <= high
    picture = pictures("RGB", [(SIZE, SIZE)])[0]
    values = ours(picture, return_tensors="pt", do_resize=False, letterbox=False)["pixel_values"]
    back = ours.postprocess(values)[0]
    assert np.array_equal(np.asarray(back), np.asarray(picture))


@pytest.mark.parametrize(
    ("kind", "name"), [("chameleon", "chameleon, other values"), ("janus", "janus, its class's values")]
)
def test_the_jam_carries_it(parent, tmp_path, kind, name):
    """Saved, loaded, in training and in the tools around the VQ model."""
    _, processor_class, settings = PROCESSORS[name]
    folder = parent(kind)
    text = save(*text_parent("llama"), tmp_path / "text")
    size = plan_fusion(text, folder, "cross").config.vq_config.sample_size
    settings = settings | {"size": dict.fromkeys(settings["size"], size), "crop_size": {"height": size, "width": size}}
    parent(kind, processor_class(**settings))
    jam = fuse(text, folder, "cross", tmp_path / "jam")
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    loaded = JamProcessor.from_pretrained(jam).image_processor
    vq = JamVQModel.from_pretrained(convert_vq(folder, tmp_path / "vq"))
    for picture in pictures("RGB", [(45, 31), (90, 91)]):
        expected = torch.as_tensor(np.asarray(own(picture, return_tensors="np")["pixel_values"]))
        assert torch.equal(loaded(picture, return_tensors="pt")["pixel_values"], expected)
        assert torch.equal(pixels_of([picture], vq), expected)
        assert encode_images(vq, [picture]).shape == (
            1,
            vq.config.image_seq_length,
        )  # CLIP's mean makes values beyond 1
    assert json.loads((jam / "config.json").read_text())["vq_config"]["image_processing"] == vq.config.image_processing


def test_what_is_assumed_is_said(parent):
    for kind in ("emu3", "janus"):
        said, warnings = image_processing_of(Parent(parent(kind), "image parent"), None, SIZE)
        assert said is None and "brings no preprocessor_config.json" in warnings[0]
    said, warnings = image_processing_of(Parent(parent("chameleon"), "image parent"), None, SIZE)
    assert (said["resample"], said["rescale_factor"], said["image_mean"]) == (
        1,
        0.0078,
        [1.0] * 3,
    )  # all that are published
    assert "512" in warnings[0] and str(SIZE) in warnings[0]
    plain = Parent(parent("llama-lm"), "image parent")
    given = JamVQConfig(sample_size=SIZE, image_processing={"resample": 1})
    assert image_processing_of(plain, given, SIZE) == ({"resample": 1}, [])
    assert image_processing_of(plain, None, SIZE) == (None, [])
    folder = parent("emu3", Emu3ImageProcessor(**AREA))
    assert "cuts the centre of others" in image_processing_of(Parent(folder, "image parent"), None, SIZE)[1][0]


@pytest.mark.parametrize("changes", [{"do_pad": False}, {"do_resize": False}], ids=str)
def test_pictures_of_any_shape_are_said(parent, changes):
    folder = parent("janus", JanusImageProcessorPil(size={"height": SIZE, "width": SIZE}, **HALF, **changes))
    assert "cuts the centre of others" in image_processing_of(Parent(folder, "image parent"), None, SIZE)[1][0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("chameleon", {**SQUARE, **HALF}), ("janus", {**HALF, "size": SIZE}), ("emu3", {**AREA, **HALF})],
)
def test_a_file_that_names_no_class_is_read_by_the_models(parent, kind, settings):
    """As transformers does for old folders."""
    folder = parent(kind)
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    said, _ = image_processing_of(Parent(folder, "image parent"), None, SIZE)
    ours = JamImageProcessor.from_vq_config(JamVQConfig(sample_size=SIZE, image_processing=said))
    picture = pictures("RGB", [(131, 131)])[0]
    expected = own(picture, return_tensors="np")["pixel_values"].reshape(-1, 3, SIZE, SIZE)
    assert np.array_equal(ours(picture, return_tensors="np")["pixel_values"], expected)


def test_what_cannot_be_done_is_refused(parent):
    folder = parent("janus")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "FuyuImageProcessor"}))
    with pytest.raises(ValueError, match="a JAM cannot do what that does"):
        image_processing_of(Parent(folder, "image parent"), None, SIZE)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}})
    )
    with pytest.raises(ValueError, match="cannot be read"):
        image_processing_of(Parent(folder, "image parent"), None, SIZE)


def test_folders_without_it_are_as_they_were(tmp_path):
    """What was saved before says nothing of it: BICUBIC, the centre square, [-1, 1]."""
    config = vq_model().config
    assert config.image_processing is None
    assert config.pixel_range == (-1.0, 1.0)
    JamImageProcessor.from_size(16).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    old = {name: value for name, value in values.items() if name not in ("letterbox", "min_size")}
    path.write_text(json.dumps(old))
    loaded = JamImageProcessor.from_pretrained(tmp_path)
    assert (loaded.resample, loaded.letterbox, list(loaded.image_mean)) == (3, False, [0.5] * 3)
    picture = pictures("RGB", [(37, 25)])[0]
    assert torch.equal(
        loaded(picture, return_tensors="pt")["pixel_values"],
        JamImageProcessor.from_vq_config(config)(picture, return_tensors="pt")["pixel_values"],
    )
