"""Lists of the videos in tar files in WebDataset's layout: samples of files with one name, ``a/x.mp4``, ``a/x.json``.

The label of a video is the content of its ``.cls``, or a field of its ``.json``. make_lists.py writes the lists.
"""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

from data_tools import Found, Line, fits_a_list
from index_shards import goes_on, key_of, scan, write_index
from tqdm.contrib.concurrent import thread_map

from lists import VIDEO_SUFFIXES
from shards import Member, ShardError, index_path, members_of, read_member
from utils import RunError

NONE = "-1"  # label of a video that has none
SPLITS = {  # by folder
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


def members_on_disk(shard: str) -> list[Member]:
    """Members of a shard by its index, which is written if there is none or the shard has grown. Raises ShardError."""
    if not os.path.exists(index_path(shard)):
        write_index(shard, scan(shard))
    members = members_of(shard)
    if members:
        read_member(shard, max(members, key=lambda member: member.start))
    if goes_on(shard, members) and (found := scan(shard)) != members:
        write_index(shard, found)
        return found
    return members


def label_of(video: str, alone: bool, labels: dict[str, Member], descriptor: int, field: str) -> str:
    """The text of a video's label: its .cls, or this field of its .json; -1 if it has none.

    `labels` are the label files of its sample, by their names without suffix. One belongs to the video of the same name
    or, if it is named like the sample or the video is `alone` in it, to all videos of the sample. Raises ValueError if
    the label is neither a number nor a name.
    """
    member = labels.get(os.path.splitext(video)[0]) or labels.get(key_of(video))
    if member is None and alone:
        member = next(iter(labels.values()), None)
    if member is None:
        return NONE
    data = os.pread(descriptor, member.size, member.start)
    if not field:
        return data.decode().strip()
    value = json.loads(data).get(field, NONE)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{field} is {value!r}")
    return str(value).strip()


def list_shard(shard: str, root: str, field: str) -> Found:
    """List the videos of a shard, whose path is relative to `root`."""
    name = f"{split_of(shard)}.csv"
    lines, problems, samples = list[Line](), list[tuple[str, str, str]](), dict[str, dict[str, Member]]()
    try:
        members = members_on_disk(os.path.join(root, shard))
    except ShardError as error:
        return Found({name: []}, Counter(), [(name, "shards that cannot be read", shard, str(error))])
    counts = Counter(member.name for member in members)
    for member in members:
        samples.setdefault(key_of(member.name), {}).setdefault(member.name, member)
    wanted, suffix = 0, ".json" if field else ".cls"
    with open(os.path.join(root, shard), "rb") as file:
        for key, files in samples.items():
            ends = {member: os.path.splitext(member) for member in files}
            videos = [member for member, (_, end) in ends.items() if end.lower() in VIDEO_SUFFIXES]
            labels = {stem: files[member] for member, (stem, end) in ends.items() if end.lower() == suffix}
            wanted += max(1, len(videos))
            if not videos:
                problems.append(("samples without a video", f"{shard}/{key}", " ".join(files)))
            for video in videos:
                path = f"{shard}/{video}"  # names may begin with a slash
                if counts[video] > 1:
                    problems.append(("several members of one name", path, f"{counts[video]} members"))
                elif not fits_a_list(path):
                    problems.append(("a name that no list can hold", repr(path), ""))
                else:
                    try:
                        lines.append(Line(path, label_of(video, len(videos) == 1, labels, file.fileno(), field)))
                    except (ValueError, AttributeError) as error:
                        problems.append(("labels that cannot be read", path, str(error)))
    return Found({name: lines}, Counter({name: wanted}), [(name, *problem) for problem in problems])


def from_shards(root: str, shards: list[str], label_field: str, workers: int) -> Found:
    """List the videos of shards, whose paths are relative to `root`, showing a progress bar. Raises RunError."""
    result = Found()
    work = partial(list_shard, root=root, field=label_field)
    for found in thread_map(work, shards, max_workers=workers, desc="shards", disable=None):
        for name, lines in found.lines.items():
            result.lines.setdefault(name, []).extend(lines)
        result.wanted.update(found.wanted)
        result.problems += found.problems
    result.classes = number_classes(list(result.lines.values()))
    return result


def number_classes(lines: list[list[Line]]) -> list[str]:
    """Replace labels that are names by their numbers, in place; returns the names, sorted (none if labels are numbers).

    Raises RunError if some labels are numbers, and others names.
    """
    labels = sorted({line.label for part in lines for line in part} - {NONE})
    names = [label for label in labels if not label.lstrip("-").isdigit()]
    several = all(set(name) <= set("0123456789,:.-") for name in names)  # 0,2 or 92:11.90-21.20
    if not names or several:
        return []
    if len(names) < len(labels):
        number = next(label for label in labels if label not in names)
        both = f"names, such as {names[0]!r}, and numbers, such as {number}"
        raise RunError(f"labels are {both}: of two kinds of shards?")
    numbers = {name: str(number) for number, name in enumerate(names)} | {NONE: NONE}
    for part in lines:
        part[:] = [Line(line.name, numbers[line.label]) for line in part]
    return names


def split_of(shard: str) -> str:
    """The split named by a folder or by a part of the shard's name, such as val-000001.tar; else train."""
    words = [*Path(shard).parent.parts, *Path(shard).stem.replace("_", "-").replace(".", "-").split("-")]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "train")
