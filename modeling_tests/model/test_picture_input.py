"""Pictures come in by many ways, and each gives the same pixels: those that numpy works out from what was drawn."""

import base64
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from jam_hf import JamImageProcessor
from jam_hf.data.sequences import encode_documents
from jam_hf.retrieval.corpus import as_pairs, as_the_vq_model_sees
from jam_hf.training.vq import pixels_of


SIZE = (16, 24)  # height and width
RNG = np.random.default_rng(0)
COLOURS, ALPHA = (RNG.integers(0, 256, (*SIZE, channels), dtype=np.uint8) for channels in (3, 1))
GREY = COLOURS[..., :1]
CLEAR = ALPHA[..., 0] > 128


def _on_white(colours, alpha):
    """The slow oracle, in float64; within 1 of Pillow's integers."""
    share = alpha.astype(np.float64) / 255
    return (colours * share + 255 * (1 - share)).round().repeat(3 // colours.shape[-1], axis=-1).astype(np.uint8)


def _lying():
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned clockwise before it is shown
    return Image.fromarray(COLOURS).transpose(Image.Transpose.ROTATE_90), {"exif": tag}


def _one_clear_colour(colours, mode):
    """A picture in which one colour is transparent without an alpha channel (PNG's tRNS), and what it looks like."""
    pixels, clear = colours.copy(), (7, 8, 9)[: colours.shape[-1]]
    pixels[CLEAR] = clear
    shown = np.where(CLEAR[..., None], 255, pixels).repeat(3 // colours.shape[-1], axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {"transparency": 7 * 257}, shown
    return Image.fromarray(pixels.squeeze()), {"transparency": clear if mode == "RGB" else clear[0]}, shown


# name -> (picture, how it is saved, what it shows as RGB, how far Pillow's alpha may be off)
PICTURES = {
    "RGB": (Image.fromarray(COLOURS), {}, COLOURS, 0),
    "RGBA": (Image.fromarray(np.concatenate((COLOURS, ALPHA), -1)), {}, _on_white(COLOURS, ALPHA), 1),
    "LA": (Image.fromarray(np.concatenate((GREY, ALPHA), -1)), {}, _on_white(GREY, ALPHA), 1),
    "16-bit grey": (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), {}, GREY.repeat(3, -1), 0),
    "EXIF": (*_lying(), COLOURS, 0),
    "RGB, a clear colour": (*_one_clear_colour(COLOURS, "RGB"), 0),
    "grey, a clear shade": (*_one_clear_colour(GREY, "L"), 0),
    "16-bit grey, a clear shade": (*_one_clear_colour(GREY, "I;16"), 0),
}


def _pixels(picture, **kwargs):
    return JamImageProcessor.from_size(16)(picture, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of the pictures as PNG, and the URL at which a server on this machine has it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path_factory.mktemp("pictures")
    for name, (picture, options, _, _) in PICTURES.items():
        picture.save(folder / f"{name}.png", **options)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def _opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def _row(path, decode):
    features = Features({"image": ImageFeature(decode=decode)})
    return Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None}]}, features=features)[0]["image"]


