"""prepare_objects.py: cut-outs laid out as the PIN objects, and out of images with masks; what is dropped, and why."""

import json
from pathlib import Path

import numpy as np
import prepare_objects
import pytest
from fixtures_data_tools import kill_at
from PIL import Image
from prepare_objects import Settings, cut_out

from object_overlay import ObjectLibrary, find_objects
from utils import RunError

pytest_plugins = "fixtures_data_tools"


def cutout(width, height, box, colour=(200, 40, 30), alpha=255):
    """RGBA uint8 [h, w, 4]: green and transparent, but for a box (x1, y1, x2, y2)."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., 1] = 255
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = (*colour, alpha)
    return pixels


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)


def saved(path):
    return np.array(Image.open(path))


@pytest.fixture
def prepare(tmp_path, capsys):
    """Prepare objects: lines of object_instances.txt, reason by dropped image (of category/name), and the text."""

    def prepare(kind, *options):
        prepare_objects.main([kind, *map(str, options), "--output", str(tmp_path / "out"), "--workers", "2"])
        out = tmp_path / "out"
        dropped = {}
        if (out / "dropped.tsv").exists():
            rows = [line.split("\t") for line in (out / "dropped.tsv").read_text().splitlines()[1:]]
            dropped = {"/".join(Path(row[0]).parts[-2:]): row[1] for row in rows}
        return (out / "object_instances.txt").read_text().splitlines(), dropped, capsys.readouterr().out

    return prepare


@pytest.fixture
def pin(tmp_path):
    """A folder as the PIN objects come: images/<LVIS name>/<n>.png and the pools beside it."""
    root = tmp_path / "PIN"
    save(root / "images" / "aerosol_can" / "0.png", cutout(100, 80, (20, 10, 70, 60)))
    save(root / "images" / "aerosol_can" / "3.png", cutout(900, 600, (0, 0, 800, 400)))
    save(root / "images" / "bat_(animal)" / "59.png", cutout(60, 60, (5, 5, 50, 55)))
    save(root / "images" / "projectile" / "1.png", cutout(60, 60, (5, 5, 50, 55)))
    paths = ["aerosol_can/0.png", "aerosol_can/3.png", "aerosol_can/7.png", "bat_(animal)/59.png", "projectile/1.png"]
    pools = {}
    for path in paths:
        pools.setdefault(path.partition("/")[0], []).append(f"*/home/somebody/cleaned/images/{path}")
    (root / "LVIS_instance_pools.json").write_text(json.dumps(pools))
    return root


def test_shrinking_shows_no_colour_of_transparent_pixels():
    """Under transparent pixels all is green, the object is red: no green at its edge."""
    whole = Image.fromarray(cutout(700, 700, (3, 5, 640, 650), (255, 0, 0)))
    image = np.array(cut_out(whole, Settings(max_side=97)))
    assert image.shape == (97, 96, 4)
    assert image[image[..., 3] > 0][:, 1].max() == 0 and image[48, 48].tolist() == [255, 0, 0, 255]


def test_pin_objects(prepare, pin, tmp_path):
    save(pin / "images" / "aerosol_can" / "99.png", cutout(60, 60, (5, 5, 50, 55)))  # not in the pools
    lines, dropped, text = prepare("cutouts", pin, "--exclude", "projectile")
    assert lines == ["aerosol_can/0.png", "aerosol_can/3.png", "bat_(animal)/59.png"]
    assert dropped.keys() == {"aerosol_can/7.png"} and "No such file" in dropped["aerosol_can/7.png"]
    images = tmp_path / "out" / "images"
    assert np.array_equal(saved(images / lines[0]), cutout(100, 80, (20, 10, 70, 60))[10:60, 20:70])
    assert saved(images / lines[1]).shape == (160, 320, 4)  # 800 x 400
    assert "4 images: 3 objects, 1 dropped" in text and "3 objects of 2 categories" in text
    library = ObjectLibrary(str(images), find_objects(str(images), str(tmp_path / "out" / "object_instances.txt")))
    for seed in range(20):
        assert library.draw(np.random.default_rng(seed)).shape[2] == 4
    assert not library.skipped


def test_small_categories_are_left_out(prepare, pin):
    lines, dropped, _ = prepare("cutouts", pin / "images", "--min_per_category", 2)
    assert lines == ["aerosol_can/0.png", "aerosol_can/3.png"]
    assert dropped["bat_(animal)"] == dropped["projectile"] == "1 in the category, fewer than --min_per_category"


def test_the_folder_holds_what_the_list_names(prepare, pin, tmp_path):
    """So OBJECTS_PATH needs no list; objects of other runs stay, and are named."""
    images = lambda: sorted("/".join(path.parts[-2:]) for path in tmp_path.glob("out/images/*/*"))
    lines, _, text = prepare("cutouts", pin, "--exclude", "projectile", "--min_per_category", 2)
    assert images() == lines == ["aerosol_can/0.png", "aerosol_can/3.png"] and "not in the list" not in text
    assert prepare("cutouts", pin)[0] == images() and len(images()) == 4
    lines, _, text = prepare("cutouts", pin, "--exclude", "projectile")
    assert len(lines) == 3 and len(images()) == 4
    assert f"1 objects are not in the list, such as {tmp_path / 'out' / 'images' / 'projectile' / '1.png'}" in text


def test_no_source_is_removed(prepare, pin, tmp_path):
    """Where images are prepared in their own folder."""
    (tmp_path / "out").symlink_to(pin)
    (pin / "LVIS_instance_pools.json").unlink()
    before = sorted(pin.glob("images/*/*"))
    lines, _, _ = prepare("cutouts", tmp_path / "out", "--min_per_category", 2)
    assert len(lines) == 2 and sorted(pin.glob("images/*/*")) == before and len(before) == 4


def test_turned_images_are_turned_upright(prepare, tmp_path):
    """As cameras store them: 6 of EXIF's orientations means a quarter turn."""
    pixels, orientation = cutout(90, 60, (10, 20, 80, 50)), Image.Exif()
    orientation[0x0112] = 6
    root = tmp_path / "objects" / "thing"
    root.mkdir(parents=True)
    Image.fromarray(pixels).save(root / "turned.png", exif=orientation)
    assert prepare("cutouts", root.parent)[0] == ["thing/turned.png"]
    made = saved(tmp_path / "out" / "images" / "thing" / "turned.png")
    assert np.array_equal(made, np.rot90(pixels[20:50, 10:80], -1))


