"""Not in the source distribution, where it finds local copies of files of the Hub: here, pictures drawn on the spot."""

import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def url_to_local_path(url: str, return_url_if_not_found: bool = True) -> str:
    """A picture of random pixels for the address of a picture, always the same; other addresses come back as they
    are.
    """
    if not url.endswith((".png", ".jpg", ".jpeg")):
        return url
    path = Path(tempfile.gettempdir()) / f"jam-conformance-{zlib.crc32(url.encode()):08x}.png"
    if not path.exists():
        pixels = np.random.default_rng(zlib.crc32(url.encode())).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(path)
