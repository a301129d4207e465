"""Object images for the overlay of stage 1: cut-outs with transparency, cropped, of useful size, and a list of them.

    python scripts/data/prepare_objects.py cutouts PIN/images --output objects
    python scripts/data/prepare_objects.py masks JPEGImages Annotations --mask_values ids --output objects

cutouts  RGBA images ``<category>/<name>``. A file LVIS_instance_pools.json beside the folder (as in the PIN objects)
         says which of them to use.
masks    images, and masks of the same name in another folder; flat or ``<category>/<name>``.

Written below --output: images/<category>/<name>.png, cropped to what can be seen; object_instances.txt, a line for each
(--objects_path OUTPUT/images --objects_list OUTPUT/object_instances.txt); dropped.tsv with what was left out, and why.
The same command, started again after any end, does what is left.
"""

import argparse
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from data_tools import (
    RunError,
    Unusable,
    is_made,
    output_folder,
    put_in_place,
    read_text,
    without_suffixes,
    write_table,
    write_text,
)
from PIL import Image
from processes import Team, in_processes

from object_overlay import IMAGE_ERRORS, IMAGE_SUFFIXES, find_objects
from utils import run_main

VISIBLE = 16  # alpha from which a pixel counts as part of the object
POOLS = "LVIS_instance_pools.json"
FLAT = "object"  # category of images that lie in no folder
ID_MODES = ("1", "L", "P", "I", "I;16")
VOID = 255  # of masks that number their objects: belongs to none


@dataclass(frozen=True)
class Settings:
    """What a cut-out depends on.

    Args:
        min_side: pixels; an object with a shorter side is dropped.
        max_side: pixels; a longer one is shrunk to it.
        min_fill: part of its box that the object must fill.
        keep_opaque: keep images without a transparent pixel, which are no cut-outs.
        mask_values: ``alpha`` (0 to 255) or ``ids`` (0: background, other values: one object each).
    """

    min_side: int = 24
    max_side: int = 320
    min_fill: float = 0.05
    keep_opaque: bool = False
    mask_values: str = "alpha"


@dataclass(frozen=True)
class Job:
    """An image to cut out: its file, that of its mask if it has one, and the result without its suffix."""

    image: str
    mask: str
    target: Path


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    cutouts = commands.add_parser("cutouts", help="RGBA images <category>/<name>")
    cutouts.add_argument("images", help="folder with <category>/<name>.png, or the one above its images/")
    cutouts.add_argument("--pools", default="", help=f"file {{category: [paths]}} (default: {POOLS} beside the folder)")
    masks = commands.add_parser("masks", help="images and masks")
    masks.add_argument("images", help="folder with images")
    masks.add_argument("masks", help="folder with masks of the same names")
    masks.add_argument(
        "--mask_values", choices=("alpha", "ids"), default=Settings.mask_values, help="0 to 255, or numbers of objects"
    )
    for command in (cutouts, masks):
        command.add_argument("--output", required=True, help="folder to write to")
        command.add_argument("--min_side", type=int, default=Settings.min_side, help="pixels (default %(default)s)")
        command.add_argument("--max_side", type=int, default=Settings.max_side, help="pixels (default %(default)s)")
        command.add_argument(
            "--min_fill", type=float, default=Settings.min_fill, help="part of its box (default %(default)s)"
        )
        command.add_argument("--keep_opaque", action="store_true", help="keep images without any transparent pixel")
        command.add_argument("--exclude", nargs="*", default=[], metavar="CATEGORY", help="categories to leave out")
        command.add_argument("--min_per_category", type=int, default=1, help="leave out categories with fewer objects")
        cores = len(os.sched_getaffinity(0))
        command.add_argument("--workers", type=int, default=cores, help="processes (default: one for each core)")
        command.add_argument("--timeout", type=float, default=120, help="seconds for one image (default 120)")
    args = parser.parse_args(argv)
    if not 1 <= args.min_side <= args.max_side or not 0 <= args.min_fill <= 1 or args.workers < 1:
        parser.error("needed: 1 <= --min_side <= --max_side, --min_fill in [0, 1], --workers at least 1")
    return args


# What there is --------------------------------------------------------------------------------------------------


