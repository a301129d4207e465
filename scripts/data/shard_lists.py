"""What tar files in WebDataset's layout hold: samples of files with one name, ``a/x.mp4``, ``a/x.json``, ``a/x.cls``.

The labels of videos are what their ``.cls`` says, or a field of their ``.json``. make_lists.py makes lists of them.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools import Line, RunError, fits_a_list
from index_shards import scan, write_index
from tqdm import tqdm

from lists import VIDEO_SUFFIXES
from shards import Member, ShardError, index_path, key_of, members_of

NONE = "-1"  # label of a video that has none
Problem = tuple[str, str, str]  # kind, name, detail


class Held(NamedTuple):
    """The videos of a shard, and what is wrong; `samples` counts all that should have one."""

    lines: list[Line]
    samples: int
    problems: list[Problem]


def members_on_disk(shard: str) -> list[Member]:
    """The members of a shard by its index, which is written if there is none.

    Raises:
        ShardError: the shard is cut off or no tar file, or the index cannot be written.
    """
    if not os.path.exists(index_path(shard)):
        members = scan(shard)
        write_index(shard, members)
    members = members_of(shard)
    end, size = max((member.start + member.size for member in members), default=0), os.path.getsize(shard)
    if end > size:
        raise ShardError(f"{shard} is cut off: {size} bytes, and its last member ends at {end}")
    return members


def label_of(files: dict[str, Member], descriptor: int, field: str) -> str:
    """The label of a sample, as it is written; -1 if there is none.

    Args:
        files: its members by their suffixes.
        field: of its .json; '' takes its .cls.
    Raises:
        ValueError: the .json is none, or the label no number and no name.
    """
    member = files.get(".json" if field else ".cls")
    if member is None:
        return NONE
    data = os.pread(descriptor, member.size, member.start)
    if not field:
        return data.decode().strip()
    value = json.loads(data).get(field, NONE)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{field} is {value!r}")
    return str(value).strip()


def look(shard: str, root: str, field: str) -> Held:
    """The videos of a shard, by paths relative to `root`."""
    place, lines, problems = os.path.relpath(shard, root), list[Line](), list[Problem]()
    try:
        members = members_on_disk(shard)
    except ShardError as error:
        return Held([], 0, [("shards that cannot be read", place, str(error))])
    counts = Counter(member.name for member in members)
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        files = samples.setdefault(key_of(member.name), {})
        files.setdefault(os.path.splitext(member.name)[1].lower(), member)
    with open(shard, "rb") as file:
        for key, files in samples.items():
            video = next((files[suffix] for suffix in files if suffix in VIDEO_SUFFIXES), None)
            name = os.path.join(place, video.name if video else key)
            if not video:
                problems.append(("samples without a video", name, " ".join(files)))
            elif counts[video.name] > 1:
                problems.append(("several members of one name", name, f"{counts[video.name]} members"))
            elif not fits_a_list(name):
                problems.append(("a name that no list can hold", repr(name), ""))
            else:
                try:
                    lines.append(Line(name, label_of(files, file.fileno(), field)))
                except (ValueError, AttributeError) as error:
                    problems.append(("labels that cannot be read", name, str(error)))
    return Held(lines, len(samples), problems)


def look_at_all(root: str, shards: list[str], field: str, workers: int) -> Iterator[tuple[str, Held]]:
    """Print a progress bar; give each shard and what it holds. `shards` are relative to `root`."""
    with ThreadPoolExecutor(workers) as pool:
        paths = [os.path.join(root, shard) for shard in shards]
        held = pool.map(partial(look, root=root, field=field), paths)
        yield from zip(shards, tqdm(held, total=len(shards), desc="shards", disable=None))


def number_classes(lines: list[list[Line]]) -> list[str]:
    """Replace labels that are names by their numbers, in place; the names, sorted, or nothing where labels are numbers.

    Raises:
        RunError: some are numbers, and others names.
    """
    labels = sorted({line.label for part in lines for line in part} - {NONE})
    names = [label for label in labels if not label.lstrip("-").isdigit()]
    several = all(set(name) <= set("0123456789,:.-") for name in names)  # 0,2 or 92:11.90-21.20
    if not names or several:
        return []
    if len(names) < len(labels):
        number = next(label for label in labels if label not in names)
        raise RunError(
            f"labels are names, such as {names[0]!r}, and numbers, such as {number}: of two kinds of shards?"
        )
    numbers = {name: str(number) for number, name in enumerate(names)} | {NONE: NONE}
    for part in lines:
        part[:] = [Line(line.name, numbers[line.label]) for line in part]
    return names


def split_of(shard: str, splits: dict[str, str]) -> str:
    """The split that a folder or the beginning of a shard's name tells, such as val-000001.tar; else train."""
    words = [*Path(shard).parent.parts, *Path(shard).stem.replace("_", "-").replace(".", "-").split("-")]
    return next((splits[word.lower()] for word in words if word.lower() in splits), "train")
