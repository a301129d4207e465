"""Prepare object images for the overlay of stage 1: crop and shrink cut-outs with transparency, and list them.

    python scripts/data/prepare_objects.py cutouts PIN/images --output objects
    python scripts/data/prepare_objects.py masks JPEGImages Annotations --mask_values ids --output objects

cutouts  RGBA images ``<category>/<name>``. A file LVIS_instance_pools.json beside the folder (as in the PIN objects)
         says which of them to use.
masks    images, and masks of the same name in another folder; flat or ``<category>/<name>``.

Written below --output: images/<category>/<name>.png, cropped to the visible part; object_instances.txt, a line for each
(--objects_path OUTPUT/images); dropped.tsv with what was left out, and why. Started again, the command writes what is
missing.
"""

import argparse
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from data_tools import (
    Unusable,
    add_work_options,
    is_made,
    new_parser,
    positive,
    put_in_place,
    read_text,
    without_suffixes,
    write_table,
    write_text,
)
from PIL import Image
from processes import make_all

from object_overlay import IMAGE_ERRORS, IMAGE_SUFFIXES, find_objects, to_rgba, upright
from utils import RunError, rank, run_main

VISIBLE = 16  # alpha from which a pixel counts as part of the object
POOLS = "LVIS_instance_pools.json"
FLAT = "object"  # category of images that lie in no folder
VOID = 255  # of masks that number their objects: belongs to none


@dataclass(frozen=True)
class Settings:
    """Options that decide how an object is cut out."""

    min_side: int = 24  # pixels; an object with a shorter side is dropped
    max_side: int = 320  # pixels; a longer one is shrunk to it
    min_fill: float = 0.05  # part of its box that the object must fill
    keep_opaque: bool = False  # keep images without a transparent pixel, which are not cut-outs
    mask_values: str = "alpha"  # 0 to 255; or "ids": 0 is the background, other values one object each


@dataclass(frozen=True)
class Job:
    """An image to cut out: its file, that of its mask if it has one, and the result without its suffix."""

    image: str
    mask: str
    target: Path


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    cutouts = commands.add_parser("cutouts", help="RGBA images <category>/<name>")
    cutouts.add_argument("images", help="folder with <category>/<name>.png, or the one above its images/")
    cutouts.add_argument("--pools", default="", help=f"file {{category: [paths]}} (default: {POOLS} beside the folder)")
    masks = commands.add_parser("masks", help="images and masks")
    masks.add_argument("images", help="folder with images")
    masks.add_argument("masks", help="folder with masks of the same names")
    values = "0 to 255, or numbers of objects (default %(default)s)"
    masks.add_argument("--mask_values", choices=("alpha", "ids"), default=Settings.mask_values, help=values)
    for command in (cutouts, masks):
        add = command.add_argument
        add("--output", required=True, type=Path, help="folder to write to")
        add("--min_side", type=positive, default=Settings.min_side, help="pixels (default %(default)s)")
        add("--max_side", type=positive, default=Settings.max_side, help="pixels (default %(default)s)")
        add("--min_fill", type=float, default=Settings.min_fill, help="part of its box (default %(default)s)")
        add("--keep_opaque", action="store_true", help="keep images without any transparent pixel")
        add("--exclude", nargs="*", default=[], metavar="CATEGORY", help="categories to leave out")
        add("--min_per_category", type=int, default=1, help="leave out categories with fewer objects")
        add_work_options(command, "image", 120)
    args = parser.parse_args(argv)
    if args.min_side > args.max_side or not 0 <= args.min_fill <= 1:
        parser.error("needed: --min_side at most --max_side, --min_fill in [0, 1]")
    return args


# Input files ----------------------------------------------------------------------------------------------------