def pool_names(path: Path) -> list[str]:
    """``<category>/<name>`` of the paths in a file of instance pools: what follows their ``images/``.

    Raises:
        RunError: it is no such file.
    """
    try:
        pools = json.loads(read_text(path))
        paths = [item for items in pools.values() for item in items]
        names = {item.replace("\\", "/").rpartition("images/")[2].lstrip("*/") for item in paths}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise RunError(f"{path}: not {{category: [paths]}} ({error})") from error
    if wrong := next((name for name in names if name.count("/") != 1 or ".." in name), None):
        raise RunError(f"{path}: {wrong!r} is not <category>/<name> after images/")
    return sorted(names)


def cutout_jobs(images: str, pools: str, output: Path) -> list[Job]:
    """The RGBA images to use.

    Raises:
        RunError: none.
    """
    root = Path(images) / "images" if (Path(images) / "images").is_dir() else Path(images)
    beside = root.parent / POOLS
    if pools or beside.exists():
        names = pool_names(Path(pools) if pools else beside)
    else:
        try:
            names = find_objects(str(root))
        except ValueError as error:
            raise RunError(str(error).removeprefix("objects_path ")) from error
    return [Job(str(root / name), "", output / "images" / stem) for name, stem in zip(names, without_suffixes(names))]


def mask_jobs(images: str, masks: str, output: Path) -> list[Job]:
    """The images that have a mask.

    Raises:
        RunError: none.
    """
    files = {}
    for folder in (images, masks):
        found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files[folder] = {path.relative_to(folder).with_suffix(""): path for path in found}
    both = [name for name in files[images] if name in files[masks]]
    if not both:
        raise RunError(f"{images} and {masks} have no image and mask of the same name in common")
    category = lambda name: "_".join(name.parent.parts) or FLAT
    return [
        Job(str(files[images][name]), str(files[masks][name]), output / "images" / category(name) / name.name)
        for name in both
    ]


# One image ------------------------------------------------------------------------------------------------------


def read_pixels(job: Job) -> np.ndarray:
    """RGBA uint8 ``[h, w, 4]`` of an image that has an alpha channel, or whose job has a mask.

    Raises:
        Unusable or IMAGE_ERRORS: no alpha, or unreadable.
    """
    with Image.open(job.image) as image:
        if not job.mask and "A" not in image.getbands() and "transparency" not in image.info:
            raise Unusable("no transparency: not a cut-out")
        return np.array(image.convert("RGBA"))


def read_masks(job: Job, size: tuple[int, int], mask_values: str) -> dict[str, np.ndarray]:
    """Alpha uint8 ``[h, w]`` of each object of a mask, by what is added to the object's name.

    Raises:
        Unusable: it has another size, or is all dark.
    """
    with Image.open(job.mask) as image:
        if image.size != size:
            raise Unusable(f"the mask has {image.size[0]} x {image.size[1]} pixels, the image {size[0]} x {size[1]}")
        if mask_values == "ids":
            values = np.array(image if image.mode in ("P", "L") else image.convert("I"))
            return {
                f"_{value}": np.uint8(255) * (values == value) for value in np.unique(values) if value not in (0, VOID)
            }
        alpha = np.array(image.convert("L"))
    if alpha.max() < 128:
        raise Unusable("the mask is nowhere above 127: if its values number objects, --mask_values ids")
    return {"": alpha}


def cut_out(pixels: np.ndarray, settings: Settings) -> Image.Image:
    """An object cropped to what can be seen of it, and shrunk if it is too large.

    Args:
        pixels: RGBA uint8 ``[h, w, 4]``.
    Raises:
        Unusable: nothing can be seen, or too little; or all of it, so that it is no cut-out.
    """
    seen = pixels[..., 3] >= VISIBLE
    if not seen.any():
        raise Unusable("fully transparent")
    if not settings.keep_opaque and (pixels[..., 3] == 255).all():
        raise Unusable("opaque everywhere: not a cut-out")
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = seen[box].shape
    shrink = min(1.0, settings.max_side / max(height, width))
    if min(height, width) * shrink < settings.min_side:
        raise Unusable(f"too small: {width} x {height} pixels")
    if seen[box].mean() < settings.min_fill:
        raise Unusable(f"fills {seen[box].mean():.1%} of its box")
    image = Image.fromarray(np.ascontiguousarray(pixels[box]))
    if shrink < 1:  # with premultiplied alpha, or colours hidden under transparent pixels would show at the edge
        size = (round(width * shrink), round(height * shrink))
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    return image


