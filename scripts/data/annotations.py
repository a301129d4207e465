"""Readers of the annotation files of each data set: which videos are in which list, with which label.

Each reader takes the folder of a data set's own files under their own names. Labels are text, counted from 0; those of
Charades are ``class:start-end`` in seconds. make_lists.py finds the videos and writes the lists.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import Problem, read_lines, read_text

from lists import VIDEO_SUFFIXES
from utils import RunError

# Parts of Gym-99 that the SEVERE benchmark uses: leaps and jumps on the floor, circles on the uneven bars.
GYM_PARTS = {"fx-s1": range(6, 17), "ub-s1": range(74, 89)}


class Entry(NamedTuple):
    """A video of an annotation file."""

    names: tuple[str, ...]  # possible names of its file, with or without folder and suffix; the first one found counts
    label: str
    folder: str = ""  # the folder it should be in, if the data set has one for each class


@dataclass
class Annotations:
    """Entries by list file, and names of the classes; without ``test.csv`` the val list is the test list."""

    lists: dict[str, list[Entry]]
    classes: list[str]  # empty: unknown
    fold_case: bool = False  # file names may differ in case from those in the annotations
    problems: list[Problem] = field(default_factory=list)


# Files ----------------------------------------------------------------------------------------------------------


def find_file(folder: str, *patterns: str) -> Path:
    """Find the file that matches the first pattern that any file matches. Raises RunError if several do, or none."""
    for pattern in patterns:
        found = sorted(Path(folder).glob(pattern))
        if len(found) > 1:
            raise RunError(f"{folder}: {found[0].name} or {found[1].name}? Leave one {pattern} there")
        if found:
            return found[0]
    raise RunError(f"--annotations {folder}: no {' or '.join(patterns)} there")


def whole_number(text: str, where: str) -> int:
    """Parse a number of an annotation file; `where` names its place in the error."""
    if not re.fullmatch(r"\d+", text):
        raise RunError(f"{where}: {text[:80]!r} is not a whole number")
    return int(text)


def class_label(number: int, classes: Sequence[str], where: str) -> str:
    """A class number as a label, checked."""
    if classes and not 0 <= number < len(classes):
        raise RunError(f"{where}: class {number} is not in [0, {len(classes)})")
    return str(number)


def numbered_names(path: Path) -> tuple[list[str], int]:
    """Read lines ``1 name`` or ``name 1``: the names in the order of their numbers, and the first number, 0 or 1."""
    names = {}
    for where, line in read_lines(path):
        before, after = re.fullmatch(r"(\d+)\s+(.+)", line), re.fullmatch(r"(.+?)\s+(\d+)", line)
        if not before and not after:
            raise RunError(f"{where}: {line[:80]!r} is not a number and a name")
        index, name = before.groups() if before else after.groups()[::-1]
        names[int(index)] = name.strip('"')
    first = min(names, default=2)
    if first > 1 or max(names) >= first + len(names):
        raise RunError(f"{path}: the numbers of the classes are not consecutive from 0 or 1")
    return [names[index] for index in sorted(names)], first


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError if it is none."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: no JSON file ({error})") from error


def read_csv(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Read a CSV file with a header row: place (for errors) and values of each row, without surrounding spaces."""
    rows = csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True)
    header, found = rows.fieldnames or (), []
    if missing := [name for name in columns if name not in header]:
        raise RunError(f"{path}: no column {missing[0]!r} in its header ({','.join(header)[:80]})")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if short := [name for name in columns if row[name] is None]:
            raise RunError(f"{where}: ends before the column {short[0]!r}")
        found.append((where, {name: row[name].strip() for name in columns}))
    return found


def stem_of(name: str) -> str:
    """A file name without its folder and without the suffix of a video."""
    name = name.replace("\\", "/").rpartition("/")[2]
    base, dot, suffix = name.rpartition(".")
    return base if dot and dot + suffix.lower() in VIDEO_SUFFIXES else name


def listed_entries(path: Path) -> list[tuple[str, Entry, int]]:
    """Read lines ``name number``, or ``name frames number``: place, entry and number of each."""
    lines = list(read_lines(path))
    with_frames = all(re.fullmatch(r"\S+ \d+ \d+", line) for _, line in lines)
    entries = []
    for where, line in lines:
        name, _, label = line.rpartition(" ")
        if not name.strip():
            raise RunError(f"{where}: {line[:80]!r} is not a name and a number")
        name = (name.rpartition(" ")[0] if with_frames else name).strip()
        folder = name.rpartition("/")[0].rpartition("/")[2]
        entries.append((where, Entry((name,), label, folder), whole_number(label, where)))
    return entries


# Data sets ------------------------------------------------------------------------------------------------------