def test_what_is_dropped_and_why(prepare, tmp_path):
    root = tmp_path / "objects" / "thing"
    good = cutout(64, 64, (10, 10, 50, 50))
    save(root / "good.png", good)
    save(root / "good.webp", good)  # differs in the suffix alone
    save(root / "palette.png", good)
    Image.fromarray(good).quantize(16).save(root / "palette.png")
    save(root / "empty.png", cutout(64, 64, (0, 0, 0, 0)))
    save(root / "faint.png", cutout(64, 64, (10, 10, 50, 50), alpha=10))
    save(root / "tiny.png", cutout(64, 64, (10, 10, 33, 60)))
    save(root / "rgb.png", good[..., :3])
    save(root / "opaque.png", cutout(64, 64, (0, 0, 64, 64)))
    thin = cutout(64, 64, (10, 10, 11, 60))
    thin[10, 10:60, 3] = 255
    save(root / "thin.png", thin)
    (root / "text.png").write_bytes(b"not an image")
    lines, dropped, _ = prepare("cutouts", tmp_path / "objects")
    assert lines == ["thing/good.png.png", "thing/good.webp.png", "thing/palette.png"]
    reasons = {
        "empty": "fully transparent", "faint": "fully transparent", "tiny": "too small: 23 x 50 pixels",
        "rgb": "no transparency", "opaque": "opaque everywhere", "thin": "fills ", "text": "cannot identify image file",
    }  # fmt: skip
    assert dropped.keys() == {f"thing/{name}.png" for name in reasons}
    for name, reason in reasons.items():
        assert dropped[f"thing/{name}.png"].startswith(reason)


