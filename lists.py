"""Lists of videos, a line ``path label`` for each: their reading, for programs and scripts/data alike.

A list may be long, so its paths are one array of bytes, which loader workers share without copying. What labels
mean is the business of metrics.Task.
"""

import codecs
import glob
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards import problem_of, split

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts",
                  ".mts", ".m2ts", ".vob", ".ogv", ".m2v", ".mpe", ".3g2", ".asf", ".f4v", ".divx")  # fmt: skip
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BLOCK = 1 << 18  # bytes read at a time
MAX_KNOWN = 10_000  # texts of labels whose meaning is kept while a list is read
LabelParser = Callable[[str], int | str | bytes]


# Labels ---------------------------------------------------------------------------------------------------------


def any_label(text: str) -> int:
    """The label of lists whose labels are not needed: -1, whatever they say."""
    return -1


def label_text(text: str) -> str:
    """Labels of any kind, kept as they are written."""
    return text


# Lists ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoList:
    """Paths and labels of videos.

    Attributes:
        source: the list file, or what takes its place in messages.
        paths: as they are written there, bytes ``[n]``.
        labels: what parse_label made of them, numbers or bytes ``[n]``.
        lines: their numbers in the file, from 1, int ``[n]``.
        data_root: folder that relative paths start from.
    """

    source: str
    paths: np.ndarray
    labels: np.ndarray
    lines: np.ndarray
    data_root: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Path of a video."""
        path = os.path.join(self.data_root, os.fsdecode(self.paths[index]))
        return os.path.join(".", path) if ":" in path.partition("/")[0] else path  # `a:b` would be a protocol

    def where(self, index: int) -> str:
        """The place of a video in the list file, for messages."""
        return f"{self.source}, line {self.lines[index]}"

    def subset(self, indices: np.ndarray) -> "VideoList":
        """The list of these videos alone."""
        return replace(self, paths=self.paths[indices], labels=self.labels[indices], lines=self.lines[indices])

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of these videos that are no file, and no member of a shard."""
        return [index for index in indices if problem_of(self.path(index))]

    def check_files(self, max_bad_fraction: float, look_at: int = 200) -> None:
        """Look for some of the files, evenly over the list, so that a wrong folder shows before anything is computed.

        Raises:
            ValueError: more than this fraction of them is missing.
        """
        looked = np.unique(np.linspace(0, len(self) - 1, look_at).astype(int))
        missing = self.missing(looked)
        if len(missing) > max_bad_fraction * len(looked):
            raise ValueError(
                f"{self.where(missing[0])}: {why_missing(self.path(missing[0]))} "
                f"({len(missing)} of {len(looked)} looked for are missing, more than --max_bad_fraction "
                f"{max_bad_fraction}); relative paths start from --data_root"
            )

    def write(self, path: str) -> None:
        """Write it as a list file, with paths as they are opened."""
        with open(path, "wb") as file:
            for index, label in enumerate(self.labels):
                text = label if isinstance(label, bytes) else b"%d" % label
                file.write(os.fsencode(self.path(index)) + b" " + text + b"\n")


def list_of(source: str, paths: list[str]) -> VideoList:
    """A list that stands in no file, without labels."""
    encoded = np.array([os.fsencode(path) for path in paths])
    return VideoList(source, encoded, np.full(len(paths), -1, np.int32), np.arange(1, len(paths) + 1))


def why_missing(path: str) -> str:
    """What to do about a path of a list that is no file: it may be a folder, or its line more than path and label."""
    if split(path):
        return problem_of(path)
    words = path.split(" ")
    begins = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    found = next((begin for begin in begins if begin and os.path.exists(begin)), "")
    rest = path.removeprefix(found).strip()
    if found and not re.fullmatch(r"[\d ,;:.-]*", rest):
        found = ""  # another file that happens to begin so
    if os.path.isdir(found):
        return frames_in(found) or f"{found} is a folder, not a video"
    if found:
        return f"no such file: {path}; there is {found}, so {rest!r} should not be there: a line is `path label`"
    return f"no such file: {path}"


def frames_in(folder: str) -> str:
    """What to do about a folder whose images are the frames of videos; '' if there are none in it or below."""
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


# Reading --------------------------------------------------------------------------------------------------------