def kinetics(folder: str) -> Annotations:
    """Kinetics' own train and val files: ``label,youtube_id,time_start,time_end,split``; classes by name."""

    def read(*names: str) -> list[tuple[str, dict[str, str]]]:
        patterns = [pattern.format(name) for pattern in ("{}.csv", "*_{}.csv", "*-{}.csv") for name in names]
        return read_csv(find_file(folder, *patterns), ("label", "youtube_id", "time_start", "time_end"))

    def entry(where: str, row: dict[str, str]) -> Entry:
        label, video = row["label"].strip('"'), row["youtube_id"]
        if label not in numbers:
            raise RunError(f"{where}: the class {label!r} is not in the train file")
        start, end = (whole_number(row[key].removesuffix(".0"), where) for key in ("time_start", "time_end"))
        endings = (f"_{start:06d}_{end:06d}", f"_{start}_{end}", "", "_time_trimmed", "_trimmed")
        return Entry(tuple(video + ending for ending in endings), numbers[label], label)

    tables = {"train.csv": read("train"), "val.csv": read("val", "validate", "validation")}
    classes = sorted({row["label"].strip('"') for _, row in tables["train.csv"]})
    numbers = {name: str(number) for number, name in enumerate(classes)}
    return Annotations({name: [entry(*row) for row in table] for name, table in tables.items()}, classes)


def given_lists(train: str, val: str, class_names: str) -> Annotations:
    """Lists ``name label`` that somebody made (Mini-Kinetics), with the names and numbers of the classes.

    Labels count from 1 if the numbers of `class_names` do; without `class_names` they must count from 0.
    """
    classes, first = numbered_names(Path(class_names)) if class_names else ([], 0)

    def entries(path: str) -> list[Entry]:
        listed = listed_entries(Path(path))
        return [entry._replace(label=class_label(n - first, classes, where)) for where, entry, n in listed]

    return Annotations({"train.csv": entries(train), "val.csv": entries(val)}, classes)


def ssv2(folder: str, mini: str = "") -> Annotations:
    """Something-Something V2: the class is the template without its brackets. The test set has no labels.

    `mini` lists the videos of a smaller train set, by id or path, with or without label, for ``train_mini.csv``.
    """
    find = lambda part: find_file(folder, f"something-something-v2-{part}.json", f"{part}.json")
    labels = find("labels")
    numbers = {name: int(number) for name, number in read_json(labels).items()}
    classes = sorted(numbers, key=numbers.__getitem__)
    if [numbers[name] for name in classes] != list(range(len(classes))):
        raise RunError(f"{labels}: the numbers of the classes are not consecutive from 0")

    def entries(path: Path) -> list[Entry]:
        found = []
        for record in read_json(path):
            template = re.sub(r"[\[\]]", "", record["template"]).strip()
            if template not in numbers:
                raise RunError(f"{path}, id {record['id']}: no class {template!r} in {labels.name}")
            found.append(Entry((str(record["id"]),), str(numbers[template])))
        return found

    lists = {"train.csv": entries(find("train")), "val.csv": entries(find("validation"))}
    if mini:
        whole = {entry.names[0]: entry for entry in lists["train.csv"]}
        lists["train_mini.csv"] = []
        for where, line in read_lines(mini):
            name, _, label = line.rpartition(" ")
            entry = whole.get(stem_of(name or label))
            if entry is None or (name and label != entry.label):
                raise RunError(f"{where}: {line[:80]!r} is not in the train set, or with another label")
            lists["train_mini.csv"].append(entry)
    return Annotations(lists, classes)


def class_folders(folder: str, fold: int) -> Annotations:
    """UCF101, and NTU60 as distributed by SEVERE: ``classInd.txt``, ``trainlist01.txt``, ``testlist01.txt``.

    The label is the number of the folder's class; if a line has a number itself, it must be the same. Class, folder and
    file name may differ in case (HandstandPushups, v_HandStandPushups_g01_c01.avi).
    """
    classes, first = numbered_names(find_file(folder, "classInd.txt"))
    numbers = {name.casefold(): number for number, name in enumerate(classes)}

    def entries(part: str) -> list[Entry]:
        found = []
        for where, line in read_lines(find_file(folder, f"{part}list{fold:02d}.txt")):
            video, _, label = line.rpartition(" ") if re.search(r" \d+$", line) else (line, "", "")
            of_class = video.rpartition("/")[0]
            index = numbers.get(of_class.casefold())
            if index is None:
                raise RunError(f"{where}: no class {of_class!r} in classInd.txt")
            if label and int(label) - first != index:
                raise RunError(f"{where}: the number {label} is not that of the class {of_class}")
            found.append(Entry((video.strip(),), str(index), of_class))
        return found

    return Annotations({"train.csv": entries("train"), "val.csv": entries("test")}, classes, fold_case=True)


