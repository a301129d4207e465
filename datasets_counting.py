"""Videos with annotated repetitions: UCFRep's .mat files, whole segments for counting, parts of them for training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from scipy.io import loadmat

from datasets import Key, VideoDataset, VideoStream, sample_rng
from lists import VIDEO_SUFFIXES, VideoList, list_of
from modeling_counting import MIN_CYCLES
from utils import RunError
from video_reader import VideoError, read_clip
from video_transforms import resize

SPARE_FRAMES = 5  # decoders disagree on the last few frames of a file


@dataclass(frozen=True)
class Annotation:
    """A video, its annotated segment, and the boundaries of its C cycles; frames are numbered from 0."""

    video: str
    first: int
    last: int
    bounds: np.ndarray  # int [C + 1], increasing

    @property
    def cycles(self) -> int:
        """Number of its cycles, C."""
        return len(self.bounds) - 1


def read_annotation(path: Path, video: str) -> Annotation:
    """Read a ``.mat`` of UCFRep: a struct `label` with `start_frame`, `end_frame` and `temporal_bound`, from 1.

    Its offsets are not read, as cycle_offsets computes them from the boundaries for any segment.

    Raises:
        ValueError: another kind of file, or invalid frames.
    """
    try:
        label = loadmat(path, simplify_cells=True)["label"]
        first, last = int(label["start_frame"]) - 1, int(label["end_frame"]) - 1
        bounds = np.asarray(label["temporal_bound"], dtype=np.float64).ravel() - 1
    except Exception as error:  # SciPy, zlib and missing fields each fail in their own ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise ValueError(f"{path}: not an annotation of UCFRep, a struct `label` in a .mat ({reason})") from error
    whole = np.isfinite(bounds).all() and (bounds == bounds.round()).all()
    if not (whole and 0 <= first < last and bounds[0] >= 0 and (np.diff(bounds) > 0).all()):
        raise ValueError(f"{path}: temporal_bound, start_frame and end_frame must be increasing whole numbers from 1")
    if len(bounds) <= MIN_CYCLES:
        raise ValueError(f"{path}: {len(bounds) - 1} cycles; there must be at least {MIN_CYCLES}")
    return Annotation(video, min(first, int(bounds[0])), max(last, int(bounds[-1])), bounds.astype(int))


def read_annotations(folder: str, root: str) -> VideoList:
    """Read the annotations in a folder, the labels of the list, and find their videos by name.

    Args:
        root: folder of the videos, at most one folder deep. Names of those folders do not matter: UCF101 itself has
            ``HandstandPushups/v_HandStandPushups_g01_c01.avi``.
    Raises:
        ValueError: no annotation, an invalid one, or one without video or with two.
    """
    files = sorted(Path(folder).glob("*.mat"))
    if not files:
        raise ValueError(f"{folder}: no annotations there (*.mat)")
    found = [path for pattern in ("*.*", "*/*.*") for path in sorted(Path(root).glob(pattern))]
    videos, wanted = dict[str, str](), {file.stem for file in files}
    for path in found:
        if path.suffix.lower() in VIDEO_SUFFIXES and path.stem in wanted:
            if path.stem in videos:
                raise ValueError(f"--data_root {root}: two videos of one name, {videos[path.stem]} and {path}")
            videos[path.stem] = str(path)
    missing = [file.stem for file in files if file.stem not in videos]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(files)} videos are not in --data_root {root}, the first: {missing[0]}"
        )
    annotations = np.array([read_annotation(file, videos[file.stem]) for file in files])
    return replace(list_of(folder, [annotation.video for annotation in annotations]), labels=annotations)


def pad_to_square(frame: np.ndarray, side: int) -> np.ndarray:
    """Resize so that the long side is `side`, and pad with black: uint8 ``[H, W, 3]`` → ``[side, side, 3]``."""
    shrink = side / max(frame.shape[:2])
    height, width = (min(side, max(1, round(length * shrink))) for length in frame.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = resize(frame[None], height, width)[0]
    return square


def read_segment(annotation: Annotation, first: int, last: int, side: int, reader: str) -> np.ndarray:
    """Read frames `first` to `last` of a video with pad_to_square, uint8 ``[F, side, side, 3]``.

    Raises:
        VideoError: unreadable, or much shorter than its annotation.
    """

    def choose(total: int) -> np.ndarray:
        if annotation.last >= total + SPARE_FRAMES:
            raise VideoError(f"annotated up to frame {annotation.last + 1}, but it has {total}")
        return np.arange(first, last + 1).clip(max=total - 1)

    return read_clip(annotation.video, choose, reader, lambda frame: pad_to_square(frame, side)).frames


def draw_cycles(rng: np.random.Generator, bounds: np.ndarray, max_frames: int) -> np.ndarray:
    """Draw a run of at least MIN_CYCLES cycles and at most `max_frames` frames (or the shortest run) as its boundaries.

    Draws the number of cycles first, then the start. Were all runs equally likely, most would be short, and training
    would rarely see segments of many cycles.
    """
    begin, end = np.triu_indices(len(bounds), k=MIN_CYCLES)
    length = bounds[end] - bounds[begin] + 1
    fits = length <= max(max_frames, length.min())
    fits &= end - begin == rng.choice(np.unique((end - begin)[fits]))
    chosen = rng.choice(np.flatnonzero(fits))
    return bounds[begin[chosen] : end[chosen] + 1]


@dataclass(eq=False)
class TrainSegments(VideoDataset):
    """Random parts of the videos of read_annotations, flipped with p = .5.

    Args:
        per_video: parts of each video in an epoch; sample i is of video i % n.
    """

    videos: VideoList
    per_video: int
    max_frames: int
    side: int
    seed: int
    reader: str = "pyav"

    def __post_init__(self):
        self.videos = self.videos.subset(np.tile(np.arange(len(self.videos)), self.per_video))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        rng, annotation = sample_rng(self.seed, *key), self.videos.labels[key[1]]
        bounds = draw_cycles(rng, annotation.bounds, self.max_frames)
        try:
            frames = read_segment(annotation, bounds[0], bounds[-1], self.side, self.reader)
        except VideoError as error:
            raise RunError(f"{annotation.video}: {error}") from error
        if rng.random() < 0.5:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        return {"frames": frames, "bounds": bounds, "seed": int(rng.integers(2**63)), "path": annotation.video}


class SegmentBatch(TypedDict):
    """A batch of segments, in lists as they differ in length."""

    segments: list[tuple[np.ndarray, np.ndarray]]  # frames uint8 [F, S, S, 3], boundaries int [C + 1]
    seeds: list[int]
    paths: list[str]
    bad: list[tuple[str, str]]  # always empty: an unreadable video ends the run
    num_bad_videos: int


def collate_segments(samples: list[dict[str, Any]]) -> SegmentBatch:
    """Collect samples into a batch."""
    seeds, paths = ([sample[name] for sample in samples] for name in ("seed", "path"))
    segments = [(sample["frames"], sample["bounds"]) for sample in samples]
    return {"segments": segments, "seeds": seeds, "paths": paths, "bad": [], "num_bad_videos": 0}


class WholeSegments(VideoStream):
    """Annotated segments for counting: `frames` uint8 ``[F, S, S, 3]``, or none and the reason in `error`."""

    def __init__(self, videos: VideoList, mine: Sequence[int], side: int, reader: str = "pyav"):
        super().__init__(videos, mine)
        self.side, self.reader = side, reader

    def samples(self, index: int) -> Iterator[dict[str, Any]]:
        annotation = self.videos.labels[index]
        frames, error = np.empty(0, np.uint8), ""
        try:
            frames = read_segment(annotation, annotation.first, annotation.last, self.side, self.reader)
        except VideoError as unreadable:
            error = f"{annotation.video}: {unreadable}"
        yield {"index": index, "frames": torch.from_numpy(frames), "error": error, "last": True}
