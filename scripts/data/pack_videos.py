"""Videos of lists in a few large tar files in place of a file each, and lists of them there.

    python scripts/data/pack_videos.py lists/train.csv lists/val.csv --output /data/k400 --shard_size 1GB

Written below --output:
    train-000000.tar, .idx    shards in the layout of WebDataset: NAME.mp4 (as it is), NAME.cls (the label's text)
    *.csv                     the lists, with paths that run through the shards; every program takes them as it is
    members.jsonl             source, label, shard and name of each video, a JSON list a line
    failed.tsv                the videos that could not be read, and why
Shards are written beside each other by --workers processes, compared with their sources byte by byte, and only then
given their names. The same command, started again after any end, does what is left; videos that are new in the lists or
failed come into shards of their own. What changes after it was packed is not packed again: take another --output.
"""

import argparse
import io
import json
import os
import re
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_tools import (
    Unusable,
    common_folder,
    names_differ,
    output_folder,
    put_in_place,
    read_list,
    write_lists,
    write_table,
    write_text,
)
from index_shards import scan, write_index
from processes import Team, in_processes

from shards import BUFFER, ShardError, index_path, key_of, members_of, open_file, status
from utils import run_main

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
PLAN = "members.jsonl"


class Packed(NamedTuple):
    """A video and its place."""

    source: str
    label: str
    shard: str  # name of the tar file
    name: str  # in it


def size_of(text: str) -> int:
    """Bytes of a size such as 1GB."""
    match = re.fullmatch(r"([\d.]+) ?([KMG]B|)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", help="lists with lines `path label`")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the lists start from")
    parser.add_argument("--shard_size", type=size_of, default="1GB", help="of a tar file (default %(default)s)")
    parser.add_argument("--relative", action="store_true", help="write paths relative to OUTPUT, for --data_root")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="shards at a time (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one shard (default %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.timeout <= 0:
        parser.error("--workers and --timeout must be positive")
    names_differ(parser, args.lists)
    return args


# Which video goes where -----------------------------------------------------------------------------------------


def member_name(source: str, root: str) -> str:
    """The path below the root; without spaces, and without dots but in front of the suffix.

    WebDataset takes what follows the first dot for the kind of a file, and DALI takes spaces for the end of a name.
    """
    stem, suffix = os.path.splitext(os.path.relpath(os.path.abspath(source), root))
    folder, slash, last = re.sub(r"\s", "_", stem).rpartition("/")
    return folder + slash + (last.replace(".", "_") or "_") + (suffix or ".mp4")


def padded(size: int) -> int:
    """Bytes of a member with its header."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def bytes_of(source: str) -> int:
    """Size of a video. Raises Unusable."""
    try:
        return status(source)[0]
    except OSError as error:
        raise Unusable(str(error) if isinstance(error, ShardError) else error.strerror or str(error)) from error


def read_plan(output: Path) -> list[Packed]:
    """What earlier runs planned to pack, without what they then could not read."""
    if not (output / PLAN).exists():
        return []
    plan = [Packed(*json.loads(line)) for line in (output / PLAN).read_text().splitlines()]
    there = names_packed(output, plan)
    return [packed for packed in plan if packed.shard not in there or packed.name in there[packed.shard]]


def names_packed(output: Path, plan: list[Packed]) -> dict[str, set[str]]:
    """The members of the shards that are there, by the shards' names."""
    shards = (shard for shard in dict.fromkeys(packed.shard for packed in plan) if (output / shard).exists())
    return {shard: {member.name for member in members_of(str(output / shard))} for shard in shards}


def unique(stem: str, taken: set[str]) -> str:
    """A name that is not taken yet, which it is then."""
    name, times = stem, 0
    while name in taken:
        times += 1
        name = f"{stem}_{times}"
    taken.add(name)
    return name


def extend_plan(
    plan: list[Packed], lists: dict[str, dict[str, str]], sizes: dict[str, int], shard_size: int
) -> list[Packed]:
    """Add the videos that are not in it, list by list, in their order, to new shards.

    Args:
        lists: by path, the label of each source.
        sizes: bytes of the sources that can be read.
    """
    planned, taken = {packed.source for packed in plan}, {key_of(packed.name) for packed in plan}
    root, plan = common_folder([source for sources in lists.values() for source in sources]), list(plan)
    number = {
        shard.rpartition("-")[0]: int(Path(shard).stem.rpartition("-")[2])
        for shard in sorted(packed.shard for packed in plan)
    }  # of the last shard of each list
    for path, sources in lists.items():
        stem, room = Path(path).stem, 0
        for source in (source for source in sources if source in sizes and source not in planned):
            needed = padded(sizes[source]) + padded(len(os.fsencode(sources[source])))
            if needed > room:
                number[stem], room = number.get(stem, -1) + 1, max(shard_size, needed)
            name = member_name(source, root)
            name = unique(key_of(name), taken) + name.removeprefix(key_of(name))
            plan.append(Packed(source, sources[source], f"{stem}-{number[stem]:06d}.tar", name))
            planned.add(source)
            room -= needed
    return plan


# One shard ------------------------------------------------------------------------------------------------------