def target_of(job: Job, suffix: str) -> Path:
    """File of an object of an image."""
    return job.target.with_name(f"{job.target.name}{suffix}.png")


def prepare(job: Job, settings: Settings, unfinished: Path) -> tuple[list[Path], list[str]]:
    """Write the objects of an image: their files, and why others were dropped.

    Raises:
        Unusable: it has none.
    """
    made, reasons = [], []
    try:
        pixels = read_pixels(job)
        size = (pixels.shape[1], pixels.shape[0])
        masks = read_masks(job, size, settings.mask_values) if job.mask else {"": pixels[..., 3]}
    except IMAGE_ERRORS as error:
        raise Unusable(
            getattr(error, "strerror", None) or str(error).replace(job.image, "it") or type(error).__name__
        ) from error
    for suffix, alpha in masks.items():
        target = target_of(job, suffix)
        if is_made(target, job.image) and (not job.mask or is_made(target, job.mask)):
            made.append(target)
            continue
        try:
            image = cut_out(np.dstack([pixels[..., :3], alpha]), settings)
        except Unusable as error:
            reasons.append(f"object{suffix}: {error}" if suffix else str(error))
            continue
        file = unfinished / f"{os.getpid()}.png"
        image.save(file)
        put_in_place(file, target)
        made.append(target)
    return made, reasons


# All images -----------------------------------------------------------------------------------------------------


def instances(made: list[Path], images: Path, min_per_category: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Lines of object_instances.txt, and what is left out since its category has too few."""
    names = sorted(path.relative_to(images).as_posix() for path in made)
    counts = Counter(name.partition("/")[0] for name in names)
    few = {category for category, count in counts.items() if count < min_per_category}
    kept = [name for name in names if name.partition("/")[0] not in few]
    return kept, [
        (category, f"{counts[category]} in the category, fewer than --min_per_category") for category in sorted(few)
    ]


def main(argv: list[str] | None = None) -> None:
    """Prepare all objects; print the counts."""
    args = get_args(argv)
    output = Path(args.output)
    if args.kind == "cutouts":
        jobs = cutout_jobs(args.images, args.pools, output)
    else:
        jobs = mask_jobs(args.images, args.masks, output)
    jobs = [job for job in jobs if job.target.parent.name not in args.exclude]
    names = {name: getattr(args, name, default) for name, default in asdict(Settings()).items()}
    settings = Settings(**names)
    made: list[str] = []
    dropped: list[tuple[str, str]] = []
    team = Team(output / ".team")
    with output_folder(output, asdict(settings), team.rank) as unfinished:
        team.begin()
        work, mine = partial(prepare, settings=settings, unfinished=unfinished), list(team.share(jobs))
        for job, outcome, reason in in_processes(work, mine, args.workers, args.timeout, "images", team):
            files, reasons = outcome or ([], [reason])
            made += map(str, files)
            dropped += [(job.image, why) for why in reasons]
        results = team.gather((made, dropped))
    if not results:
        return
    made = [file for result in results for file in result[0]]
    dropped = [(image, why) for result in results for image, why in result[1]]
    dropped.sort()
    lines, few = instances([Path(file) for file in made], output / "images", args.min_per_category)
    write_table(output / "dropped.tsv", ("image", "reason"), dropped + few)
    print(f"{len(jobs)} images: {len(made)} objects, {len(dropped)} dropped (see {output / 'dropped.tsv'})")
    if not lines:
        first = (dropped + few or [("no image", "all are excluded")])[0]
        raise RunError(f"{args.images}: no usable object; the first: {': '.join(first)}")
    write_text(output / "object_instances.txt", "".join(f"{line}\n" for line in lines))
    categories = {line.partition("/")[0] for line in lines}
    print(f"{output / 'object_instances.txt'}: {len(lines)} objects of {len(categories)} categories")


if __name__ == "__main__":
    run_main(main)
