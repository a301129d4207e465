"""Lists for training and testing out of a data set's own annotation files and the videos that you have.

    python scripts/data/make_lists.py kinetics --videos k400 --annotations k400/annotations --output lists

Written to --output: train.csv, val.csv and test.csv with a line ``path label`` for each video, classes.txt with the
name of class 0 on the first line and so on, and problems.tsv with what is missing, twice there or contradictory.
Videos are found by their names wherever they lie below --videos, with any suffix; ``shards`` finds those in tar files,
and writes the index of each that has none. DATASET.md has the command for each data set and what to start from.
"""

import argparse
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import annotations as formats
import numpy as np
from annotations import Annotations, stem_of
from data_tools import Line, fits_a_list, write_list, write_table, write_text
from shard_lists import look_at_all, number_classes, split_of
from tqdm import tqdm

from lists import VIDEO_SUFFIXES, frames_in
from utils import RunError, run_main

LISTS = ("train.csv", "train_mini.csv", "val.csv", "test.csv")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by folder
TAR = (".tar",)
SHOWN = 5  # problems of a kind that are named on the console
PROBLEM_HEADS = ("list", "problem", "name", "detail")
Problem = tuple[str, str, str, str]  # list, kind, name, detail


def add_common(
    parser: argparse.ArgumentParser, annotations: bool = True, what: str = "videos"
) -> argparse.ArgumentParser:
    """Options that all data sets have."""
    parser.add_argument("--videos", required=True, help=f"folder with the {what}, in any sub-folders")
    if annotations:
        parser.add_argument("--annotations", required=True, help="folder with the data set's own annotation files")
    parser.add_argument("--output", required=True, help="folder to write the lists to")
    parser.add_argument("--relative", action="store_true", help="paths relative to --videos, for use with --data_root")
    parser.add_argument("--workers", type=int, default=8, help="folders read at the same time (default 8)")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="data_set", required=True, metavar="DATA_SET")
    new = lambda name, text: commands.add_parser(name, help=text, description=text)

    kinetics = add_common(new("kinetics", "Kinetics-400, -600, -700; Mini-Kinetics from given lists"), False)
    kinetics.add_argument("--annotations", default="", help="folder with Kinetics' own train.csv and val.csv")
    kinetics.add_argument(
        "--lists", nargs=2, default=None, metavar=("TRAIN", "VAL"), help="instead: lists `name label`"
    )
    kinetics.add_argument("--class_names", default="", help="with --lists: file with lines `name number`")
    mini = add_common(new("ssv2", "Something-Something V2"))
    mini.add_argument("--mini", default="", help="list of the train videos of SSv2-mini: writes train_mini.csv too")
    for name in ("ucf101", "hmdb51"):
        fold = add_common(new(name, f"{name.upper()}, one of the three folds"))
        fold.add_argument("--fold", type=int, choices=(1, 2, 3), default=1)
    gym = add_common(new("finegym", "Gym-99, Gym-288, and the parts FX-S1 and UB-S1 of Gym-99"))
    gym.add_argument("--part", choices=("gym99", "gym288", *formats.GYM_PARTS), default="gym99")
    add_common(new("diving48", "Diving48 V2"))
    add_common(new("ntu60", "NTU RGB+D 60, cross-subject, as SEVERE distributes it"))
    add_common(new("charades", "Charades, several labels with their seconds"))
    folder = add_common(new("folder", "videos of your own: <class>/<video> or {train,val,test}/<class>/<video>"), False)
    folder.add_argument("--unlabelled", action="store_true", help="no classes: one train.csv with label -1")
    folder.add_argument("--val_fraction", type=float, default=0.1, help="of each class, if there is no val folder")
    folder.add_argument("--seed", type=int, default=0, help="of the draw of the val videos")
    text = "tar files in WebDataset's layout, such as video2dataset's"
    shards = add_common(new("shards", text), annotations=False, what="tar files")
    shards.add_argument("--label_field", default="", help="of .json, a number or a class (default: .cls, else -1)")

    args = parser.parse_args(argv)
    if args.data_set == "kinetics" and bool(args.annotations) == bool(args.lists):
        parser.error("kinetics: give either --annotations or --lists")
    if args.data_set == "folder" and not 0 <= args.val_fraction < 1:
        parser.error("--val_fraction must lie in [0, 1)")
    if getattr(args, "annotations", "") and Path(args.annotations).resolve() == Path(args.output).resolve():
        parser.error("--output is the folder of the annotations, whose files would be overwritten")
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


# Videos on the disk ---------------------------------------------------------------------------------------------