def test_images_with_soft_masks(prepare, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    mask = np.zeros((80, 100), np.uint8)
    mask[20:60, 30:90], mask[30:50, 40:80] = 128, 255
    save(tmp_path / "images" / "dog" / "a.bmp.png", image)
    save(tmp_path / "masks" / "dog" / "a.bmp.png", mask)
    save(tmp_path / "images" / "alone.png", image)  # in no folder: of one category
    save(tmp_path / "masks" / "alone.png", mask)
    deep = Image.fromarray(image[..., 0].astype(np.uint16) * 256)
    deep.save(tmp_path / "images" / "deep.png")
    save(tmp_path / "masks" / "deep.png", mask)
    save(tmp_path / "images" / "no mask.png", image)
    save(tmp_path / "images" / "other size.png", image)
    save(tmp_path / "masks" / "other size.png", mask[:40])
    save(tmp_path / "images" / "numbers.png", image)
    save(tmp_path / "masks" / "numbers.png", mask // 128)
    lines, dropped, _ = prepare("masks", tmp_path / "images", tmp_path / "masks")
    assert lines == ["dog/a.bmp.png", "object/alone.png", "object/deep.png"]
    assert np.array_equal(saved(tmp_path / "out" / "images" / lines[2])[..., 1], image[20:60, 30:90, 0])
    expected = np.dstack([image, mask])[20:60, 30:90]
    assert np.array_equal(saved(tmp_path / "out" / "images" / lines[0]), expected)
    assert dropped["images/other size.png"] == "the mask has 100 x 40 pixels, the image 100 x 80"
    assert "--mask_values ids" in dropped["images/numbers.png"] and len(dropped) == 2


def test_masks_that_number_their_objects(prepare, tmp_path):
    """A palette image as in DAVIS and VOC: 0 ground, 1 and 2 objects, 3 too small, 255 void."""
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    ids = np.zeros((80, 120), np.uint8)
    ids[10:50, 10:50], ids[30:70, 60:110], ids[0:5, 100:110], ids[70:75, 10:50] = 1, 2, 3, 255
    save(tmp_path / "JPEGImages" / "bear" / "00000.png", image)
    mask = Image.fromarray(ids, "P")
    mask.putpalette(list(range(256)) * 3)
    (tmp_path / "Annotations" / "bear").mkdir(parents=True)
    mask.save(tmp_path / "Annotations" / "bear" / "00000.png")
    folders = tmp_path / "JPEGImages", tmp_path / "Annotations"
    lines, dropped, _ = prepare("masks", *folders, "--mask_values", "ids")
    assert lines == ["bear/00000_1.png", "bear/00000_2.png"]
    assert dropped == {"bear/00000.png": "object_3: too small: 10 x 5 pixels"}
    for line, box in zip(lines, (np.s_[10:50, 10:50], np.s_[30:70, 60:110])):
        made = saved(tmp_path / "out" / "images" / line)
        assert np.array_equal(made[..., :3], image[box]) and (made[..., 3] == 255).all()


def test_a_second_run_makes_what_is_new_alone(prepare, pin, tmp_path):
    (pin / "LVIS_instance_pools.json").unlink()
    first, _, _ = prepare("cutouts", pin)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    save(pin / "images" / "zebra" / "0.png", cutout(60, 60, (5, 5, 50, 55)))
    lines, _, _ = prepare("cutouts", pin)
    assert lines == [*first, "zebra/0.png"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_killed_it_goes_on(prepare, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 256, (80, 80, 4), dtype=np.uint8)
        save(tmp_path / "in" / "noise" / f"{number:02d}.png", pixels)
    argv = ["cutouts", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "2"]
    for count in (1, 6, 12):
        kill_at(prepare_objects.main, argv, prepare_objects, "put_in_place", calls=count, done=True)
        for path in (tmp_path / "out").rglob("noise/*.png"):
            assert saved(path).shape == (80, 80, 4)
    lines, dropped, _ = prepare("cutouts", tmp_path / "in")
    assert lines == [f"noise/{number:02d}.png" for number in range(20)] and not dropped
    for line in lines:
        assert np.array_equal(saved(tmp_path / "out" / "images" / line), saved(tmp_path / "in" / line))


@pytest.mark.parametrize(
    "options, message",
    [
        ("cutouts {}/none", "no such folder"),
        ("cutouts {}/PIN --pools {}/PIN/images/aerosol_can/0.png", "cannot be read as a text file"),
        ("cutouts {}/PIN --pools {}/list.json", "not {category: "),
        ("cutouts {}/PIN --pools {}/away.json", "is not <category>/<name>"),
        ("cutouts {}/PIN --min_side 300", "no usable object; the first: .*/0.png: too small"),
        ("masks {}/PIN {}/none", "have no image and mask of the same name in common"),
        ("masks {}/twice {}/twice", "1.jpg and .*1.png: images must differ in more than the suffix"),
        ("masks {}/void {}/void --mask_values ids", "1.png: the mask has no ids but 0 and 255"),
    ],
)
def test_what_is_wrong_is_named(prepare, pin, tmp_path, options, message):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "away.json").write_text(json.dumps({"x": ["*/a/images/../../secret.png"]}))
    (pin / "images" / "aerosol_can" / "3.png").unlink()
    for path in ("twice/1.png", "twice/1.jpg", "void/1.png"):
        save(tmp_path / path, np.full((80, 80), 255, np.uint8))
    with pytest.raises(RunError, match=message):
        prepare(*[option.format(tmp_path) for option in options.split()])
