"""Files inside tar files (shards): ``/data/train-000001.tar/abseiling/x.mp4`` is the path of a member of a shard.

Members are read in place, without unpacking. Their positions are in an index beside the shard, ``train-000001.idx``, in
the text format of NVIDIA DALI's wds2idx: ``v1.2 N``, then a line for each of N samples, ``mp4 OFFSET SIZE NAME cls
OFFSET SIZE NAME``. scripts/data/index_shards.py writes it.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

VERSION = b"v1.2"
BUFFER = 1 << 18  # bytes read at a time
KEPT_INDICES = 64  # in memory, in each process
HEADER = tarfile.BLOCKSIZE
REMEDY = "write it with: python scripts/data/index_shards.py"


class ShardError(OSError):
    """A member that cannot be read; the message is the reason, which names the shard."""


class Member(NamedTuple):
    """A file inside of a tar file."""

    name: str
    start: int  # of its bytes in the tar file
    size: int


def split(path: str) -> tuple[str, str] | None:
    """Split the path of a member into shard and name; None for any other path."""
    for match in re.finditer(r"\.tar/", path):
        shard = path[: match.end() - 1]
        if not os.path.isdir(shard):
            return shard, path[match.end() :]
    return None


def key_of(name: str) -> str:
    """Key that the members of one sample share, as in WebDataset: the name up to the first dot after the folders."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


# Indices --------------------------------------------------------------------------------------------------------


def index_path(shard: str) -> str:
    """Path of the index of a shard."""
    return os.path.splitext(shard)[0] + ".idx"


@lru_cache(KEPT_INDICES)
def read_index(shard: str) -> bytes:
    """Read the index of a shard; the latest ones are kept in memory.

    Raises:
        ShardError: there is none, or it has another format.
    """
    try:
        text = Path(index_path(shard)).read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        if not os.path.isfile(shard):
            raise ShardError(f"no such file: {shard}") from error
        raise ShardError(f"{shard} has no index beside it ({error.strerror}); {REMEDY} {shard}") from error
    if not text.startswith(VERSION + b" ") or not text.endswith(b"\n"):
        raise ShardError(f"{index_path(shard)}: not an index of version {VERSION.decode()}; {REMEDY} {shard}")
    return text


def places(text: bytes, name: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and size of each member of that name in an index."""
    at = text.find(b" " + name)
    while at >= 0:
        end = at + 1 + len(name)
        before = text[text.rfind(b"\n", 0, at) + 1 : at].rsplit(b" ", 2)
        if text[end : end + 1] in (b" ", b"\n") and len(before) == 3 and before[1].isdigit() and before[2].isdigit():
            yield int(before[1]), int(before[2])
        at = text.find(b" " + name, end)


def members_of(shard: str) -> list[Member]:
    """List the members in the index of a shard. Raises ShardError."""
    members = []
    for line in os.fsdecode(read_index(shard)).split("\n")[1:]:
        row = re.split(r"(?:^| )(\S+) (\d+) (\d+) (?=\S)", line)  # names may contain spaces
        for start, size, name in zip(row[2::4], row[3::4], row[4::4]):
            members.append(Member(name.removeprefix("./"), int(start), int(size)))
    return members


def names_below(folder: str) -> list[str]:
    """List the names in a shard, or in a folder of a shard, relative to it. Raises ShardError."""
    shard, inside = split(os.path.join(folder, "")) or (folder, "")
    return [member.name.removeprefix(inside) for member in members_of(shard) if member.name.startswith(inside)]


# Members --------------------------------------------------------------------------------------------------------


def find(shard: str, name: str) -> Member:
    """Find a member of a shard by name. Raises ShardError if there is none, or several."""
    text, encoded = read_index(shard), os.fsencode(name)
    found = list(places(text, encoded)) or list(places(text, b"./" + encoded))
    if len(found) > 1:
        raise ShardError(f"{shard} has {len(found)} members of the name {name}")
    if not found:
        raise ShardError(f"no such file: {shard} has no member {name}")
    return Member(name, *found[0])


class Window(io.RawIOBase):
    """A part of an open file, as a readable file."""

    def __init__(self, descriptor: int, start: int, size: int, name: str):
        self.descriptor, self.start, self.size, self.at = descriptor, start, size, 0
        self.name = name  # FFmpeg looks at its suffix

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        part = memoryview(buffer)[: max(0, self.size - self.at)]
        count = os.preadv(self.descriptor, [part], self.start + self.at)
        self.at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def open_file(path: str) -> BinaryIO:
    """Open a file, or a member of a shard, for reading.

    Raises:
        OSError: no such file. ShardError, a subclass: no such member, or the shard does not match its index.
    """
    if not (parts := split(path)):
        return open(path, "rb")
    shard, member = parts[0], find(*parts)
    try:
        descriptor = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"{shard}: {error.strerror}") from error
    file = io.BufferedReader(Window(descriptor, member.start, member.size, path), BUFFER)
    try:
        check_place(descriptor, shard, member)
    except ShardError:
        file.close()
        raise
    return cast(BinaryIO, file)


def check_place(descriptor: int, shard: str, member: Member) -> None:
    """Compare a member with the shard's length and its tar header. Raises ShardError if they differ."""
    name, start, size = member
    length = os.fstat(descriptor).st_size
    if start + size > length:
        raise ShardError(f"{shard} is cut off: {length} bytes, and the member ends at {start + size}")
    try:
        header = tarfile.TarInfo.frombuf(os.pread(descriptor, HEADER, start - HEADER), "utf-8", "surrogateescape")
        plain = name.isascii() and len(name) < 100  # other names stand in a header of their own
        fits = header.size == size and (not plain or header.name.removeprefix("./") == name)
    except tarfile.HeaderError:
        fits = False
    if not fits:
        raise ShardError(f"{index_path(shard)} is not the index of {shard}; {REMEDY} {shard}")


@contextmanager
def opened(path: str) -> Iterator[str | BinaryIO]:
    """Input for a decoder, in a ``with`` block: a file's path, or a member of a shard as an open file.

    Raises:
        ShardError: see open_file.
    """
    with open_file(path) if split(path) else nullcontext(path) as source:
        yield source


def problem_of(path: str) -> str:
    """Return why a file, or a member of a shard, does not exist; '' if it does."""
    parts = split(path)
    if not os.path.isfile(parts[0] if parts else path):
        return f"no such file: {parts[0]}" if parts else "no such file"
    try:
        if parts:
            find(*parts)
    except ShardError as error:
        return str(error)
    return ""


def status(path: str) -> tuple[int, int]:
    """Size in bytes, and modification time of the file or shard in nanoseconds. Raises OSError."""
    parts = split(path)
    result = os.stat(parts[0] if parts else path)
    return (find(*parts).size if parts else result.st_size), result.st_mtime_ns
