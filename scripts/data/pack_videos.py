"""Pack the videos of lists into a few large tar files, and write lists of them there.

    python scripts/data/pack_videos.py lists/train.csv lists/val.csv --output /data/k400 --shard_size 1GB

Written below --output:
    train-000000.tar, .idx    shards in the layout of WebDataset: NAME.mp4 (as it is), NAME.cls (the label's text)
    *.csv                     the lists, with paths that run through the shards; every program takes them as it is
    members.jsonl             source, label, shard and name of each video, a JSON list per line
    failed.tsv                the videos that could not be read, and why
--workers processes write a shard each, compare it with its sources byte by byte, and then give it its name. The same
command, started again, writes what is missing; videos that are new in the lists or failed before go into new shards.
Videos that changed after they were packed are not packed again: use another --output.
"""

import argparse
import io
import json
import os
import re
import tarfile
import zlib
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, NamedTuple

from data_tools import (
    Unusable,
    common_folder,
    list_parser,
    put_in_place,
    read_lists,
    status,
    write_lists,
    write_table,
    write_text,
)
from index_shards import key_of, scan, write_index
from processes import in_processes, make_all

from shards import index_path, members_of, open_file
from utils import rank, run_main

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
PLAN = "members.jsonl"
BUFFER = 1 << 18  # bytes copied at a time


class Packed(NamedTuple):
    """A video and its place: the name of the shard, and its own in the shard."""

    source: str
    label: str
    shard: str
    name: str


