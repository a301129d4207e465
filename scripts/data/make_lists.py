"""Make lists for training and testing from a data set's own annotation files and the videos on your disk.

    python scripts/data/make_lists.py kinetics --videos k400 --annotations k400/annotations --output lists

Written to --output: train.csv, val.csv and test.csv with a line ``path label`` for each video, classes.txt with the
name of class 0 on the first line and so on, and problems.tsv with what is missing, listed twice or contradictory.
Videos are found by their names anywhere below --videos, with any suffix; ``shards`` finds those in tar files, and
writes the index of each that has none. DATASET.md has the command for each data set and what it needs.
"""

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import annotations as formats
import numpy as np
from annotations import Annotations, stem_of
from data_tools import Found, Line, Problem, fits_a_list, new_parser, positive, write_list, write_table, write_text
from shard_lists import SPLITS, from_shards
from tqdm import tqdm

from lists import VIDEO_SUFFIXES, frames_in
from utils import RunError, run_main

LISTS = ("train.csv", "train_mini.csv", "val.csv", "test.csv")
TAR = (".tar",)
SHOWN = 5  # problems of a kind that are named on the console
READERS: dict[str, Callable[[argparse.Namespace], Annotations]] = {
    "kinetics": lambda args: (
        formats.given_lists(*args.lists, args.class_names) if args.lists else formats.kinetics(args.annotations)
    ),
    "ssv2": lambda args: formats.ssv2(args.annotations, args.mini),
    "ucf101": lambda args: formats.class_folders(args.annotations, args.fold),
    "hmdb51": lambda args: formats.hmdb51(args.annotations, args.fold),
    "finegym": lambda args: formats.finegym(args.annotations, args.part),
    "diving48": lambda args: formats.diving48(args.annotations),
    "ntu60": lambda args: formats.class_folders(args.annotations, 1),
    "charades": lambda args: formats.charades(args.annotations),
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="data_set", required=True, metavar="DATA_SET")

    def new(name: str, text: str) -> Callable[..., Any]:
        add = commands.add_parser(name, help=text, description=text).add_argument
        kind, own = "tar files" if name == "shards" else "videos", "folder with the data set's own annotation files"
        add("--videos", required=True, help=f"folder with the {kind}, in any sub-folders")
        if name in READERS:
            add("--annotations", required=name != "kinetics", default="", help=own)
        add("--output", required=True, type=Path, help="folder to write the lists to")
        add("--relative", action="store_true", help="paths relative to --videos, for use with --data_root")
        add("--workers", type=positive, default=8, help="folders read at the same time (default 8)")
        return add

    add = new("kinetics", "Kinetics-400, -600, -700; Mini-Kinetics from given lists")
    add("--lists", nargs=2, default=None, metavar=("TRAIN", "VAL"), help="instead: lists `name label`")
    add("--class_names", default="", help="with --lists: file with lines `name number`")
    add = new("ssv2", "Something-Something V2")
    add("--mini", default="", help="list of the train videos of SSv2-mini: writes train_mini.csv too")
    for name in ("ucf101", "hmdb51"):
        new(name, f"{name.upper()}, one of the three folds")("--fold", type=int, choices=(1, 2, 3), default=1)
    add = new("finegym", "Gym-99, Gym-288, and the parts FX-S1 and UB-S1 of Gym-99")
    add("--part", choices=("gym99", "gym288", *formats.GYM_PARTS), default="gym99")
    new("diving48", "Diving48 V2")
    new("ntu60", "NTU RGB+D 60, cross-subject, as SEVERE distributes it")
    new("charades", "Charades, several labels with their seconds")
    add = new("folder", "videos of your own: <class>/<video> or {train,val,test}/<class>/<video>")
    add("--unlabelled", action="store_true", help="no classes: one train.csv with label -1")
    add("--val_fraction", type=float, default=0.1, help="of each class, if there is no val folder")
    add("--seed", type=int, default=0, help="of the draw of the val videos")
    add = new("shards", "tar files in WebDataset's layout, such as video2dataset's")
    add("--label_field", default="", help="of .json, a number or a class (default: .cls, else -1)")

    args = parser.parse_args(argv)
    if args.data_set == "kinetics" and bool(args.annotations) == bool(args.lists):
        parser.error("kinetics: give either --annotations or --lists")
    if args.data_set == "folder" and not 0 <= args.val_fraction < 1:
        parser.error("--val_fraction must lie in [0, 1)")
    if getattr(args, "annotations", "") and Path(args.annotations).resolve() == args.output.resolve():
        parser.error("--output is the folder of the annotations, whose files would be overwritten")
    return args


