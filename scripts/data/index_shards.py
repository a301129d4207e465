"""Write the index of tar files, with which their members are read in place (shards.py).

    python scripts/data/index_shards.py /data/objects.tar /data/shards/*.tar

`make_lists.py shards` does the same for shards without an index.
"""

import os
import re
import tarfile
from itertools import groupby, zip_longest
from pathlib import Path

from data_tools import new_parser

from shards import VERSION, Member, ShardError, index_path, members_in, read_index
from utils import RunError, run_main, write_atomically

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard


def goes_on(shard: str, members: list[Member]) -> bool:
    """Return whether a tar file has more after these members; raises OSError."""
    end = max((one.start + one.size for one in members), default=0)
    with open(shard, "rb") as file:
        file.seek(-(-end // BLOCK) * BLOCK)
        return any(file.read(BLOCK))


def key_of(name: str) -> str:
    """Return the key that members of one sample share, as in WebDataset: the name up to the first dot after folders."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def suffix_of(name: str) -> str:
    """Return what follows the key in a member's name; ``-`` if that is nothing or, as no index allows, has spaces."""
    suffix = name[len(key_of(name)) + 1 :]
    return "-" if not suffix or re.search(r"\s", suffix) else suffix


def scan(shard: str) -> list[Member]:
    """List the files in a tar file by reading all its headers, but no hidden ones (macOS adds ``._x.mp4`` to x.mp4).

    Raises ShardError: no tar file, compressed, cut off, or with a file whose bytes are not in it as they are.
    """
    try:
        with open(shard, "rb") as file:
            if file.read(4).startswith(COMPRESSED):
                raise tarfile.ReadError("compressed; unpack it first")
        with tarfile.open(shard, "r:") as tar:
            files = [info for info in tar if not info.isdir() and not os.path.basename(info.name).startswith(".")]
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)  # where tarfile stopped
            whole = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{shard}: cannot be read as a tar file ({getattr(error, 'strerror', 0) or error})") from error
    if not whole:
        raise ShardError(f"{shard}: the tar file is cut off: it has no end mark after {len(files)} members")
    if odd := next((info.name for info in files if not info.isreg() or info.issparse()), ""):
        remedy = "pack the shard without tar's --sparse, and with --dereference --hard-dereference"
        raise ShardError(f"{shard}: {odd} is a link or a sparse file; {remedy}")
    return [Member(info.name.removeprefix("./"), info.offset_data, info.size) for info in files]


def write_index(shard: str, members: list[Member]) -> None:
    """Write the index of a shard: a line for each run of members of one sample. Raises ShardError."""
    if wrong := [member.name for member in members if "\n" in member.name]:
        raise ShardError(f"{shard}: no index can hold the name {wrong[0]!r}")
    rows = [list(run) for _, run in groupby(members, key=lambda member: key_of(member.name))]
    lines = [" ".join(f"{suffix_of(name)} {start} {size} {name}" for name, start, size in row) for row in rows]
    text = "".join(f"{line}\n" for line in (f"{VERSION.decode()} {len(rows)}", *lines))
    if lost := [one.name for one, read in zip_longest(members, members_in(text)) if one and one != read]:
        raise ShardError(f"{shard}: no index can hold the name {lost[0]!r}: it has two numbers after a space")
    try:
        write_atomically(Path(index_path(shard)), lambda file: file.write(os.fsencode(text)))
    except OSError as error:
        raise ShardError(
            f"{index_path(shard)}: cannot be written ({error.strerror}); where the shards lie in a folder of others, "
            "make a folder of links to them, and use that"
        ) from error
    read_index.cache_clear()


def main(argv: list[str] | None = None) -> None:
    """Write the index of each tar file, and print its length."""
    parser = new_parser(__doc__)
    parser.add_argument("shards", nargs="+", help="tar files, uncompressed")
    for shard in parser.parse_args(argv).shards:
        try:
            members = scan(shard)
            write_index(shard, members)
        except ShardError as error:
            raise RunError(str(error)) from error
        print(f"{index_path(shard)}: {len(members)} members")


if __name__ == "__main__":
    run_main(main)