def scan(folder: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Sub-folders of a folder, and its files whose names end so, as paths."""
    folders, videos = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(suffixes) and not entry.name.startswith("."):
                videos.append(entry.path)
    return folders, videos


def find_videos(root: str, workers: int, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> list[str]:
    """Print a progress bar over folders; paths of all videos (or others) below `root`, relative to it, sorted.

    Folders are read by threads: on a network file system the time goes into waiting.

    Raises:
        RunError: no such folder, or no videos in it.
    """
    if not os.path.isdir(root):
        raise RunError(f"--videos {root}: no such folder")
    found: list[str] = []
    ahead, seen = [root], set[str]()
    with ThreadPoolExecutor(workers) as pool, tqdm(desc="folders", unit="", disable=None) as bar:
        while ahead:
            ahead = [folder for folder in ahead if os.path.realpath(folder) not in seen]
            seen.update(os.path.realpath(folder) for folder in ahead)  # links may lead back
            deeper = []
            for folders, videos in pool.map(partial(scan, suffixes=suffixes), ahead):
                found += videos
                deeper += folders
                bar.update()
            ahead = deeper
    if not found:
        what = "tar files" if suffixes == TAR else "videos"
        why = frames_in(root) or f"no {what} below it ({' '.join(suffixes)})"
        raise RunError(f"--videos {root}: {why}")
    return sorted(os.path.relpath(path, root) for path in found)


def plain(name: str) -> str:
    """A class or folder name for comparison: Kinetics' folders have spaces or underscores, and any case."""
    return name.casefold().replace(" ", "_")


class VideoIndex:
    """Videos by their names without folder and suffix."""

    def __init__(self, videos: list[str], fold_case: bool):
        self.key = str.casefold if fold_case else str
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for video in videos:
            self.by_stem[self.key(stem_of(video))].append(video)

    def find(self, names: tuple[str, ...], folder: str) -> list[str]:
        """Videos of that name, the best first: in `folder`, and with the suffix of the annotation.

        Names that differ from a video's in case alone are those of another one (YouTube's ids do), unless
        `fold_case`.
        """
        for name in names:
            found = self.by_stem.get(self.key(stem_of(name)), [])
            if folder:
                in_folder = [path for path in found if plain(Path(path).parent.name) == plain(folder)]
                found = in_folder or found
            if found:
                return sorted(found, key=lambda path: (Path(path).suffix != Path(name).suffix, path))
        return []


# Lists ----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Lines by list file, how many videos each list should have, and what is wrong."""

    lines: dict[str, list[Line]]
    wanted: dict[str, int]
    problems: list[Problem]


def match(wanted: Annotations, videos: list[str]) -> Found:
    """The video of each entry. An entry without one, or seen before, is left out and noted."""
    index = VideoIndex(videos, wanted.fold_case)
    lists = wanted.lists
    result = Found({}, {name: len(entries) for name, entries in lists.items()}, list(wanted.problems))
    for name, entries in lists.items():
        labels: dict[str, str] = {}  # by path, or by name where there is no path
        lines: list[Line] = []
        for entry in entries:
            paths = index.find(entry.names, entry.folder)
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
        result.lines[name] = lines
    return result


def split_folder(videos: list[str], val_fraction: float, seed: int) -> tuple[dict[str, list[str]], list[str]]:
    """Videos of each split, by the split folders if there are any, and the classes. Without val folder it is drawn."""
    parts = [(video, Path(video).parts) for video in videos]
    has_splits = any(part[0] in SPLITS for _, part in parts)
    strays = [video for video, part in parts if has_splits and part[0] not in SPLITS]
    if strays:
        raise RunError(f"{strays[0]} is in none of {'/, '.join(SPLITS)}/, but other videos are")
    too_short = [video for video, part in parts if len(part) < 2 + has_splits]
    if too_short:
        raise RunError(f"{too_short[0]} is in no class folder; for videos without classes add --unlabelled")
    classes = sorted({part[has_splits] for _, part in parts})
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for video, part in parts:
        lists[SPLITS[part[0]] if has_splits else "train"].append(video)
    if not lists["val"]:
        class_of = {video: part[has_splits] for video, part in parts}
        lists["train"], lists["val"] = draw_val(lists["train"], class_of, val_fraction, seed)
    return lists, classes


def draw_val(
    videos: list[str], class_of: dict[str, str], val_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Some of the videos of each class drawn for val, one at least where there are two; the others and those."""
    rng = np.random.default_rng(seed)
    train, val = [], []
    for name in sorted({class_of[video] for video in videos}):
        of_class = [video for video in videos if class_of[video] == name]
        count = max(round(val_fraction * len(of_class)), 1) if val_fraction else 0
        count = min(count, len(of_class) - 1)  # one is left to train on
        drawn = set(rng.permutation(len(of_class))[:count].tolist())
        for number, video in enumerate(of_class):
            (val if number in drawn else train).append(video)
    return train, val


def from_folder(videos: list[str], unlabelled: bool, val_fraction: float, seed: int) -> tuple[Found, list[str]]:
    """Lists and classes of a folder of one's own videos."""
    held = [video for video in videos if fits_a_list(video)]
    problems = [("", "a name that no list can hold", repr(video), "") for video in videos if not fits_a_list(video)]
    if unlabelled:
        return Found({"train.csv": [Line(video, "-1") for video in held]}, {"train.csv": len(videos)}, problems), []
    lists, classes = split_folder(held, val_fraction, seed)
    has_splits = any(Path(video).parts[0] in SPLITS for video in held)
    numbers = {name: str(number) for number, name in enumerate(classes)}
    lines = {
        f"{split}.csv": [Line(video, numbers[Path(video).parts[has_splits]]) for video in part]
        for split, part in lists.items()
        if part
    }
    validated = {line.label for line in lines.get("val.csv", [])}
    has_val = any(SPLITS.get(Path(video).parts[0]) == "val" for video in held)
    rule = "" if has_val else ", which takes two of a class and --val_fraction above 0"
    problems += [
        ("val.csv", f"classes without a video in it{rule}", name, "")
        for name in classes
        if numbers[name] not in validated
    ]
    return Found(lines, {name: len(part) for name, part in lines.items()}, problems), classes


def from_shards(root: str, shards: list[str], label_field: str, workers: int) -> tuple[Found, list[str]]:
    """Lists and classes of the tar files below a folder."""
    found = Found({}, Counter(), [])
    for shard, held in look_at_all(root, shards, label_field, workers):
        name = f"{split_of(shard, SPLITS)}.csv"
        found.lines.setdefault(name, []).extend(held.lines)
        found.wanted[name] += held.samples
        found.problems += [(name, *problem) for problem in held.problems]
    return found, number_classes(list(found.lines.values()))


def shared_videos(lines: dict[str, list[Line]]) -> list[Problem]:
    """Videos that are trained on and tested on."""
    trained = {line.name for line in lines.get("train.csv", [])}
    return [
        (name, "in train.csv too", line.name, f"label {line.label}")
        for name in ("val.csv", "test.csv")
        for line in lines.get(name, [])
        if line.name in trained
    ]


def write(found: Found, classes: list[str], output: Path, prefix: str) -> None:
    """Print what is written and what is wrong; write lists, classes and problems.

    Args:
        prefix: folder put before every path, or nothing.
    Raises:
        RunError: not one video was found.
    """
    problems = found.problems + shared_videos(found.lines)
    if not any(found.lines.values()):
        kind, name = problems[0][1:3]
        raise RunError(f"not one video that could be listed was found below --videos; the first: {name}: {kind}")
    if "test.csv" not in found.lines and "val.csv" in found.lines:
        found.lines["test.csv"], found.wanted["test.csv"] = found.lines["val.csv"], found.wanted["val.csv"]
    written: list[str] = []
    for name in LISTS:
        lines = found.lines.get(name, [])
        if not lines:
            (output / name).unlink(missing_ok=True)
            if name in found.lines:
                print(f"{name}: not written, none of its {found.wanted[name]} videos is there")
            continue
        write_list(output / name, [Line(os.path.join(prefix, path), label) for path, label in lines])
        written.append(f"{name}: {len(lines)} of {found.wanted[name]} videos")
    if classes:
        write_text(output / "classes.txt", "".join(f"{name}\n" for name in classes))
        written.append(f"classes.txt: {len(classes)} classes")
    else:
        (output / "classes.txt").unlink(missing_ok=True)  # of other lists
    write_table(output / "problems.tsv", PROBLEM_HEADS, problems)
    for (name, kind), count in sorted(Counter(problem[:2] for problem in problems).items()):
        first = [problem[2] for problem in problems if problem[:2] == (name, kind)][:SHOWN]
        print(f"{name}: {count} {kind}: {', '.join(first)}{', ...' * (count > SHOWN)} (see {output / 'problems.tsv'})")
    print(f"{output}: {', '.join(written)}")


def read_annotations(args: argparse.Namespace) -> Annotations:
    """The annotations of the chosen data set."""
    if args.data_set == "kinetics" and args.lists:
        return formats.given_lists(args.lists[0], args.lists[1], args.class_names)
    if args.data_set == "ssv2":
        return formats.ssv2(args.annotations, args.mini)
    if args.data_set in ("ucf101", "ntu60"):
        return formats.class_folders(args.annotations, getattr(args, "fold", 1))
    if args.data_set == "hmdb51":
        return formats.hmdb51(args.annotations, args.fold)
    if args.data_set == "finegym":
        return formats.finegym(args.annotations, args.part)
    readers = {"kinetics": formats.kinetics, "diving48": formats.diving48, "charades": formats.charades}
    return readers[args.data_set](args.annotations)


def main(argv: list[str] | None = None) -> None:
    """Make the lists of a data set."""
    args = get_args(argv)
    if args.data_set == "shards":
        shards = find_videos(args.videos, args.workers, TAR)
        found, classes = from_shards(args.videos, shards, args.label_field, args.workers)
    elif args.data_set == "folder":
        videos = find_videos(args.videos, args.workers)
        found, classes = from_folder(videos, args.unlabelled, args.val_fraction, args.seed)
    else:
        wanted = read_annotations(args)
        found, classes = match(wanted, find_videos(args.videos, args.workers)), wanted.classes
    write(found, classes, Path(args.output), "" if args.relative else os.path.abspath(args.videos))


if __name__ == "__main__":
    run_main(main)
