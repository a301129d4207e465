"""The overlay against the recipe's definition: every kind of image file an object folder may hold, the boxes that are
returned, and patches cut out of the clip. How objects move and are pasted is in test_object_motion.py.
"""

import numpy as np
import pytest
from fixtures_objects import P_VALUE, noise, solid, write
from PIL import Image
from scipy.stats import kstest

import object_overlay
from object_overlay import (
    CACHED_OBJECTS,
    ObjectLibrary,
    ObjectOverlay,
    cached_object,
    find_objects,
    read_image,
    read_object,
    shaped_patch,
)


def solid_library(folder, *colours):
    """A library of opaque one-coloured objects."""
    for i, colour in enumerate(colours):
        write(folder, f"things/{i}.png", solid(*colour, 255))
    return ObjectLibrary(str(folder), find_objects(str(folder)))


# ---------------------------------------------------------------------------------------------------- finding objects


def test_find_objects_lists_images_one_folder_deep(tmp_path):
    for name in "cat/b.png cat/a.PNG bird/c.jpg bird/d.webp bird/deep/e.png stray.png cat/notes.txt".split():
        write(tmp_path, name, b"x")
    assert find_objects(str(tmp_path)) == ["bird/c.jpg", "bird/d.webp", "cat/a.PNG", "cat/b.png"]
    listed = write(tmp_path, "list.txt", b"cat/b.png\n\n  bird/c.jpg \n")
    assert find_objects(str(tmp_path), listed) == ["bird/c.jpg", "cat/b.png"]
    with pytest.raises(ValueError, match=r"objects_list .*latin.txt"):
        find_objects(str(tmp_path), write(tmp_path, "latin.txt", "caf\u00e9/b.png\n".encode("latin-1")))


@pytest.mark.parametrize("name", ["../secret.png", "cat/../../secret.png", "/etc/secret.png"])
def test_objects_list_must_stay_inside_the_folder(tmp_path, name):
    listed = write(tmp_path, "list.txt", f"cat/a.png\n{name}\n".encode())
    with pytest.raises(ValueError, match=name):
        find_objects(str(tmp_path), listed)


def test_folder_without_objects_is_an_error(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=str(tmp_path)):
        find_objects(str(tmp_path))
    with pytest.raises(ValueError, match="objects_path .*nowhere"):
        find_objects(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="empty.txt"):
        find_objects(str(tmp_path), write(tmp_path, "empty.txt", b"\n"))


# ------------------------------------------------------------------------------------------------------ reading images


def test_rgba_is_premultiplied(tmp_path):
    pixels = solid(200, 100, 50, 128, size=(3, 2))
    pixels[0, 0] = (10, 250, 30, 0)
    read = read_object(write(tmp_path, "a.png", pixels), 320)
    assert read.shape == (2, 3, 4) and read.dtype == np.uint8
    assert (read[0, 0] == 0).all()  # what lies under a transparent pixel is gone
    np.testing.assert_allclose(read[1, 2], [200 * 128 / 255, 100 * 128 / 255, 50 * 128 / 255, 128], atol=1)


@pytest.mark.parametrize("suffix, error", [("png", 0), ("webp", 0), ("jpg", 3)])
def test_rgb_without_alpha_is_opaque(tmp_path, suffix, error):
    pixels = solid(200, 100, 0, size=(30, 20))  # a last colour channel that would be an invisible alpha
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    read = read_object(str(tmp_path / f"a.{suffix}"), 320)
    np.testing.assert_allclose(read, np.dstack([pixels, np.full((20, 30), 255, np.uint8)]), atol=error)
    assert (read[..., 3] == 255).all()


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 250, 120, 10])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    read = read_object(str(tmp_path / "a.png"), 320)
    assert read[0, 0].tolist() == [0, 0, 0, 0] and read[1, 3].tolist() == [250, 120, 10, 255]


@pytest.mark.parametrize(
    "mode, value, expected", [("LA", (200, 51), (40, 51)), ("L", 77, (77, 255)), ("1", 1, (255, 255))]
)
def test_grey_and_bilevel(tmp_path, mode, value, expected):
    """`expected`: grey and alpha."""
    Image.new(mode, (4, 2), value).save(tmp_path / "a.png")
    grey, alpha = expected
    np.testing.assert_allclose(read_object(str(tmp_path / "a.png"), 320)[0, 0], [grey, grey, grey, alpha], atol=1)


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path):
    pixels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    read = read_object(write(tmp_path, "a.png", pixels), 320)
    np.testing.assert_allclose(read[..., 0].ravel(), np.arange(256), atol=1)
    assert (read[..., 3] == 255).all()


