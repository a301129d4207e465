"""Lists of videos, text files with a line ``path label`` for each, for programs and scripts/data alike.

A list may be long, so its paths are one array of bytes, which loader workers share without copying. metrics.Task
defines what labels mean.
"""

import codecs
import glob
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards import problem_of, split

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts",
                  ".mts", ".m2ts", ".vob", ".ogv", ".m2v", ".mpe", ".3g2", ".asf", ".f4v", ".divx")  # fmt: skip
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BLOCK = 1 << 18  # characters read at a time


def any_label(text: str) -> int:
    """Parse any label as -1, for lists whose labels are not used."""
    return -1


def label_text(text: str) -> str:
    """Keep a label as it is written."""
    return text


@dataclass(frozen=True)
class VideoList:
    """Paths and labels of videos."""

    source: str  # the list file, or another name for messages
    paths: np.ndarray  # as written in the file, bytes [n]
    labels: np.ndarray  # parsed labels, numbers or bytes [n]
    lines: np.ndarray  # line numbers in the file, from 1, int [n]
    data_root: str = ""  # folder that relative paths start from

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Path of a video."""
        return os.path.join(self.data_root, os.fsdecode(self.paths[index]))

    def where(self, index: int) -> str:
        """Return file and line of a video, for messages."""
        return f"{self.source}, line {self.lines[index]}"

    def subset(self, indices: np.ndarray) -> "VideoList":
        """Return the list of some of the videos."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices], lines=self.lines[indices])

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Return those of the given videos that do not exist, as a file or member of a shard."""
        return [index for index in indices if problem_of(self.path(index))]

    def spread(self, count: int) -> np.ndarray:
        """Return the indices of at most `count` videos, evenly spread over the list."""
        return np.unique(np.linspace(0, len(self) - 1, count).astype(int))

    def check_files(self, max_bad_fraction: float) -> None:
        """Look for 200 of the videos. Raises ValueError if more than this fraction of them is missing."""
        looked = self.spread(200)
        missing = self.missing(looked)
        if len(missing) > max_bad_fraction * len(looked):
            raise ValueError(
                f"{self.where(missing[0])}: {why_missing(self.path(missing[0]))} "
                f"({len(missing)} of {len(looked)} looked for are missing, more than --max_bad_fraction "
                f"{max_bad_fraction}); relative paths start from --data_root"
            )

    def write(self, path: str) -> None:
        """Write a list file, with paths that include data_root."""
        with open(path, "wb") as file:
            for index, label in enumerate(self.labels):
                text = label if isinstance(label, bytes) else b"%d" % label
                file.write(os.fsencode(self.path(index)) + b" " + text + b"\n")


def list_of(source: str, paths: list[str]) -> VideoList:
    """Make a list of paths, without labels."""
    encoded = np.array([os.fsencode(path) for path in paths])
    return VideoList(source, encoded, np.full(len(paths), -1, np.int32), np.arange(1, len(paths) + 1))


def why_missing(path: str) -> str:
    """Explain why the path of a list does not exist: it may be a folder, or the line has a third part."""
    if split(path):
        return problem_of(path)
    words = path.split(" ")
    begins = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    found = next((begin for begin in begins if begin and os.path.exists(begin)), "")
    rest = path.removeprefix(found).strip()
    if found and not re.fullmatch(r"[\d ,;:.-]*", rest):
        found = ""  # another file whose name is a prefix
    if os.path.isdir(found):
        return frames_in(found) or f"{found} is a folder, not a video"
    if found:
        return f"no such file: {path}; there is {found}, so {rest!r} should not be there: a line is `path label`"
    if os.path.isfile(bare := path.replace('"', "").rstrip(" ,;")):
        return f"no such file: {path}; there is {bare}: a line is `path label`, without quotes and commas"
    return f"no such file: {path}"


def frames_in(folder: str) -> str:
    """Explain how to use a folder of frames as a video; '' if there are no images in it or below."""
    for place, _, names in os.walk(folder):
        if frames := sorted(name for name in names if name.lower().endswith(FRAME_SUFFIXES)):
            pattern = shlex.quote(glob.escape(os.path.join(place, "")) + "*" + Path(frames[0]).suffix)
            target = shlex.quote(place.rstrip("/") + ".mp4")
            options = "-vf 'pad=ceil(iw/2)*2:ceil(ih/2)*2' -pix_fmt yuv420p"
            return (
                f"{place} is a folder of frames, which are not read: make a video of it and list that: "
                f"ffmpeg -framerate 25 -pattern_type glob -i {pattern} {options} {target}"
            )
    return ""


def encoding_of(path: str | Path) -> str:
    """Tell the encoding of a text file by its byte order mark; UTF-8 without one. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):  # the first begins with UTF-16's mark
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