WAYS = {
    "path": lambda path, url: str(path),
    "pathlib": lambda path, url: path,
    "URL": lambda path, url: f"{url}/{quote_from_bytes(path.name.encode())}",
    "data URI": lambda path, url: f"data:image/png;base64,{_encoded(path)}",
    "data URI, percent-encoded": lambda path, url: f"data:image/png,{quote_from_bytes(path.read_bytes())}",
    "base64": lambda path, url: _encoded(path),
    "bytes": lambda path, url: path.read_bytes(),
    "opened": lambda path, url: _opened(path),
    "opened lazily": lambda path, url: Image.open(path),
    "a row of datasets": lambda path, url: _row(path, decode=True),
    "a row of datasets, not decoded": lambda path, url: _row(path, decode=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PICTURES)
def test_every_way_in_gives_what_the_picture_shows(name, way, files):
    folder, url = files
    _, _, shown, off = PICTURES[name]
    found, expected = _pixels(WAYS[way](folder / f"{name}.png", url)), _pixels(Image.fromarray(shown))
    assert (found - expected).abs().max() * 127.5 <= off + 1e-3
    assert torch.equal(found, _pixels(str(folder / f"{name}.png")))


@pytest.mark.parametrize("name", PICTURES)
def test_chats_training_and_memories_read_pictures_alike(name, files, processor, vq):
    folder, url = files
    path = folder / f"{name}.png"
    expected = _pixels(str(path))
    parts = [
        {"type": "image", "image": _opened(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": WAYS["URL"](path, url)},
        {"type": "image", "base64": _encoded(path)},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_encoded(path)}"}},
        {"type": "image_url", "image_url": WAYS["URL"](path, url)},
    ]
    for part in parts:
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), part

    features = Features({"text": Value("string"), "image": ImageFeature()})
    rows = Dataset.from_dict({"text": ["a"], "image": [str(path)]}, features=features)
    assert torch.equal(pixels_of([rows[0]["image"]], vq), expected)
    seen = []
    documents = rows.rename_column("text", "caption")
    encode_documents(documents, processor.tokenizer, lambda images: seen.extend(images) or np.zeros((1, 16), int))
    assert torch.equal(_pixels(seen), expected)
    assert torch.equal(as_the_vq_model_sees(processor, as_pairs(rows)["image"])[0], expected)


@pytest.mark.parametrize("way", ["path", "pathlib", "data URI", "base64", "bytes", "opened lazily"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_clear_shade_of_few_bits_is_that_shade(bits, way, tmp_path):
    """PNG's tRNS names a shade in the bits of the file. Pillow writes no grey of 2 or 4 bits, so it is written here."""
    shades = (np.arange(16 * 16).reshape(16, 16) * 7 // 5 % 2**bits).astype(np.uint8)
    bit_rows = (shades[..., None] >> np.arange(bits)[::-1] & 1).reshape(16, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bit_rows.astype(np.uint8), axis=1))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", 1))]
    path = tmp_path / "few.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in [*chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")])
    )
    shown = (
        np.where(shades == 1, 255, shades.astype(int) * (255 // (2**bits - 1)))[..., None]
        .repeat(3, -1)
        .astype(np.uint8)
    )
    source = WAYS[way](path, None)
    for _ in range(2):  # an opened picture is loaded by the second time
        assert torch.equal(_pixels(source), _pixels(Image.fromarray(shown)))


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_arrays_are_read_as_the_picture_that_they_show():
    expected = {channels: _pixels(Image.fromarray(COLOURS[..., :channels].squeeze())) for channels in (1, 3)}
    for channels, pixels in expected.items():
        last = COLOURS[..., :channels]
        for array in (last, np.moveaxis(last, -1, 0)):
            for dtype in (np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64):
                assert torch.equal(_pixels(array.astype(dtype)), pixels)
                assert torch.equal(_pixels(torch.from_numpy(array.astype(dtype))), pixels)
            for dtype in ("<u2", ">u2"):  # np.asarray of an I;16B picture has the latter
                assert torch.equal(_pixels(array.astype(dtype) * np.array(257, dtype)), pixels)
            for dtype in (np.float32, np.float64):
                unit = array.astype(dtype) / 255
                assert torch.equal(_pixels(unit, do_rescale=False), pixels)
                assert torch.equal(_pixels(torch.from_numpy(unit), do_rescale=False), pixels)
            assert torch.equal(_pixels((array + np.float32(0.3)).clip(max=255)), pixels)  # rounded, not refused
    assert torch.equal(_pixels(GREY[..., 0]), expected[1])
    assert torch.equal(_pixels(torch.from_numpy(COLOURS // 2).bfloat16()), _pixels(COLOURS // 2))  # exact up to 255
    assert torch.equal(_pixels(np.stack([COLOURS] * 2)), expected[3].repeat(2, 1, 1, 1))
    assert torch.equal(_pixels(CLEAR), _pixels(Image.fromarray(CLEAR)))


@pytest.mark.parametrize("name", ["RGBA", "LA"])
def test_arrays_with_alpha_are_laid_on_white_as_pictures_are(name):
    picture = PICTURES[name][0]
    expected, array = _pixels(picture), np.asarray(picture)
    assert torch.equal(_pixels(array), expected)
    assert torch.equal(_pixels(np.moveaxis(array, -1, 0)), expected)
    assert torch.equal(_pixels(array.astype(np.float32)), expected)
    assert torch.equal(_pixels(array.astype(np.float32) / 255, do_rescale=False), expected)


@pytest.mark.parametrize(
    ("array", "settings", "words"),
    [
        (COLOURS / 255, {}, r"float64 in .*1; expected 0\.\.255\. For floats in 0\.\.1, pass do_rescale=False"),
        (COLOURS * 1.0, {"do_rescale": False}, r"expected 0\.\.1\. .*do_rescale=False"),
        (COLOURS, {"do_rescale": False}, r"values in 0\.\.255, and do_rescale=False says"),
        (Image.fromarray(COLOURS), {"do_rescale": False}, r"values in 0\.\.255, and do_rescale=False says"),
        ([COLOURS / 255, COLOURS], {"do_rescale": False}, "Picture 1 has values"),
        (COLOURS / 127.5 - 1, {}, r"float64 in -1..1; expected 0\.\.255"),
        (COLOURS.astype(np.int64) * 257, {}, r"int64 in .*65535; expected 0\.\.255"),
        (COLOURS.astype(np.uint16), {}, r"uint16 in .*; expected 0\.\.65535\. .*uint8"),
        (COLOURS.astype(">u2"), {}, r">u2 in .*; expected 0\.\.65535\. .*uint8"),
        (np.full((*SIZE, 3), np.nan), {}, "in nan..nan; expected"),
        (COLOURS.astype(np.complex64), {}, "array of complex64 is no picture"),
        (np.zeros((9, 9, 5), np.uint8), {}, r"shape \[9, 9, 5\] is no picture"),
        (np.zeros((3, 9, 3), np.uint8), {}, r"shape \[3, 9, 3\].*input_data_format"),
    ],
)
def test_arrays_that_do_not_say_what_they_show(array, settings, words):
    with pytest.raises(ValueError, match=words):
        _pixels(array, **settings)


def test_the_channels_of_a_small_array_can_be_said():
    small = COLOURS[:3]
    assert torch.equal(_pixels(small, input_data_format="channels_last"), _pixels(Image.fromarray(small)))


def test_what_no_server_has_and_what_is_no_picture(files):
    folder, url = files
    (folder / "text.txt").write_text("words")
    for source, words in (
        (f"{url}/absent.png", "Cannot read a picture from .*absent.png.*404"),
        (f"{url}/text.txt", "text.txt.*no picture that Pillow knows"),
        ("data:image/png;base64,AAAA", "data:image/png.*no picture"),
        ({"bytes": b"words", "path": "a.png"}, "from bytes: it is no picture"),
        ({"bytes": None, "path": None}, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            _pixels(source)