def pool_names(path: Path) -> list[str]:
    """Read a file of instance pools: ``<category>/<name>``, the part of each path after ``images/``."""
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
    """List the RGBA images to use. Raises RunError if there are none."""
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
    """List the images that have a mask. Raises RunError if there are none."""

    def files(folder: str) -> dict[Path, str]:
        found: dict[Path, str] = {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
            other = found.setdefault(path.relative_to(folder).with_suffix(""), str(path))
            if other != str(path):
                raise RunError(f"{other} and {path}: images must differ in more than the suffix; rename one")
        return found

    of_images, of_masks = files(images), files(masks)
    target = lambda name: output / "images" / ("_".join(name.parent.parts) or FLAT) / name.name
    jobs = [Job(of_images[name], of_masks[name], target(name)) for name in of_images if name in of_masks]
    if not jobs:
        raise RunError(f"{images} and {masks} have no image and mask of the same name in common")
    return jobs


# One image ------------------------------------------------------------------------------------------------------


def read_image(job: Job) -> Image.Image:
    """Read an image as RGBA, upright if no mask belongs to its pixels. Raises IMAGE_ERRORS, or Unusable if opaque."""
    with Image.open(job.image) as image:
        if not job.mask and "A" not in image.getbands() and "transparency" not in image.info:
            raise Unusable("no transparency: not a cut-out")
        return to_rgba(image if job.mask else upright(image))


def read_masks(job: Job, size: tuple[int, int], mask_values: str) -> dict[str, Image.Image]:
    """Read a mask as the alpha channel of each object, by the suffix of the object's name; raises Unusable."""
    with Image.open(job.mask) as mask:
        if mask.size != size:
            raise Unusable(f"the mask has {mask.size[0]} x {mask.size[1]} pixels, the image {size[0]} x {size[1]}")
        if mask_values == "ids":
            values = np.array(mask if mask.mode in ("P", "L") else mask.convert("I"))
            ids = [value for value in np.unique(values) if value not in (0, VOID)]
            if not ids:
                raise Unusable(f"the mask has no ids but 0 and {VOID}, which stand for no object")
            return {f"_{value}": Image.fromarray(np.uint8(255) * (values == value)) for value in ids}
        alpha = mask.convert("L")
    if alpha.getextrema()[1] < 128:
        raise Unusable("the mask is nowhere above 127: if its values number objects, --mask_values ids")
    return {"": alpha}


def cut_out(image: Image.Image, settings: Settings) -> Image.Image:
    """Crop an object (RGBA) to its visible part, and shrink it if too large; raises Unusable if too little is left."""
    alpha = image.getchannel("A")
    seen = alpha.point(lambda value: 255 * (value >= VISIBLE))
    box = seen.getbbox()
    if box is None:
        raise Unusable("fully transparent")
    if not settings.keep_opaque and alpha.getextrema()[0] == 255:
        raise Unusable("opaque everywhere: not a cut-out")
    image, fill = image.crop(box), np.asarray(seen.crop(box)).astype(bool).mean()
    shrink = min(1.0, settings.max_side / max(image.size))
    if min(image.size) * shrink < settings.min_side:
        raise Unusable(f"too small: {image.width} x {image.height} pixels")
    if fill < settings.min_fill:
        raise Unusable(f"fills {fill:.1%} of its box")
    if shrink < 1:  # with premultiplied alpha, or colours hidden under transparent pixels would show at the edge
        size = (round(image.width * shrink), round(image.height * shrink))
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    return image


def prepare(job: Job, settings: Settings, unfinished: Path) -> tuple[list[Path], list[str]]:
    """Write the objects of an image; returns their files, and the reasons of those that were dropped.

    Raises Unusable if the image or its mask cannot be used.
    """
    made, reasons = [], []
    try:
        image = read_image(job)
        masks = read_masks(job, image.size, settings.mask_values) if job.mask else {"": image.getchannel("A")}
    except IMAGE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error).replace(job.image, "it") or type(error).__name__
        raise Unusable(reason) from error
    for suffix, alpha in masks.items():
        target = job.target.with_name(f"{job.target.name}{suffix}.png")
        if not is_made(target, job.image) or (job.mask and not is_made(target, job.mask)):
            image.putalpha(alpha)
            file = unfinished / f"{os.getpid()}.png"
            try:
                cut_out(image, settings).save(file)
            except Unusable as error:
                reasons.append(f"object{suffix}: {error}" if suffix else str(error))
                continue
            put_in_place(file, target)
        made.append(target)
    return made, reasons


def instances(made: list[Path], min_per_category: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Lines of object_instances.txt, and (category, reason) of the categories that have too few objects."""
    counts = Counter(path.parent.name for path in made)
    reason = "{} in the category, fewer than --min_per_category"
    few = [(name, reason.format(count)) for name, count in sorted(counts.items()) if count < min_per_category]
    kept = [f"{path.parent.name}/{path.name}" for path in made if counts[path.parent.name] >= min_per_category]
    return sorted(kept), few


def remove_few(made: list[Path], folder: Path, lines: list[str], jobs: list[Job]) -> None:
    """Remove the objects that were `made` in `folder` but are not in `lines`, except sources; warn of other objects."""
    wanted, sources = {folder / line for line in lines}, {os.path.realpath(job.image) for job in jobs}
    for path in set(made) - wanted:
        if os.path.realpath(path) not in sources:
            path.unlink()
    if others := sorted(set(folder.glob("*/*.png")) - wanted):
        remedy = "give --objects_list, or remove them"
        print(f"{folder}: {len(others)} objects are not in the list, such as {others[0]}: {remedy}")


def main(argv: list[str] | None = None) -> None:
    """Prepare all objects; print the counts."""
    args = get_args(argv)
    if args.kind == "cutouts":
        jobs = cutout_jobs(args.images, args.pools, args.output)
    else:
        jobs = mask_jobs(args.images, args.masks, args.output)
    jobs = [job for job in jobs if job.target.parent.name not in args.exclude]
    settings = Settings(*(getattr(args, field.name, field.default) for field in fields(Settings)))
    outcomes = make_all(args, asdict(settings), lambda: jobs, partial(prepare, settings=settings), "images")
    if rank() > 0:
        return
    made = [file for _, outcome, _ in outcomes if outcome for file in outcome[0]]
    reasons = [(job, outcome[1] if outcome else [reason]) for job, outcome, reason in outcomes]
    dropped = sorted((job.image, reason) for job, several in reasons for reason in several)
    lines, few = instances(made, args.min_per_category)
    write_table(args.output / "dropped.tsv", ("image", "reason"), dropped + few)
    print(f"{len(jobs)} images: {len(made)} objects, {len(dropped)} dropped (see {args.output / 'dropped.tsv'})")
    if not lines:
        first = (dropped + few or [("no image", "all are excluded")])[0]
        raise RunError(f"{args.images}: no usable object; the first: {': '.join(first)}")
    remove_few(made, args.output / "images", lines, jobs)
    path = args.output / "object_instances.txt"
    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines)} objects of {len({line.partition('/')[0] for line in lines})} categories")


if __name__ == "__main__":
    run_main(main)