def open_text(path: str | Path) -> BinaryIO:
    """A text file as UTF-8, whether or not it begins with a byte order mark; UTF-16 is converted.

    Raises:
        OSError: it cannot be opened. UnicodeDecodeError: it begins as UTF-16, but is not.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    wide = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}.get(start[:2])
    wide = "utf-32" if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) else wide
    if wide:
        return io.BytesIO(Path(path).read_bytes().decode(wide).encode())
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    return file


def read_text(path: str | Path) -> str:
    """The text of a file, with ``\\n`` between lines; see open_text.

    Raises:
        ValueError: it cannot be read as text.
    """
    try:
        with open_text(path) as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a text file ({reason_of(error)})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def reason_of(error: OSError | UnicodeDecodeError) -> str:
    """Why a file could not be read as text."""
    return error.strerror or str(error) if isinstance(error, OSError) else f"not UTF-8: {error.reason}"


class Block(NamedTuple):
    """Some lines of a list, each ``path label`` without spaces around; places are those of bytes in `text`, ``[n]``."""

    text: bytes
    starts: np.ndarray
    spaces: np.ndarray  # between path and label
    ends: np.ndarray
    numbers: np.ndarray  # of the lines in the file, from 1

    def paths(self, width: int) -> np.ndarray:
        """The paths, bytes ``[n]`` of at least so many."""
        paths = self.cut(self.starts, self.spaces, width)
        several = (np.frombuffer(self.text, np.uint8)[self.spaces - 1] <= ord(" ")).any()
        return np.char.rstrip(paths) if several else paths

    def labels(self) -> list[bytes]:
        """The texts of the labels."""
        return self.cut(self.spaces + 1, self.ends, int((self.ends - self.spaces).max())).tolist()

    def cut(self, starts: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
        """The bytes from one place to another, ``[n]``, none longer than `width`."""
        windows = np.ndarray(len(self.text), f"S{width}", self.text + bytes(width), strides=(1,))  # from each byte on
        rows = windows[starts].view(np.uint8).reshape(-1, width)
        rows *= np.arange(width) < (ends - starts)[:, None]
        return rows.view(windows.dtype)[:, 0]


def split_lines(text: bytes, numbers: np.ndarray, path: str) -> Block | None:
    """The lines with these numbers in a list; blank ones are left out, None if there are no more.

    Raises:
        ValueError: a line that is not ``path label``, named by its number.
    """
    data = np.frombuffer(text, np.uint8)
    marks = np.flatnonzero(data <= ord(" "))
    at = np.flatnonzero(data[marks] == ord("\n"))
    ends, spaces = marks[at], marks[at - 1]
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (data[starts] <= ord(" ")).any() or (data[ends - 1] <= ord(" ")).any():
        lines = [line.strip() for line in text.split(b"\n")[:-1]]
        numbers = numbers[[bool(line) for line in lines]]
        return split_lines(b"".join(line + b"\n" for line in lines if line), numbers, path) if len(numbers) else None
    bad = np.flatnonzero((spaces <= starts) | (spaces >= ends))
    if len(bad):
        line = os.fsdecode(text[starts[bad[0]] : ends[bad[0]]])[:80]
        raise ValueError(f"{path}, line {numbers[bad[0]]}: {line!r} is not `path label`, with a space between")
    return Block(text, starts, spaces, ends, numbers)


def read_blocks(path: str) -> Iterator[Block]:
    """The lines of a list, some thousand at a time.

    Raises:
        ValueError: not a text file, or a line that is not ``path label``, named by its number.
    """
    first = 1
    try:
        with open_text(path) as file:
            while text := file.read(BLOCK):
                text += file.readline()
                text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text
                text += b"" if text.endswith(b"\n") else b"\n"
                if not text.isascii():
                    text.decode()
                if b"\0" in text:
                    raise ValueError(f"{path}: cannot be read as a list, a text file (it has zero bytes)")
                numbers = np.arange(first, first + text.count(b"\n"))
                if block := split_lines(text, numbers, path):
                    yield block
                first += len(numbers)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list, a text file ({reason_of(error)})") from error


def read_list(path: str, parse_label: LabelParser, data_root: str = "") -> VideoList:
    """The videos of a list file.

    Args:
        path: text with ``path label`` a line, separated by the line's last spaces.
        parse_label: text of a label → a number or text to keep; raises ValueError if it is none.
        data_root: folder that relative paths start from.
    Raises:
        ValueError: no such file, empty, or a line that is not ``path label``, named by its number.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such list file")
    count, width = 0, 1
    for block in read_blocks(path):
        count, width = count + len(block.starts), max(width, int((block.spaces - block.starts).max()))
    if not count:
        raise ValueError(f"{path}: the list is empty")
    paths, lines, labels = np.empty(count, f"S{width}"), np.empty(count, np.int32), list[np.ndarray]()
    known, done = dict[bytes, int | bytes](), 0
    for block in read_blocks(path):
        part = slice(done, done + len(block.starts))
        paths[part], lines[part], done = block.paths(width), block.numbers, part.stop
        labels.append(parse_labels(block, parse_label, known, path))
    return VideoList(path, paths, np.concatenate(labels), lines, data_root)


def parse_labels(block: Block, parse_label: LabelParser, known: dict[bytes, int | bytes], path: str) -> np.ndarray:
    """The labels of some lines; what a text means is kept in `known`, so that it is parsed once.

    Raises:
        ValueError: one is no label; the message begins with its place.
    """
    texts = block.labels()
    if len(known) > MAX_KNOWN:
        known.clear()
    for text in [text for text in dict.fromkeys(texts) if text not in known]:
        try:
            label = parse_label(os.fsdecode(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {block.numbers[texts.index(text)]}: {error}") from error
        known[text] = os.fsencode(label) if isinstance(label, str) else label
    labels = np.array([known[text] for text in texts])
    small = np.int16 if labels.dtype.kind == "i" and np.abs(labels).max() < 2**15 else np.int32
    return labels.astype(small) if labels.dtype.kind == "i" else labels


def find_files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files in a folder and all below it whose names end so (in any case), sorted."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True) if folder else []
    return sorted(path for path in found if path.lower().endswith(suffixes))
