"""The index that a tar file needs beside it so that its members can be read in place (shards.py).

    python scripts/data/index_shards.py /data/objects.tar /data/shards/*.tar

Each is read through once, header by header. make_lists.py shards does the same for shards that have none.
"""

import argparse
import os
import tarfile

import data_tools  # noqa: F401 - finds the modules at the top level

from shards import VERSION, Member, ShardError, index_path, key_of
from utils import RunError, run_main

BLOCK = tarfile.BLOCKSIZE


def scan(shard: str) -> list[Member]:
    """The files in a tar file, by reading all its headers.

    Raises:
        ShardError: it is no tar file, or cut off.
    """
    members = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isreg():
                    members.append(Member(info.name.removeprefix("./"), info.offset_data, info.size))
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)  # where tarfile stopped
            whole = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{shard}: cannot be read as a tar file ({getattr(error, 'strerror', 0) or error})") from error
    if not whole:
        raise ShardError(f"{shard}: the tar file is cut off: it has no end mark after {len(members)} members")
    return members


def write_index(shard: str, members: list[Member]) -> None:
    """Write the index of a shard, all of it or nothing. Members of one sample lie side by side.

    Raises:
        ShardError: it cannot be written, or a member has a name that no index can hold.
    """
    rows: list[list[Member]] = []
    for member in members:
        if "\n" in member.name or not key_of(member.name):
            raise ShardError(f"{shard}: no index can hold the name {member.name!r}")
        if rows and key_of(rows[-1][0].name) == key_of(member.name):
            rows[-1].append(member)
        else:
            rows.append([member])
    unfinished = f"{index_path(shard)}.{os.getpid()}.unfinished"
    suffix = lambda name: name[len(key_of(name)) + 1 :] or "-"
    try:
        with open(unfinished, "wb") as file:
            file.write(b"%s %d\n" % (VERSION, len(rows)))
            for row in rows:
                line = " ".join(f"{suffix(name)} {start} {size} {name}" for name, start, size in row)
                file.write(os.fsencode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, index_path(shard))
    except OSError as error:
        raise ShardError(
            f"{index_path(shard)}: cannot be written ({error.strerror}); where the shards lie in a folder of others, "
            "make a folder of links to them, and use that"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Print what is done: write the index of each tar file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