class Checked:
    """A file that is read from its start to its end, with the checksum of what was read."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sum = file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sum = zlib.crc32(data, self.sum)
        return data


def add(tar: tarfile.TarFile, name: str, size: int, changed: int, file: Any) -> None:
    """Copy a file into a tar file; `changed` is in nanoseconds. Raises OSError if it is shorter than `size`."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, changed // 10**9
    tar.addfile(info, file)


def write_shard(file: Path, members: list[Packed]) -> tuple[dict[str, int], dict[str, str]]:
    """Write a tar file; the checksums of the videos in it, by their names there, and why others are not, by source.

    Raises:
        OSError: one cannot be read to its end.
    """
    sums, failed = dict[str, int](), dict[str, str]()
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT, copybufsize=BUFFER) as tar:
        for packed in members:
            try:
                source, (size, changed) = open_file(packed.source), status(packed.source)
            except OSError as error:
                failed[packed.source] = error.strerror or str(error)
                continue
            with source:
                checked = Checked(source)
                add(tar, packed.name, size, changed, checked)
            sums[packed.name] = checked.sum
            label = os.fsencode(packed.label)
            add(tar, key_of(packed.name) + ".cls", len(label), changed, io.BytesIO(label))
    return sums, failed


def pack(shard: tuple[str, list[Packed]], output: Path, unfinished: Path) -> dict[str, str]:
    """Write a shard and its index, read it again, and give both their places.

    Returns:
        why videos could not be read, by their paths.
    Raises:
        Unusable: none can be, one ends early, or what was written is read as something else.
    """
    name, members = shard
    file = unfinished / name
    try:
        sums, failed = write_shard(file, members)
        if not sums:
            return failed
        write_index(str(file), scan(str(file)))
        for member, expected in sums.items():
            with open_file(f"{file}/{member}") as written:
                checked = Checked(written)
                while checked.read(BUFFER):
                    pass
            if checked.sum != expected:
                raise Unusable(f"{member} is read as other bytes than were written: is the disk sound?")
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from error
    put_in_place(Path(index_path(str(file))), Path(index_path(str(output / name))))
    put_in_place(file, output / name)  # last: a shard that is there has its index
    return failed


# All shards -----------------------------------------------------------------------------------------------------


def make_plan(args: argparse.Namespace, lists: dict[str, dict[str, str]], team: Team) -> dict[str, str]:
    """Write the plan; why videos are not in it, by their paths."""
    output = Path(args.output)
    plan = read_plan(output)
    new = dict.fromkeys(source for sources in lists.values() for source in sources)
    for packed in plan:
        new.pop(packed.source, None)
    sizes, failed = dict[str, int](), dict[str, str]()
    for source, size, reason in in_processes(bytes_of, list(new), args.workers, args.timeout, "sizes", team):
        if reason:
            failed[source] = reason
        else:
            sizes[source] = size
    plan = extend_plan(plan, lists, sizes, args.shard_size)
    write_text(output / PLAN, "".join(json.dumps(packed) + "\n" for packed in plan))
    return failed


def pack_all(args: argparse.Namespace, lists: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """Make the shards that are not there yet. Why videos are in none, by their paths; None but in the first process."""
    output, team, failed = Path(args.output), Team(Path(args.output) / ".team"), dict[str, str]()
    with output_folder(output, {"data_root": args.data_root}, team.rank) as unfinished:
        if team.rank == 0:
            failed = make_plan(args, lists, team)
        team.begin()
        shards: dict[str, list[Packed]] = {}
        for packed in read_plan(output):
            shards.setdefault(packed.shard, []).append(packed)
        todo = [shard for shard in team.share(shards.items()) if not (output / shard[0]).exists()]
        work = partial(pack, output=output, unfinished=unfinished)
        for (_, members), lost, reason in in_processes(work, todo, args.workers, args.timeout, "shards", team):
            failed |= lost or {packed.source: reason for packed in members if reason}
        results = team.gather(failed)
    return {source: reason for result in results for source, reason in result.items()} if results else None


def main(argv: list[str] | None = None) -> None:
    """Pack the videos of the lists; print the totals."""
    args = get_args(argv)
    lists = {path: read_list(path) for path in args.lists}
    sources: dict[str, dict[str, str]] = {path: {} for path in lists}
    for path, lines in lists.items():
        for name, label in lines:
            sources[path].setdefault(os.path.join(args.data_root, name), label)
    failed = pack_all(args, sources)
    if failed is None:
        return
    output = Path(args.output)
    plan = read_plan(output)
    there = names_packed(output, plan)
    base = "" if args.relative else os.path.abspath(output)
    places = {p.source: os.path.join(base, p.shard, p.name) for p in plan if p.name in there.get(p.shard, ())}
    rows = [(source, failed[source]) for labels in sources.values() for source in labels if source in failed]
    write_table(output / "failed.tsv", ("path", "reason"), list(dict.fromkeys(rows)))
    size = sum((output / shard).stat().st_size for shard in there)
    print(f"{len(places)} videos in {len(there)} shards, {size / 1e6:,.1f} MB; {len(failed)} failed")
    if rows:
        print(f"the first: {': '.join(rows[0])} (see {output / 'failed.tsv'})")
    write_lists(output, lists, args.data_root, places)


if __name__ == "__main__":
    run_main(main)
