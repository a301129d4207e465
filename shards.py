"""Files inside tar files (shards): ``/data/train-000001.tar/abseiling/x.mp4`` is the path of a member of a shard.

Their positions are in an index beside the shard, ``train-000001.idx``, in the text format of NVIDIA DALI's wds2idx:
``v1.2 N``, then a line for each of N samples, ``mp4 OFFSET SIZE NAME cls OFFSET SIZE NAME``, written by
scripts/data/index_shards.py.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

VERSION = b"v1.2"
KEPT_INDICES = 64  # in memory, in each process
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


def index_path(shard: str) -> str:
    """Return the path of the index of a shard."""
    return os.path.splitext(shard)[0] + ".idx"


@lru_cache(KEPT_INDICES)
def read_index(shard: str) -> bytes:
    """Read the index of a shard; raises ShardError if there is none, or it has another format."""
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
    return members_in(os.fsdecode(read_index(shard)))


def members_in(index: str) -> list[Member]:
    """List the members in the text of an index."""
    members = []
    for line in index.split("\n")[1:]:
        row = re.split(r"(?:^| )(\S+) (\d+) (\d+) (?=\S)", line)  # names may contain spaces
        for start, size, name in zip(row[2::4], row[3::4], row[4::4]):
            members.append(Member(name.removeprefix("./"), int(start), int(size)))
    return members


def names_below(folder: str) -> list[str]:
    """List the names in a shard, or in a folder of a shard, relative to it. Raises ShardError."""
    shard, inside = split(os.path.join(folder, "")) or (folder, "")
    return [member.name.removeprefix(inside) for member in members_of(shard) if member.name.startswith(inside)]


def find(shard: str, name: str) -> Member:
    """Find a member of a shard by name. Raises ShardError if there is none, or several."""
    text, encoded = read_index(shard), os.fsencode(name)
    found = list(places(text, encoded)) or list(places(text, b"./" + encoded))
    if len(found) > 1:
        raise ShardError(f"{shard} has {len(found)} members of the name {name}")
    if not found:
        raise ShardError(f"no such file: {shard} has no member {name}")
    return Member(name, *found[0])


def read_member(shard: str, member: Member) -> bytes:
    """Read a member of a shard. Raises ShardError if the shard is cut off or does not match its index."""
    try:
        with open(shard, "rb") as file:
            file.seek(max(0, member.start - tarfile.BLOCKSIZE))
            header, data = file.read(tarfile.BLOCKSIZE), file.read(member.size)
            length = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ShardError(f"{shard}: {error.strerror}") from error
    if member.start + member.size > length:
        raise ShardError(f"{shard} is cut off: {length} bytes, and the member ends at {member.start + member.size}")
    if not is_header(header, member.name, member.size):
        raise ShardError(f"{index_path(shard)} is not the index of {shard}; {REMEDY} {shard}")
    return data


def open_file(path: str) -> BinaryIO:
    """Open a file, or a member of a shard, which is read into memory.

    Raises:
        OSError: no such file. ShardError, a subclass: no such member, or the shard does not match its index.
    """
    if not (parts := split(path)):
        return open(path, "rb")
    member: Any = io.BytesIO(read_member(parts[0], find(*parts)))
    member.name = path  # FFmpeg looks at its suffix
    return member


def is_header(block: bytes, name: str, size: int) -> bool:
    """Return whether a block of a tar file is the header of a member."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    plain = name.isascii() and len(name) < 100  # other names are in a header of their own
    return header.size == size and (not plain or header.name.removeprefix("./") == name)


def opened(path: str) -> AbstractContextManager[str | BinaryIO]:
    """Open the input of a decoder, for a ``with`` block: a file's path, or a member of a shard. Raises ShardError."""
    plain = os.path.join(".", path) if ":" in path.partition("/")[0] else path  # `a:b` would be a protocol
    return open_file(path) if split(path) else nullcontext(plain)


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