@contextmanager
def text_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turn the errors of reading text into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as {kind} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as {kind} (not UTF-8: {error.reason})") from error


def read_text(path: str | Path) -> str:
    """Read a text file, with ``\\n`` between lines. Raises ValueError if it cannot be read as text."""
    with text_errors(path, "a text file"):
        return Path(path).read_text(encoding_of(path))


def read_lines(path: str, labelled: bool = True) -> Iterator[tuple[list[int], list[bytes], list[bytes]]]:
    """Yield numbers (from 1), paths and labels of some thousand lines of a list at a time, without blank lines.

    If not `labelled`, a line that is one word or ends like the name of a video is a path, with the label -1. Raises
    ValueError if it is not a text file, or a line, named by its number, is not ``path label``.
    """
    first = 1
    with text_errors(path, "a list, a text file"), open(path, encoding=encoding_of(path)) as file:
        while text := file.read(BLOCK):
            text += file.readline()
            if "\0" in text:
                raise ValueError(f"{path}: cannot be read as a list, a text file (it has zero bytes)")
            lines = [line.strip() for line in text.encode().split(b"\n")]
            numbers = [number for number, line in enumerate(lines, first) if line]
            lines = [line for line in lines if line]
            labels = [line.rsplit(None, 1)[-1] for line in lines]
            paths = [line[: -len(label)].rstrip() for line, label in zip(lines, labels)]
            for i, label in enumerate(() if labelled else labels):
                if not paths[i] or label.lower().endswith(tuple(map(str.encode, VIDEO_SUFFIXES))):
                    paths[i], labels[i] = lines[i], b"-1"
            if b"" in paths:
                bad = paths.index(b"")
                line = os.fsdecode(lines[bad])[:80]
                raise ValueError(f"{path}, line {numbers[bad]}: {line!r} is not `path label`, with a space between")
            if lines:
                yield numbers, paths, labels
            first += text.count("\n")


def read_list(
    path: str, parse_label: Callable[[str], int | str | bytes], data_root: str = "", labelled: bool = True
) -> VideoList:
    """Read a list file, with ``path label`` on each line, separated by the line's last spaces.

    Args:
        labelled: False if lines may have no label, see read_lines.
        parse_label: converts the text of a label to the number or text to keep; raises ValueError if it is invalid.
    Raises:
        ValueError: no such file, empty, or a line, named by its number, that is not ``path label``.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such list file")
    count, width = 0, 1
    for _, names, _ in read_lines(path, labelled):
        count, width = count + len(names), max(width, *map(len, names))
    if not count:
        raise ValueError(f"{path}: the list is empty")

    @lru_cache(10_000)
    def parsed(text: bytes) -> int | bytes:
        label = parse_label(os.fsdecode(text))
        return os.fsencode(label) if isinstance(label, str) else label

    paths, lines, labels = np.empty(count, f"S{width}"), np.empty(count, np.int32), list[np.ndarray]()
    done = 0
    for numbers, names, texts in read_lines(path, labelled):
        part = slice(done, done + len(names))
        paths[part], lines[part], done = names, numbers, part.stop
        values = []
        try:
            for text in texts:
                values.append(parsed(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {numbers[len(values)]}: {error}") from error
        found = np.array(values, np.int32 if isinstance(values[0], int) else None)
        small = found.dtype == np.int32 and np.abs(found).max() < 2**15
        labels.append(found.astype(np.int16) if small else found)
    return VideoList(path, paths, np.concatenate(labels), lines, data_root)


def find_files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Find the files in a folder and all below it with one of these suffixes, in any case; sorted."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True) if folder else []
    return sorted(path for path in found if path.lower().endswith(suffixes))
