"""Object images for the soak tests: good ones in every form, and broken ones."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from soak.corpus import cut, flip


def png(width=24, height=20, bits=8, colour=6, palette=b"", transparent=b"", lines=None, before=b"", level=6):
    """A PNG file put together by hand, so that it can be anything.

    Args:
        colour: type of the standard: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
        palette, transparent: PLTE and tRNS chunks.
        lines: the picture's bytes, a filter byte before each line; None: a gradient.
        before: chunks to put before the picture.
    """
    if lines is None:
        length = (width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
        lines = b"".join(bytes([0]) + bytes((7 * x + 3 * y + 1) % 256 for x in range(length)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"PLTE", palette) * bool(palette)
        + chunk(b"tRNS", transparent) * bool(transparent)
        + chunk(b"IDAT", zlib.compress(lines, level))
        + chunk(b"IEND", b"")
    )


def chunk(kind, content):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(pixels, mode, kind, **options):
    """Pixels as a file of some kind, written by PIL."""
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind, **options)
    return file.getvalue()


def good_objects():
    """(name, bytes) of images that are to be read."""
    palette, palette_lines = bytes(range(48)), (bytes([0]) + bytes(x % 16 for x in range(24))) * 20
    for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for bits in depths:
            extra = {"palette": palette[: 3 * 2 ** min(bits, 4)]} if colour == 3 else {}
            extra |= {"lines": palette_lines} if (colour, bits) == (3, 8) else {}
            yield f"type{colour}-{bits}bit.png", png(bits=bits, colour=colour, **extra)
            if colour in (0, 2):
                hole = struct.pack(">H", 1) if colour == 0 else struct.pack(">HHH", 1, 8, 15)
                yield f"type{colour}-{bits}bit-hole.png", png(bits=bits, colour=colour, transparent=hole)
    alpha = bytes(range(0, 160, 10))
    yield "palette-alpha.png", png(colour=3, palette=palette, transparent=alpha, lines=palette_lines)
    for filter_type in range(5):
        yield f"filter{filter_type}.png", png(lines=(bytes([filter_type]) + bytes(range(1, 97))) * 20)
    for size in ((1, 1), (1, 300), (300, 1), (2, 2), (2000, 3), (1500, 1500)):
        yield f"{size[0]}x{size[1]}.png", png(*size)
    yield "one-pixel-left.png", png(lines=(bytes(97) * 19 + bytes([0] * 96 + [255])))
    pixels = np.random.default_rng(0).integers(1, 255, (40, 30, 4), np.uint8)
    forms = "RGBA-WEBP RGB-WEBP RGB-JPEG CMYK-JPEG L-JPEG P-GIF RGB-BMP RGBA-TIFF RGBA-ICO 1-PNG LA-PNG"
    for form in forms.split():
        yield f"{form}.png", saved(pixels, *form.split("-"))
    second = Image.fromarray(pixels[::-1].copy(), "RGBA")
    yield "animated.png", saved(pixels, "RGBA", "PNG", save_all=True, append_images=[second])
    yield "long-text.png", png(before=chunk(b"tEXt", b"Comment\0" + b"x" * 100_000))


def bad_objects(cuts, flips, seed=0):
    """(name, bytes) of images that are broken, pretend to be what they are not, or hold nothing; some may be read."""
    rng = random.Random(seed)
    whole = saved(np.random.default_rng(0).integers(1, 255, (64, 48, 4), np.uint8), "RGBA", "PNG")
    for number in range(cuts):
        yield f"cut{number}.png", cut(whole, rng.random() if number > 10 else number * 7)
    for number in range(flips):
        yield f"flip{number}.png", flip(whole, rng, rng.choice((1, 3, 20)), (0, 0.02) if number % 4 == 0 else (0, 1))
    grey = np.full((64, 48, 4), 90, np.uint8)
    yield "half.jpg", cut(saved(grey, "RGB", "JPEG"), 0.5)
    yield "half.webp", cut(saved(grey, "RGBA", "WEBP"), 0.5)
    yield "clear.png", png(lines=bytes(97 * 20))
    yield "clear-palette.png", png(colour=3, palette=bytes(6), transparent=bytes(2), lines=bytes(25 * 20))
    yield "clear-1x1.png", png(1, 1, lines=bytes(5))
    for size in ((60000, 60000), (1 << 30, 1), (1, 1 << 30), (1 << 31, 1 << 31), (0, 20), (20, 0), (12000, 15000)):
        yield f"claims-{size[0]}x{size[1]}.png", png(*size, lines=bytes(100))
    yield "bomb.png", png(12000, 12000, lines=bytes(48001 * 12000), level=9)
    yield "text-bomb.png", png(before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)))
    yield "profile-bomb.png", png(before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100_000_000), 9)))
    yield "bad-depth.png", png(bits=16, colour=3, palette=bytes(6), lines=bytes(1000))
    yield "bad-filter.png", png(lines=bytes([9]) * 97 * 20)
    yield "too-few-lines.png", png(lines=bytes(97) + bytes([0] + [200] * 96))
    yield "no-palette.png", png(colour=3, lines=bytes(25 * 20))
    yield "palette-too-short.png", png(colour=3, palette=bytes(3), lines=(bytes([0]) + bytes(range(24))) * 20)
    yield "no-picture.png", whole[:33] + chunk(b"IEND", b"")
    yield "no-end.png", whole[:-12]
    yield "two.png", whole + whole
    yield "empty.png", b""
    yield "text.png", b"not an image\n" * 100
    yield "page.png", b"<!DOCTYPE html><html>404</html>"
    yield "drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "zeros.png", bytes(10_000)