def test_large_object_is_shrunk_in_proportion(tmp_path):
    read = read_object(write(tmp_path, "a.png", solid(200, 100, 50, 255, size=(1000, 400))), 320)
    assert read.shape == (128, 320, 4) and (read == (200, 100, 50, 255)).all()
    thin = read_object(write(tmp_path, "b.png", solid(200, 100, 50, 255, size=(1000, 1))), 320)
    assert thin.shape == (1, 320, 4)


# ------------------------------------------------------------------------------------------------------- the library


def bad_files(folder):
    """Three images that cannot be used."""
    write(folder, "bad/transparent.png", solid(200, 100, 50, 0))
    whole = write(folder, "tmp.png", noise(np.random.default_rng(0), 60, 60))
    with open(whole, "rb") as file:
        write(folder, "bad/truncated.png", file.read()[:3000])
    write(folder, "bad/text.png", b"this is not an image")
    return {"transparent.png", "truncated.png", "text.png"}


def test_unusable_images_are_skipped_and_reported_once(tmp_path):
    bad = bad_files(tmp_path)
    write(tmp_path, "good/red.png", solid(255, 0, 0, 255))
    write(tmp_path, "good/one.png", solid(255, 0, 0, 255, size=(1, 1)))
    library = ObjectLibrary(str(tmp_path), [*find_objects(str(tmp_path)), "good/gone.png"])
    rng, told, shapes = np.random.default_rng(0), [], set()
    for _ in range(60):
        shapes.add(library.draw(rng).shape)
        told += library.take_skipped()
    assert shapes == {(40, 60, 4), (1, 1, 4)} and all(library.skipped.values())
    assert sorted(path.rsplit("/", 1)[1] for path, _ in told) == sorted([*bad, "gone.png"])
    assert dict(told) == library.skipped and library.take_skipped() == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1500, 500])