def size_of(text: str) -> int:
    """Parse a size such as 1GB into bytes."""
    match = re.fullmatch(r"([\d.]+) ?([KMG]B|)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = list_parser(__doc__, "shard", 3600)
    parser.add_argument("--shard_size", type=size_of, default="1GB", help="of a tar file (default %(default)s)")
    return parser.parse_args(argv)


# The plan: which video goes where -------------------------------------------------------------------------------


def member_name(source: str, root: str) -> str:
    """Path of a member below `root`, with no space (DALI's names end there) and one dot (WebDataset's suffix)."""
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
        raise Unusable(error.strerror or str(error)) from error


def read_plan(output: Path) -> tuple[list[Packed], dict[str, set[str]]]:
    """Read the plan of earlier runs, without the videos that they failed to read.

    Returns:
        the plan, and the names of the members of each shard that is written, by the shard's name.
    """
    if not (output / PLAN).exists():
        return [], {}
    plan = [Packed(*json.loads(line)) for line in (output / PLAN).read_text().splitlines()]
    shards = [shard for shard in dict.fromkeys(packed.shard for packed in plan) if (output / shard).exists()]
    there = {shard: {member.name for member in members_of(str(output / shard))} for shard in shards}
    return [packed for packed in plan if packed.shard not in there or packed.name in there[packed.shard]], there


def extend_plan(plan: list[Packed], lists: dict[str, dict[str, str]], sizes: dict[str, int], shard_size: int) -> None:
    """Plan new shards for the videos that are not in the plan, in the order of the lists, and append them to it.

    Args:
        lists: by path, the label of each source.
        sizes: bytes of the sources that can be read.
    """
    planned, taken = {packed.source for packed in plan}, {key_of(packed.name) for packed in plan}
    root = common_folder([source for sources in lists.values() for source in sources])
    last = dict[str, int]()  # number of the last shard of each list
    for shard in sorted(packed.shard for packed in plan):
        stem, _, number = Path(shard).stem.rpartition("-")
        last[stem] = int(number)
    for path, sources in lists.items():
        stem, room = Path(path).stem, 0
        for source in [source for source in sources if source in sizes and source not in planned]:
            needed = padded(sizes[source]) + padded(len(os.fsencode(sources[source])))
            if needed > room:
                last[stem], room = last.get(stem, -1) + 1, max(shard_size, needed)
            name = member_name(source, root)
            key = key_of(name)
            free = next(k for k in chain([key], (f"{key}_{n}" for n in count(1))) if k not in taken)
            plan.append(Packed(source, sources[source], f"{stem}-{last[stem]:06d}.tar", free + name.removeprefix(key)))
            taken.add(free)
            planned.add(source)
            room -= needed


def make_plan(
    args: argparse.Namespace, lists: dict[str, dict[str, str]], failed: dict[str, str]
) -> list[tuple[str, list[Packed]]]:
    """Write the plan; returns the members of each shard that is missing, and adds reasons by source to `failed`."""
    plan, _ = read_plan(args.output)
    planned = {packed.source for packed in plan}
    listed = dict.fromkeys(source for sources in lists.values() for source in sources)
    new, sizes = [source for source in listed if source not in planned], dict[str, int]()
    for source, size, reason in in_processes(bytes_of, new, args.workers, args.timeout, "sizes"):
        if reason:
            failed[source] = reason
        else:
            sizes[source] = size
    shards: dict[str, list[Packed]] = {}
    extend_plan(plan, lists, sizes, args.shard_size)
    for packed in plan:
        shards.setdefault(packed.shard, []).append(packed)
    write_text(args.output / PLAN, "".join(json.dumps(packed) + "\n" for packed in plan))
    return [(name, members) for name, members in shards.items() if not (args.output / name).exists()]


class Checked:
    """Reads a file sequentially, keeping the checksum of what was read."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sum = file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sum = zlib.crc32(data, self.sum)
        return data


def write_shard(file: Path, members: list[Packed]) -> tuple[dict[str, int], dict[str, str]]:
    """Write a tar file; raises OSError if a video is shorter than its size.

    Returns:
        checksums of the videos by name, and reasons of those that could not be read, by source.
    """
    sums, failed = dict[str, int](), dict[str, str]()
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT, copybufsize=BUFFER) as tar:
        for packed in members:
            try:
                source, (size, changed) = open_file(packed.source), status(packed.source)
            except OSError as error:
                failed[packed.source] = error.strerror or str(error)
                continue
            info, label = tarfile.TarInfo(packed.name), os.fsencode(packed.label)
            info.size, info.mtime = size, changed // 10**9
            with source:
                checked = Checked(source)
                tar.addfile(info, checked)
            sums[packed.name] = checked.sum
            info.name, info.size = key_of(packed.name) + ".cls", len(label)
            tar.addfile(info, io.BytesIO(label))
    return sums, failed


def pack(shard: tuple[str, list[Packed]], output: Path, unfinished: Path) -> dict[str, str]:
    """Write a shard and its index, compare it with its sources, and rename both.

    Returns the reasons of the videos that could not be read, by source. Raises Unusable if a video ends early, or the
    shard is read as other bytes.
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
    put_in_place(file, output / name)  # last, so that every shard has its index
    return failed


def main(argv: list[str] | None = None) -> None:
    """Pack the videos of the lists; print the totals."""
    args = get_args(argv)
    lists, sources = read_lists(args.lists), dict[str, dict[str, str]]()
    for path, lines in lists.items():
        labels = sources[path] = dict[str, str]()
        for name, label in lines:
            labels.setdefault(os.path.join(args.data_root, name), label)
    reasons = dict[str, str]()
    jobs = lambda: make_plan(args, sources, reasons)
    outcomes = make_all(args, {"data_root": args.data_root}, jobs, partial(pack, output=args.output), "shards")
    if rank() > 0:
        return
    for (_, members), lost, reason in outcomes:
        reasons |= lost or {packed.source: reason for packed in members if reason}
    plan, there = read_plan(args.output)
    base = "" if args.relative else os.path.abspath(args.output)
    places = {p.source: os.path.join(base, p.shard, p.name) for p in plan if p.name in there.get(p.shard, ())}
    listed = dict.fromkeys(source for labels in sources.values() for source in labels)
    failed = [(source, reasons[source]) for source in listed if source in reasons]
    write_table(args.output / "failed.tsv", ("path", "reason"), failed)
    size = sum((args.output / shard).stat().st_size for shard in there)
    print(f"{len(places)} videos in {len(there)} shards, {size / 1e6:,.1f} MB; {len(failed)} failed")
    if failed:
        print(f"the first: {': '.join(failed[0])} (see {args.output / 'failed.tsv'})")
    write_lists(args, lists, places)


if __name__ == "__main__":
    run_main(main)
