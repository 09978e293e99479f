#!/usr/bin/env bash
# Pillow 13.0.0: in a grey PNG of 2 or 4 bits with a clear shade (tRNS), another shade becomes transparent, or none.
#
# The shades are spread to 8 bits as the picture is read (times 85 or 17), the clear shade is not: info["transparency"]
# stays the number of the file, and convert("RGBA") compares the two. With 8 bits all is right.
#
# Seen, shades 0 to 3 of 2 bits, shade 2 clear: convert("RGBA") clears none of 0, 85, 170, 255 (right: 170).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pillow==13.0.0
"$work/venv/bin/python" - <<'PY'
import io
import struct
import zlib

from PIL import Image


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey_png(depth, shades, clear):
    bits = "".join(format(shade, f"0{depth}b") for shade in shades)
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", len(shades), 1, depth, 0, 0, 0, 0)
    data = [(b"IHDR", header), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in data)


cleared = {}
for depth, shades, clear in ((8, [0, 2, 170], 2), (4, [0, 2, 7, 15], 7), (2, [0, 1, 2, 3], 2)):
    picture = Image.open(io.BytesIO(grey_png(depth, shades, clear)))
    alpha = picture.convert("RGBA").getchannel("A")
    cleared[depth] = [shade for x, shade in enumerate(shades) if alpha.getpixel((x, 0)) == 0]
    print(f"{depth} bits, shade {clear} clear; cleared: {cleared[depth]}")
assert cleared == {8: [2], 4: [], 2: []}, "the clear shade is spread as the others are now"
PY