def test_huge_image_is_skipped(tmp_path, monkeypatch, limit):
    """Above PIL's limit it only warns, above twice the limit it raises."""
    write(tmp_path, "a/huge.png", solid(255, 0, 0, 255))  # 2400 pixels
    write(tmp_path, "a/small.png", solid(0, 255, 0, 255, size=(10, 10)))
    library, rng = ObjectLibrary(str(tmp_path), find_objects(str(tmp_path))), np.random.default_rng(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert all(library.draw(rng).shape == (10, 10, 4) for _ in range(20))
    assert [path.endswith("huge.png") for path in library.skipped] == [True]


def test_library_of_bad_images_raises(tmp_path):
    bad_files(tmp_path)
    (tmp_path / "tmp.png").unlink()
    library = ObjectLibrary(str(tmp_path), find_objects(str(tmp_path)))
    with pytest.raises(RuntimeError, match=f"objects_path {tmp_path}"):
        library.draw(np.random.default_rng(0))


def test_objects_are_drawn_uniformly(tmp_path):
    library, rng = solid_library(tmp_path, *[(i, 0, 0) for i in range(1, 6)]), np.random.default_rng(0)
    drawn = np.bincount([library.draw(rng)[0, 0, 0] for _ in range(3000)], minlength=6)[1:] / 3000
    assert np.abs(drawn - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 3000)


def test_cache_stays_bounded_and_is_used(tmp_path, monkeypatch):
    library, opened = solid_library(tmp_path, *[(i, i, i) for i in range(12)]), []
    monkeypatch.setattr(object_overlay, "read_image", lambda path: opened.append(path) or read_image(path))
    rng = np.random.default_rng(0)
    for _ in range(100):
        library.draw(rng)
    assert len(opened) == 12 and 12 <= cached_object.cache_info().currsize <= CACHED_OBJECTS


# ------------------------------------------------------------------------------------------------------ whole overlay


@pytest.mark.parametrize("motion", ["gaussian", "linear"])
@pytest.mark.parametrize("side, num_frames", [(224, 16), (112, 10)])
def test_returned_boxes_are_those_painted(tmp_path, motion, side, num_frames):
    overlay = ObjectOverlay((side, side), solid_library(tmp_path, (255, 255, 255)), motion, num_rois=1)
    checked = 0
    for seed in range(12):
        frames = np.zeros((num_frames, side, side, 3), np.uint8)
        boxes = overlay(np.random.default_rng(seed), frames)
        assert boxes.shape == (1, num_frames, 4)
        (x1, y1, x2, y2), first = boxes[0, 0].clip(0), np.zeros((side, side), np.uint8)
        first[y1:y2, x1:x2] = 255
        np.testing.assert_array_equal(frames[0, ..., 0], first)  # never turned
        for frame, box in zip(frames[..., 0], boxes[0]):
            size, centre = box[2:] - box[:2], (box[2:] + box[:2]) / 2
            reach = np.hypot(*size) / 2
            if (centre - reach >= 0).all() and (centre + reach <= side).all():  # wholly visible at any angle
                rows, columns = np.nonzero(frame)
                weight = frame[rows, columns] / 255
                found = np.array([np.average(columns, weights=weight), np.average(rows, weights=weight)]) + 0.5
                assert np.abs(found - centre).max() < 0.05 and weight.sum() == pytest.approx(size.prod(), rel=0.01)
                checked += 1
    assert checked > 20


def test_larger_objects_are_pasted_first(tmp_path):
    overlay = ObjectOverlay((224, 224), solid_library(tmp_path, (255, 0, 0), (0, 255, 0), (0, 0, 255)), num_rois=3)
    for seed in range(25):
        frames = np.zeros((8, 224, 224, 3), np.uint8)
        boxes = overlay(np.random.default_rng(seed), frames)
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(axis=2).mean(axis=1)
        assert (np.diff(areas) <= 0).all()
        x1, y1, x2, y2 = boxes[-1, 0].clip(0)  # the smallest is on top: its box shows one colour
        assert len(np.unique(frames[0, y1:y2, x1:x2].reshape(-1, 3), axis=0)) == 1


def test_one_pixel_object_fills_its_box(tmp_path):
    write(tmp_path, "a/one.png", solid(250, 120, 10, 255, size=(1, 1)))
    overlay = ObjectOverlay((224, 224), ObjectLibrary(str(tmp_path), ["a/one.png"]), num_rois=1)
    frames = np.zeros((2, 224, 224, 3), np.uint8)
    x1, y1, x2, y2 = overlay(np.random.default_rng(0), frames)[0, 0].clip(0, 224)
    assert (frames[0, y1:y2, x1:x2] == (250, 120, 10)).all() and (frames[0, ..., 0] > 0).sum() == (x2 - x1) * (y2 - y1)


def test_seed_decides_frames_and_boxes(tmp_path):
    """Also with a library that has skipped, cached and dropped images meanwhile."""
    bad_files(tmp_path)
    library = solid_library(tmp_path, (255, 0, 0), (0, 255, 0), (0, 0, 255))
    clip = noise(np.random.default_rng(9), 6, 112, 112)
    for source in (library, None):
        overlay, results = ObjectOverlay((112, 112), source), []
        for seed in (1, 2, 3, 4, 1):
            frames = clip.copy()
            results.append((overlay(np.random.default_rng(seed), frames), frames))
        (boxes, frames), (other_boxes, _), (same_boxes, same_frames) = results[0], results[1], results[-1]
        np.testing.assert_array_equal(boxes, same_boxes)
        np.testing.assert_array_equal(frames, same_frames)
        assert (boxes != other_boxes).any() and (frames != clip).any()


# -------------------------------------------------------------------------------------------------------- patch mode


def coordinate_clip(num_frames=4, height=120, width=160):
    """Each pixel tells where it is: (frame, row, column)."""
    return np.stack(np.meshgrid(*map(np.arange, (num_frames, height, width)), indexing="ij"), axis=-1).astype(np.uint8)


def test_patch_is_cut_out_of_the_clip():
    """One larger than the frame is the frame."""
    patch = shaped_patch(np.random.default_rng(0), coordinate_clip(), np.array([500.0, 500.0]))
    assert patch.shape == (120, 160, 4)
    rng, places = np.random.default_rng(0), []
    for _ in range(400):
        patch = shaped_patch(rng, coordinate_clip(), np.array([31.0, 21.0]))
        assert patch.shape == (21, 31, 4) and patch.dtype == np.uint8
        t, y, x = patch[10, 15, :3].astype(int)
        rows, columns = np.nonzero(patch[..., 3] == 255)
        expected = np.stack([np.full(len(rows), t), y + rows - 10, x + columns - 15], axis=1)
        np.testing.assert_array_equal(patch[rows, columns, :3], expected)
        places.append((t, y - 10, x - 15))
    assert set(t for t, _, _ in places) == {0, 1, 2, 3}
    (_, low_y, low_x), (_, high_y, high_x) = np.min(places, axis=0), np.max(places, axis=0)
    assert 0 <= low_y < 5 and 94 < high_y <= 99 and 0 <= low_x < 7 and 122 < high_x <= 129


def half_size_distances(w, h):
    """Distance from the centre in half-sizes, 1 at the edge: rectangle, ellipse, rhombus."""
    x = np.abs((np.arange(w) + 0.5 - w / 2) / (w / 2))[None]
    y = np.abs((np.arange(h) + 0.5 - h / 2) / (h / 2))[:, None]
    return np.maximum(x, y), np.sqrt(x**2 + y**2), x + y


def test_patch_shapes_and_soft_edges():
    rng, white = np.random.default_rng(0), np.full((2, 120, 160, 3), 255, np.uint8)
    shapes, soft, turning_points = np.zeros(3), 0, []
    for _ in range(1500):
        patch = shaped_patch(rng, white, np.array([60.0, 40.0]))
        alpha = patch[..., 3].astype(float)
        assert (patch[..., :3] == patch[..., 3:]).all()  # premultiplied white
        distances = half_size_distances(60, 40)
        hard = [np.array_equal(alpha, 255.0 * (distance <= 1)) for distance in distances]
        if any(hard):
            shapes[hard.index(True)] += 1
            continue
        soft += 1
        fits = []
        for distance in distances:  # alpha = (1 - distance) / (1 - turning point): fit it where the edge falls off
            edge = (distance > 0.5) & (distance < 0.95)
            turning = 1 - np.mean((1 - distance[edge]) / (alpha[edge] / 255).clip(1e-3))
            fits.append((np.abs(255 * ((1 - distance) / (1 - turning)).clip(0, 1) - alpha).max(), turning))
        error, turning = min(fits)
        assert error < 2
        shapes[fits.index((error, turning))] += 1
        turning_points.append(turning)
    assert np.abs(shapes / 1500 - (0.5, 0.35, 0.15)).max() < 0.05 and abs(soft / 1500 - 0.5) < 0.05
    assert kstest((np.array(turning_points) - 0.30) / 0.15, "uniform").pvalue > P_VALUE


def test_patch_opacity():
    overlay, rng, ends = ObjectOverlay((160, 120), None), np.random.default_rng(0), []
    clip, boxes = coordinate_clip(16), np.tile([0, 0, 20, 20], (16, 1))
    for _ in range(600):
        opacity = overlay.draw_sprite(rng, clip, boxes)[1]
        assert opacity.shape == (16,) and opacity.min() >= 0.8 and opacity.max() <= 1
        ends.append(opacity[[0, -1]])
    for values in np.transpose(ends):
        assert kstest((values - 0.8) / 0.2, "uniform").pvalue > P_VALUE
    assert abs(np.corrcoef(np.transpose(ends))[0, 1]) < 0.2


def test_patches_of_one_colour_leave_the_clip_as_it_was():
    frames = np.full((8, 112, 112, 3), 137, np.uint8)
    ObjectOverlay((112, 112), None, num_rois=3)(np.random.default_rng(0), frames)
    assert np.abs(frames.astype(int) - 137).max() <= 3


def test_patch_overlay_stays_in_its_boxes():
    overlay = ObjectOverlay((112, 112), None, num_rois=1)
    for seed in range(20):
        clip = noise(np.random.default_rng(seed + 100), 4, 112, 112)
        frames = clip.copy()
        x1, y1, x2, y2 = overlay(np.random.default_rng(seed), frames)[0, 0].clip(0)
        outside = np.ones((112, 112), dtype=bool)
        outside[y1:y2, x1:x2] = False
        assert (frames[0] == clip[0])[outside].all() and (frames[0] != clip[0]).any()