# Videos on the disk ---------------------------------------------------------------------------------------------


def scan(folder: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Paths of the sub-folders of a folder, and of its files with these suffixes."""
    with os.scandir(folder) as entries:
        folders, files = [], []
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(suffixes) and not entry.name.startswith("."):
                files.append(entry.path)
    return folders, files


def find_videos(root: str, workers: int, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> list[str]:
    """Find all videos (or other files) below `root`, showing a progress bar; paths relative to it, sorted.

    Folders are read by threads, which mostly wait on a network file system. Raises RunError if nothing is found.
    """
    if not os.path.isdir(root):
        raise RunError(f"--videos {root}: no such folder")
    ahead, seen, found = [root], set[str](), list[str]()
    with ThreadPoolExecutor(workers) as pool, tqdm(desc="folders", unit="", disable=None) as bar:
        while ahead:
            ahead = [folder for folder in ahead if os.path.realpath(folder) not in seen]
            seen.update(os.path.realpath(folder) for folder in ahead)  # links may lead back
            read, ahead = pool.map(partial(scan, suffixes=suffixes), ahead), []
            for folders, videos in read:
                found += videos
                ahead += folders
                bar.update()
    if not found:
        what = "tar files" if suffixes == TAR else "videos"
        why = frames_in(root) or f"no {what} below it ({' '.join(suffixes)})"
        raise RunError(f"--videos {root}: {why}")
    return sorted(os.path.relpath(path, root) for path in found)


def plain(name: str) -> str:
    """A class or folder name for comparison: Kinetics' folders have spaces or underscores, and any case."""
    return name.casefold().replace(" ", "_")


def match(wanted: Annotations, videos: list[str]) -> Found:
    """Find the video of each entry. Entries without one, or listed before, are left out and become problems.

    Names that differ from a video's in case alone belong to another video (as YouTube's ids do), unless
    `wanted.fold_case`. Of several videos the one in the entry's folder and with the entry's suffix is taken.
    """
    key_of = str.casefold if wanted.fold_case else str
    by_stem: dict[str, list[str]] = defaultdict(list)
    for video in videos:
        by_stem[key_of(stem_of(video))].append(video)
    result = Found(classes=wanted.classes, problems=list(wanted.problems))
    for name, entries in wanted.lists.items():
        labels: dict[str, str] = {}  # by path, or by name where there is no path
        lines = result.lines[name] = []
        result.wanted[name] = len(entries)
        for entry in entries:
            file = next((file for file in entry.names if key_of(stem_of(file)) in by_stem), entry.names[0])
            paths = by_stem.get(key_of(stem_of(file)), [])
            in_folder = [p for p in paths if entry.folder and plain(Path(p).parent.name) == plain(entry.folder)]
            suffix = Path(file).suffix
            paths = sorted(in_folder or paths, key=lambda path, suffix=suffix: (Path(path).suffix != suffix, path))
            key = paths[0] if paths else entry.names[0]
            if key in labels:
                same = labels[key] == entry.label
                detail = f"label {entry.label}" + ("" if same else f"; the label {labels[key]} before it counts")
                result.problems.append((name, "twice" if same else "two labels", entry.names[0], detail))
                continue
            labels[key] = entry.label
            if not paths:
                result.problems.append((name, "missing", entry.names[0], f"label {entry.label}"))
            elif not fits_a_list(paths[0]):
                result.problems.append((name, "a name that no list can hold", repr(paths[0]), ""))
            else:
                lines.append(Line(paths[0], entry.label))
            if len(paths) > 1:
                result.problems.append((name, "several files", entry.names[0], f"{paths[0]} taken, not {paths[1:]}"))
    return result


def draw_val(
    videos: list[str], class_of: Callable[[str], str], val_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Draw some of the videos of each class for val, at least one where there are two; returns the others and those."""
    rng, classes = np.random.default_rng(seed), defaultdict(list)
    for video in videos:
        classes[class_of(video)].append(video)
    train, val = [], []
    for _, of_class in sorted(classes.items()):
        count = max(round(val_fraction * len(of_class)), 1) if val_fraction else 0
        count = min(count, len(of_class) - 1)  # one is left to train on
        drawn = set(rng.permutation(len(of_class))[:count].tolist())
        train += [video for number, video in enumerate(of_class) if number not in drawn]
        val += [video for number, video in enumerate(of_class) if number in drawn]
    return train, val


def from_folder(videos: list[str], unlabelled: bool, val_fraction: float, seed: int) -> Found:
    """Lists of a folder of one's own videos: split folders if there are any, else val is drawn. Raises RunError."""
    held = [video for video in videos if fits_a_list(video)]
    problems = [("", "a name that no list can hold", repr(video), "") for video in videos if not fits_a_list(video)]
    if unlabelled:
        lines = {"train.csv": [Line(video, "-1") for video in held]}
        return Found(lines, Counter({"train.csv": len(videos)}), problems)
    first = lambda video: Path(video).parts[0].lower()
    has_splits = any(first(video) in SPLITS for video in held)
    for video in held:
        if has_splits and first(video) not in SPLITS:
            raise RunError(f"{video} is in none of {'/, '.join(SPLITS)}/, but other videos are")
        if len(Path(video).parts) < 2 + has_splits:
            raise RunError(f"{video} is in no class folder; for videos without classes add --unlabelled")
    class_of = lambda video: Path(video).parts[has_splits]
    classes = sorted(set(map(class_of, held)))
    if len(classes) == 1:
        raise RunError(f"all videos are in one class folder, {classes[0]}/; without classes add --unlabelled")
    numbers = {name: str(number) for number, name in enumerate(classes)}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for video in held:
        splits[SPLITS[first(video)] if has_splits else "train"].append(video)
    rule = ""
    if not splits["val"]:
        splits["train"], splits["val"] = draw_val(splits["train"], class_of, val_fraction, seed)
        rule = ", which takes two of a class and --val_fraction above 0"
    validated = set(map(class_of, splits["val"]))
    missing = [name for name in classes if name not in validated]
    problems += [("val.csv", f"classes without a video in it{rule}", name, "") for name in missing]
    lines = {f"{split}.csv": [Line(v, numbers[class_of(v)]) for v in part] for split, part in splits.items() if part}
    return Found(lines, Counter({name: len(part) for name, part in lines.items()}), problems, classes)


# Output ---------------------------------------------------------------------------------------------------------


def shared_videos(lines: dict[str, list[Line]]) -> list[Problem]:
    """Problems of videos that are in the train list and in the val or test list."""
    trained = {line.name for line in lines.get("train.csv", [])}
    tested = [(name, *line) for name in ("val.csv", "test.csv") for line in lines.get(name, [])]
    return [(name, "in train.csv too", path, f"label {label}") for name, path, label in tested if path in trained]


def write(found: Found, output: Path, prefix: str) -> None:
    """Write lists, with `prefix` before every path, classes and problems, and print a summary. Raises RunError."""
    problems = found.problems + shared_videos(found.lines)
    if not any(found.lines.values()):
        kind, name = problems[0][1:3]
        raise RunError(f"not one video that could be listed was found below --videos; the first: {name}: {kind}")
    if "test.csv" not in found.lines and "val.csv" in found.lines:
        found.lines["test.csv"], found.wanted["test.csv"] = found.lines["val.csv"], found.wanted["val.csv"]
    written: list[str] = []
    for name in LISTS:
        if lines := found.lines.get(name):
            write_list(output / name, [Line(os.path.join(prefix, path), label) for path, label in lines])
            written.append(f"{name}: {len(lines)} of {found.wanted[name]} videos")
            continue
        (output / name).unlink(missing_ok=True)  # of an earlier run
        if name in found.lines:
            print(f"{name}: not written, none of its {found.wanted[name]} videos is there")
    if found.classes:
        write_text(output / "classes.txt", "".join(f"{name}\n" for name in found.classes))
        written.append(f"classes.txt: {len(found.classes)} classes")
    else:
        (output / "classes.txt").unlink(missing_ok=True)
    write_table(output / "problems.tsv", ("list", "problem", "name", "detail"), problems)
    for (name, kind), count in sorted(Counter(problem[:2] for problem in problems).items()):
        first = [problem[2] for problem in problems if problem[:2] == (name, kind)][:SHOWN]
        print(f"{name}: {count} {kind}: {', '.join(first)}{', ...' * (count > SHOWN)} (see {output / 'problems.tsv'})")
    print(f"{output}: {', '.join(written)}")


def main(argv: list[str] | None = None) -> None:
    """Make the lists of a data set."""
    args = get_args(argv)
    if args.data_set == "shards":
        found = from_shards(args.videos, find_videos(args.videos, args.workers, TAR), args.label_field, args.workers)
    elif args.data_set == "folder":
        found = from_folder(find_videos(args.videos, args.workers), args.unlabelled, args.val_fraction, args.seed)
    else:
        wanted = READERS[args.data_set](args)
        found = match(wanted, find_videos(args.videos, args.workers))
    write(found, args.output, "" if args.relative else os.path.abspath(args.videos))


if __name__ == "__main__":
    run_main(main)