def hmdb51(folder: str, fold: int) -> Annotations:
    """HMDB51: ``<class>_test_split1.txt`` with ``name 1`` (train), 2 (test) or 0 (unused); classes by name."""
    paths = sorted(Path(folder).glob(f"*_test_split{fold}.txt"))
    if not paths:
        raise RunError(f"--annotations {folder}: no <class>_test_split{fold}.txt there")
    classes = [path.name.removesuffix(f"_test_split{fold}.txt") for path in paths]
    lists: dict[str, list[Entry]] = {"train.csv": [], "val.csv": []}
    for label, path in enumerate(paths):
        for where, entry, use in listed_entries(path):
            if use > 2:
                raise RunError(f"{where}: {use} is not 0 (unused), 1 (train) or 2 (test)")
            if use:
                lists["train.csv" if use == 1 else "val.csv"].append(Entry(entry.names, str(label), classes[label]))
    return Annotations(lists, classes)


def finegym(folder: str, part: str) -> Annotations:
    """FineGym: ``<clip> <label>`` in the files of the authors or of those that cut the clips; labels count from 0.

    `part` is ``gym99``, ``gym288``, or one of GYM_PARTS, whose labels are moved to start at 0.
    """
    base = "gym288" if part == "gym288" else "gym99"
    total = int(base.removeprefix("gym"))
    names = list(Path(folder).glob(f"{base}_categories.txt"))
    # A line is `Clabel: 0; set: 1; Glabel: 1; (VT) round-off, ...`: the name is what follows the last field.
    classes = [re.sub(r"^(\w+:\s*\d+;\s*)+", "", line) for path in names for _, line in read_lines(path)]
    if classes and len(classes) != total:
        raise RunError(f"{names[0]}: {len(classes)} classes, not {total}")
    kept = GYM_PARTS.get(part, range(total))

    def entries(split: str) -> list[Entry]:
        endings = ("_element_v1.1.txt", "_element*.txt", ".txt", "_org.txt", "_v*.txt")
        listed = listed_entries(find_file(folder, *(f"{base}_{split}{ending}" for ending in endings)))
        if wrong := next(((where, number) for where, _, number in listed if number >= total), None):
            raise RunError(f"{wrong[0]}: label {wrong[1]} is not in [0, {total})")
        return [entry._replace(label=str(n - kept.start)) for _, entry, n in listed if n in kept]

    lists = {"train.csv": entries("train"), "val.csv": entries("val")}
    return Annotations(lists, [classes[number] for number in kept] if classes else [])


def diving48(folder: str) -> Annotations:
    """Diving48 V2: ``Diving48_V2_train.json``, ``_test.json``, ``Diving48_vocab.json``; labels count from 0."""
    classes = [" ".join(parts) for parts in read_json(find_file(folder, "Diving48_vocab.json", "*vocab.json"))]

    def entries(part: str) -> list[Entry]:
        path = find_file(folder, f"Diving48_V2_{part}.json", f"*{part}.json")
        records = [(record["vid_name"], int(record["label"])) for record in read_json(path)]
        return [Entry((name,), class_label(label, classes, f"{path}, {name}")) for name, label in records]

    return Annotations({"train.csv": entries("train"), "val.csv": entries("test")}, classes)


def charades(folder: str) -> Annotations:
    """Charades: ``Charades_v1_train.csv``, ``_test.csv``; the column actions is ``c092 11.90 21.20;c147 0.00 12.60``.

    A label is ``92:11.90-21.20,147:0.00-12.60``, and ``-`` where nothing is done.
    """
    lines = [line.partition(" ") for _, line in read_lines(find_file(folder, "Charades_v1_classes.txt"))]
    annotations = Annotations({}, [name.strip() for _, _, name in lines])
    if any(number != f"c{place:03d}" for place, (number, _, _) in enumerate(lines)):
        raise RunError(f"{folder}: the classes of Charades_v1_classes.txt are not c000, c001, ...")
    for name, part in {"train.csv": "train", "val.csv": "test"}.items():
        annotations.lists[name] = []
        for where, row in read_csv(find_file(folder, f"Charades_v1_{part}.csv"), ("id", "actions")):
            intervals = []
            for action in filter(None, (text.strip() for text in row["actions"].split(";"))):
                parsed = re.fullmatch(r"c(\d+) +(\d+(?:\.\d+)?) +(\d+(?:\.\d+)?)", action)
                if not parsed:
                    raise RunError(f"{where}: {action[:80]!r} is not `c092 11.90 21.20`")
                number, start, end = parsed.groups()
                if float(end) < float(start):
                    annotations.problems.append((name, "ends before it starts", row["id"], action))
                else:
                    intervals.append(f"{class_label(int(number), annotations.classes, where)}:{start}-{end}")
            annotations.lists[name].append(Entry((row["id"],), ",".join(intervals) or "-"))
    return annotations
