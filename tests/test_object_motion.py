"""How objects move and are pasted, against the recipe's definition: geometry by hand and by PIL, distributions by an
independent simulation compared with Kolmogorov-Smirnov tests.
"""

import numpy as np
import pytest
from fixtures_objects import P_VALUE, noise, solid, write
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from scipy.stats import ks_2samp, kstest

from object_overlay import ASPECT_RATIOS, SCALES, ObjectOverlay, fit_sprite, gaussian_path

from object_overlay import key_frame_curve, key_frames, linear_path, paste, read_object  # isort: skip

# ------------------------------------------------------------------------------------------------------- key frames


def method_key_frames(rng, num_frames):
    """the recipe, told anew."""
    inner = rng.choice([0, 1, 2], p=[0.5, 0.3, 0.2])
    spacing = (num_frames - 1) / (inner + 1)
    jittered = [j * spacing + rng.uniform(-spacing / 3, spacing / 3) for j in range(1, inner + 1)]
    return sorted({0, num_frames - 1, *(round(frame) for frame in jittered)})


def method_walk(rng, num_frames, rate):
    """Sum of U(-rate·n, rate·n) over the key frames: log growth, angle or unclipped shift at the last frame."""
    return sum(rng.uniform(-rate * n, rate * n) for n in np.diff(method_key_frames(rng, num_frames)))


def test_key_frames():
    rng, counts = np.random.default_rng(0), np.zeros(3)
    drawn = [key_frames(rng, 301) for _ in range(4000)]
    for frames in drawn:
        assert frames[0] == 0 and frames[-1] == 300 and (np.diff(frames) > 0).all()
        counts[len(frames) - 2] += 1
        spacing = 300 / (len(frames) - 1)
        assert (np.abs(frames - np.arange(len(frames)) * spacing) <= spacing / 3 + 0.5).all()
    assert np.abs(counts / 4000 - (0.5, 0.3, 0.2)).max() < 0.03
    ours = np.concatenate([frames[1:-1] for frames in drawn])
    told = np.concatenate([method_key_frames(rng, 301)[1:-1] for _ in range(3000)])
    assert ks_2samp(ours, told).pvalue > P_VALUE


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_short_clips_have_curves(num_frames):
    for seed in range(50):
        curve = key_frame_curve(np.random.default_rng(seed), num_frames, np.array([5.0]), lambda v, n: v + n)
        assert curve.shape == (num_frames, 1) and curve[0, 0] == 5 and curve[-1, 0] == pytest.approx(4 + num_frames)


def test_curves_between_key_frames():
    """Each segment is linear, accelerating or decelerating, in the shares .7 / .15 / .15."""
    rng, kinds = np.random.default_rng(0), np.zeros(3)
    for _ in range(2500):
        lengths = []
        curve = key_frame_curve(rng, 31, np.zeros(1), lambda v, n: (lengths.append(n), v + 10)[1])[:, 0]
        assert sum(lengths) == 30
        for first, n in zip(np.cumsum([0, *lengths]), lengths):
            t = np.arange(n + 1) / n
            segment = (curve[first : first + n + 1] - curve[first]) / 10
            matches = [np.allclose(segment, shape) for shape in (t, t**2, 1 - (1 - t) ** 2)]
            assert sum(matches) == 1
            kinds[matches.index(True)] += 1
    assert np.abs(kinds / kinds.sum() - (0.7, 0.15, 0.15)).max() < 0.03


# ----------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize("frame, size", [((224, 224), (50, 30)), ((112, 160), (100, 20))])
def test_gaussian_path_is_the_smoothed_path_of_the_recipe(frame, size):
    """Points where the object fits, each the mean of its neighbours by a Gaussian of 8 points, stretched and moved."""
    for seed in range(20):
        path = gaussian_path(np.random.default_rng(seed), 48, np.array(size), frame)
        rng, kernel = np.random.default_rng(seed), np.exp(-0.5 * (np.arange(-32, 33) / 8) ** 2)
        points = rng.uniform(1 + np.array(size) / 2, np.array(frame) - 1 - np.array(size) / 2, (48, 2))
        padded = np.pad(points, ((32, 32), (0, 0)), mode="symmetric")
        smooth = np.array([kernel @ padded[i : i + 65] for i in range(48)]) / kernel.sum()
        smooth = (smooth - smooth.min(axis=0)) / (smooth.max(axis=0) - smooth.min(axis=0))
        extent = min(int(rng.integers(40, 180)), min(frame) - 1)
        expected = smooth * extent + rng.integers(0, np.array(frame) - extent)
        assert np.abs(path - expected + 0.5).max() <= 0.5 + 1e-9  # truncated to whole pixels


@pytest.mark.parametrize("frame, unit, low, high", [((224, 224), 1, 40, 180), ((112, 112), 0.5, 20, 90)])
def test_gaussian_path_extents_and_places(frame, unit, low, high):
    """48 frames show all 48 points: both coordinates span the same integer extent, placed anywhere that fits."""
    rng, size = np.random.default_rng(0), np.array([50.0, 30.0]) * unit
    paths = np.stack([gaussian_path(rng, 48, size, frame, unit) for _ in range(3000)])
    extent, start = np.ptp(paths, axis=1), paths.min(axis=1)
    assert (extent[:, 0] == extent[:, 1]).all() and (paths == np.trunc(paths)).all()
    assert extent.min() == low and extent.max() == high - 1 and paths.min() == 0 and paths.max() == frame[0] - 1
    assert kstest((extent[:, 0] + rng.random(3000) - low) / (high - low), "uniform").pvalue > P_VALUE
    for axis in (0, 1):
        place = (start[:, axis] + rng.random(3000)) / (frame[axis] - extent[:, axis])
        assert kstest(place, "uniform").pvalue > P_VALUE


def test_gaussian_path_is_as_smooth_as_described():
    rng = np.random.default_rng(0)

    def told():
        smooth = gaussian_filter1d(rng.uniform(26, 197, 48), 8, mode="reflect")
        return (smooth - smooth.min()) / np.ptp(smooth)

    def ours():
        path = gaussian_path(rng, 48, np.array([50.0, 50.0]), (224, 224))[:, 0]
        return (path - path.min()) / np.ptp(path)

    for measure in (lambda s: np.abs(np.diff(s)).sum(), lambda s: s[0], lambda s: s.mean(), lambda s: s[20] - s[30]):
        assert ks_2samp([measure(ours()) for _ in range(1500)], [measure(told()) for _ in range(1500)]).pvalue > P_VALUE


@pytest.mark.parametrize("num_frames", [1, 8, 16, 64])
def test_gaussian_path_takes_points_evenly(num_frames):
    size, every = np.array([50.0, 50.0]), (np.linspace(0, 47, num_frames)).astype(int)
    path, dense = (gaussian_path(np.random.default_rng(3), n, size, (224, 224)) for n in (num_frames, 48))
    np.testing.assert_array_equal(path, dense[every])


@pytest.mark.parametrize("frame", [(224, 224), (160, 96), (32, 32), (48, 224)])
def test_gaussian_path_fits_any_frame(frame):
    rng = np.random.default_rng(0)
    for _ in range(300):
        path = gaussian_path(rng, 16, np.array([10.0, 10.0]), frame, min(frame) / 224)
        assert (path >= 0).all() and (path < frame).all()


@pytest.mark.parametrize("unit", [1.0, 0.5])
def test_linear_path_starts_anywhere_and_keeps_the_first_box_inside(unit):
    rng, frame, size = np.random.default_rng(0), np.array([224, 160]) * unit, np.array([100.0, 40.0]) * unit
    paths = np.stack([linear_path(rng, 16, size, tuple(frame.astype(int)), unit) for _ in range(2000)])
    assert (paths >= size / 2 - 1e-9).all() and (paths <= frame - size / 2 + 1e-9).all()
    for start in ((paths[:, 0] - size / 2) / (frame - size)).T:
        assert kstest(start, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("unit", [1.0, 0.5])
def test_linear_path_steps_as_described(unit):
    """In a frame so large that no step is clipped."""
    rng = np.random.default_rng(0)
    paths = np.stack([linear_path(rng, 16, np.array([20.0, 20.0]), (10**7, 10**7), unit) for _ in range(2000)]) / unit
    shift, told = paths[:, -1] - paths[:, 0], [method_walk(rng, 16, 12) for _ in range(3000)]
    assert 170 < np.abs(shift).max() <= 12 * 15 + 1e-3
    assert ks_2samp(shift[:, 0], told).pvalue > P_VALUE and ks_2samp(shift[:, 1], told).pvalue > P_VALUE
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.1
    assert np.abs(np.diff(paths, axis=1)).max() <= 24 + 1e-3  # a parabola is at most twice as fast as a line


# ----------------------------------------------------------------------------------------------------------- tracks


def tracks(overlay, num_frames, draws, seed=0):
    """Sizes [draws, T, 2], centres [draws, T, 2], angles [draws, T]."""
    rng = np.random.default_rng(seed)
    boxes, angles = map(np.stack, zip(*[overlay.draw_track(rng, num_frames) for _ in range(draws)]))
    assert boxes.dtype.kind == angles.dtype.kind == "i"
    return boxes[..., 2:] - boxes[..., :2], (boxes[..., 2:] + boxes[..., :2]) / 2, angles


def method_sizes(rng, draws, scales, unit, whole_centres):
    """the recipe, told anew: sizes of the first box [draws, 2], whole pixels."""
    ratio, scale = rng.choice([0.5, 0.67, 0.75, 1, 1.33, 1.5, 2], draws), rng.choice(scales, draws)
    sizes = np.stack([scale * np.sqrt(ratio), scale / np.sqrt(ratio)], axis=1) * unit
    sizes = sizes * np.exp(rng.uniform(-0.18, 0.18, (draws, 2)))
    centre = rng.integers(50, 60, (draws, 2)) if whole_centres else rng.uniform(50, 60, (draws, 2))
    return np.rint(centre + sizes / 2) - np.rint(centre - sizes / 2)


@pytest.mark.parametrize("side", [224, 112])
@pytest.mark.parametrize("motion", ["gaussian", "linear"])
def test_first_box_has_the_size_described(side, motion):
    sizes, rng = tracks(ObjectOverlay((side, side), None, motion), 2, 2500)[0][:, 0], np.random.default_rng(1)
    told = method_sizes(rng, 5000, [32, 48, 56, 64, 96, 128], side / 224, whole_centres=motion == "gaussian")
    for measure in (lambda s: s[:, 0], lambda s: s[:, 1], lambda s: s[:, 0] * s[:, 1], lambda s: s[:, 0] / s[:, 1]):
        assert ks_2samp(measure(sizes), measure(told)).pvalue > P_VALUE
    assert sizes.min() >= 32 * np.sqrt(0.5) * np.exp(-0.18) * side / 224 - 1
    assert sizes.max() <= 128 * np.sqrt(2) * np.exp(0.18) * side / 224 + 1
    if side == 224:  # every scale and ratio is shown
        area, shape = np.sqrt(sizes.prod(axis=1)), sizes[:, 0] / sizes[:, 1]
        assert all((np.abs(np.log(area / scale)) < 0.05).any() for scale in SCALES)
        assert all((np.abs(np.log(shape / ratio)) < 0.05).any() for ratio in ASPECT_RATIOS)


@pytest.mark.parametrize("scale", [48, 128])
def test_first_box_jitter(scale):
    """The aspect ratio cancels in the area: what remains is the jitter of width and height."""
    sizes, rng = tracks(ObjectOverlay((224, 224), None, scales=(scale,)), 2, 2500)[0][:, 0], np.random.default_rng(1)
    ours, told = (np.log(s / scale).sum(axis=1) for s in (sizes, method_sizes(rng, 5000, [scale], 1, True)))
    assert np.abs(ours).max() <= 0.36 + 3 / scale and np.std(ours) == pytest.approx(np.std(told), rel=0.08)
    assert ks_2samp(ours, told).pvalue > P_VALUE


@pytest.mark.parametrize("side", [224, 32])
@pytest.mark.parametrize("motion", ["gaussian", "linear"])
def test_first_box_is_clipped_to_the_frame(side, motion):
    sizes = tracks(ObjectOverlay((side, side), None, motion, scales=(300,)), 16, 200)[0][:, 0]
    assert side - 2 <= sizes.max() <= side  # side - 1, with both edges rounded


def test_growth_of_boxes():
    frames = 33
    sizes = tracks(ObjectOverlay((224, 224), None, scales=(128,)), frames, 2000)[0]
    growth = np.log(sizes[:, -1] / sizes[:, 0])
    rng = np.random.default_rng(1)
    told = [method_walk(rng, frames, 0.025) for _ in range(3000)]
    assert np.abs(growth).max() <= 0.025 * (frames - 1) + 0.05  # rounding
    assert ks_2samp(growth[:, 0], told).pvalue > P_VALUE and ks_2samp(growth[:, 1], told).pvalue > P_VALUE
    assert abs(np.corrcoef(growth.T)[0, 1]) < 0.1


def test_angles():
    angles, rng = tracks(ObjectOverlay((224, 224), None), 16, 2000)[2], np.random.default_rng(1)
    told = np.trunc([method_walk(rng, 16, 6) for _ in range(3000)])
    assert (angles[:, 0] == 0).all() and np.abs(angles).max() <= 6 * 15
    assert np.abs(np.diff(angles, axis=1)).max() <= 12 + 1  # a parabola is at most twice as fast, and rounding
    assert ks_2samp(angles[:, -1], told).pvalue > P_VALUE


@pytest.mark.parametrize("side", [224, 112])
def test_gaussian_centres_lie_in_the_frame(side):
    centres = tracks(ObjectOverlay((side, side), None, "gaussian"), 16, 1000)[1]
    assert centres.min() >= -0.5 and centres.max() <= side - 0.5  # rounding of the edges
    extent = np.ptp(centres, axis=1)
    assert extent.max() <= 180 * side / 224 and np.median(extent) > 60 * side / 224


@pytest.mark.parametrize("frame", [(224, 224), (96, 160), (32, 32), (16, 16), (320, 64)])
@pytest.mark.parametrize("motion", ["gaussian", "linear"])
def test_overlay_runs_on_any_frame_size(frame, motion):
    overlay = ObjectOverlay(frame, None, motion)
    for seed in range(60):
        for num_frames in (1, 2, 5):
            frames = np.zeros((num_frames, frame[1], frame[0], 3), np.uint8)
            boxes = overlay(np.random.default_rng(seed), frames)
            assert boxes.shape == (2, num_frames, 4) and (boxes[..., 2:] > boxes[..., :2]).all()
    with pytest.raises(ValueError, match="circular"):
        ObjectOverlay(frame, None, "circular")


# ----------------------------------------------------------------------------------------------------------- pasting


def smooth_sprite(rng, size=(40, 30)):
    """Opaque, slowly changing colours, so that resampling kernels agree."""
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    colour = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    return np.dstack([colour, np.full(size[::-1], 255, np.uint8)])


def within_turned_box(box, angle, height, width, margin):
    """Pixels whose centre is at most `margin` outside a turned box, bool [H, W]."""
    x = np.arange(width)[None] + 0.5 - (box[0] + box[2]) / 2
    y = np.arange(height)[:, None] + 0.5 - (box[1] + box[3]) / 2
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    along, across = np.abs(x * cos + y * sin), np.abs(-x * sin + y * cos)
    return (along <= (box[2] - box[0]) / 2 + margin) & (across <= (box[3] - box[1]) / 2 + margin)


def random_placements(rng, num_frames, height, width):
    """Boxes in and around the frame, any angle."""
    centre, size = rng.uniform(-0.3, 1.3, (num_frames, 2)) * (width, height), rng.integers(1, 90, (num_frames, 2))
    low = np.rint(centre - size / 2).astype(int)
    return np.concatenate([low, low + size], axis=1), rng.integers(-200, 200, num_frames)


def test_paste_changes_the_turned_box_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(30):
        boxes, angles = random_placements(rng, 8, 72, 100)
        before = rng.integers(0, 200, (8, 72, 100, 3), dtype=np.uint8)
        frames = before.copy()
        paste(frames, fit_sprite(solid(255, 255, 255, 255), (boxes[:, 2:] - boxes[:, :2]).max(axis=0)), boxes, angles)
        for t, (box, angle) in enumerate(zip(boxes, angles)):
            touch = (abs(np.cos(np.deg2rad(angle))) + abs(np.sin(np.deg2rad(angle)))) / 2  # half a turned pixel
            may, must = (within_turned_box(box, angle, 72, 100, margin) for margin in (touch + 0.1, -1))
            changed = (frames[t] != before[t]).any(axis=2)
            assert not (changed & ~may).any() and (frames[t][must] == 255).all()


def test_sprite_of_its_box_size_is_copied():
    rng = np.random.default_rng(0)
    sprite = np.dstack([noise(rng, 30, 41), np.full((30, 41), 255, np.uint8)])
    frames = noise(rng, 3, 72, 100)
    paste(frames, sprite, np.array([[10, 20, 51, 50], [-10, 60, 31, 90], [80, -5, 121, 25]]), np.zeros(3, int))
    np.testing.assert_array_equal(frames[0, 20:50, 10:51], sprite[..., :3])
    np.testing.assert_array_equal(frames[1, 60:72, 0:31], sprite[:12, 10:, :3])
    np.testing.assert_array_equal(frames[2, 0:25, 80:100], sprite[5:, :20, :3])


@pytest.mark.parametrize("size", [(320, 200), (320, 1), (1, 1), (37, 320), (3, 2)])
@pytest.mark.parametrize("box", [(60, 40), (1, 1), (13, 200), (319, 201)])
def test_fitted_sprite_keeps_its_opacity_and_mean(size, box):
    ramp = np.linspace(0, 255, size[0])[None, :, None] * np.ones((size[1], 1, 4))
    ramp[..., 3] = 255
    fitted = fit_sprite(ramp.astype(np.uint8), np.array(box))
    exact = fitted.shape == (box[1], box[0], 4)
    assert exact or all(side <= length < 2 * side for side, length in zip(box, fitted.shape[1::-1], strict=True))
    assert (fitted[..., 3] == 255).all()
    assert fitted[..., 0].mean() == pytest.approx(ramp.astype(np.uint8)[..., 0].mean(), abs=2)


@pytest.mark.parametrize("angle", [-130, -90, -45, 17, 60, 90, 180, 200, 270])
def test_turned_sprite_equals_pil(angle):
    """Angles are clockwise, PIL's are counter-clockwise."""
    rng = np.random.default_rng(0)
    sprite, below = smooth_sprite(rng), np.full((1, 72, 100, 3), 90, np.uint8)
    canvas = np.zeros((72, 100, 4), np.uint8)
    canvas[21:51, 30:70] = sprite
    turned = Image.fromarray(canvas).rotate(-angle, Image.Resampling.BILINEAR)
    expected = Image.alpha_composite(Image.fromarray(np.full((72, 100, 4), (90, 90, 90, 255), np.uint8)), turned)
    paste(below, sprite, np.array([[30, 21, 70, 51]]), np.array([angle]))
    difference = np.abs(below[0].astype(int) - np.asarray(expected)[..., :3])
    assert difference.max() <= 4 and difference.mean() < 0.2


def test_compositing_equals_pil():
    rng = np.random.default_rng(0)
    straight = rng.integers(0, 256, (30, 41, 4), dtype=np.uint8)
    below = noise(rng, 1, 72, 100)
    opaque = np.dstack([below[0], np.full((72, 100), 255, np.uint8)])
    expected = Image.fromarray(opaque)
    expected.alpha_composite(Image.fromarray(straight), (10, 20))
    premultiplied = np.array(Image.fromarray(straight).convert("RGBa"))
    paste(below, premultiplied, np.array([[10, 20, 51, 50]]), np.array([0]))
    np.testing.assert_allclose(below[0].astype(int), np.asarray(expected)[..., :3].astype(int), atol=2)


def test_colour_under_transparent_pixels_never_shows(tmp_path):
    pixels = solid(0, 255, 0, 0, size=(50, 50))  # green, but invisible
    pixels[15:35, 15:35] = (255, 0, 0, 255)
    sprite = read_object(write(tmp_path, "a.png", pixels), 320)
    frames = np.zeros((3, 100, 100, 3), np.uint8)
    boxes = np.array([[10, 10, 90, 70], [20, 20, 40, 45], [5, 5, 77, 60]])
    paste(frames, fit_sprite(sprite, np.array([80, 60])), boxes, np.array([33, 0, 71]))
    assert frames[..., 0].max() == 255 and frames[..., 1].max() == 0


def test_opacity():
    frames = np.zeros((3, 20, 20, 3), np.uint8)
    sprite, boxes = solid(200, 100, 50, 255, size=(10, 10)), np.tile([5, 5, 15, 15], (3, 1))
    paste(frames, sprite, boxes, np.zeros(3, int), np.array([1.0, 0.8, 0.0]))
    np.testing.assert_allclose(frames[:, 10, 10], [[200, 100, 50], [160, 80, 40], [0, 0, 0]], atol=1)


@pytest.mark.parametrize("motion", ["gaussian", "linear"])
def test_speed_is_a_factor_on_all_motion(motion):
    """1 is the paper's; 0 leaves objects where they are; half of it halves what moves, turns and grows."""

    def tracks(**options):
        overlay = ObjectOverlay((224, 224), None, motion, (48,), **options)
        found = [overlay.draw_track(np.random.default_rng(seed), 16) for seed in range(300)]
        boxes, angles = (np.stack(part).astype(float) for part in zip(*found))
        centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        path = np.hypot(*np.moveaxis(np.diff(centre, axis=1), 2, 0)).sum(axis=1).mean()
        growth = np.abs(np.log(size[:, -1] / size[:, 0])).mean()
        return np.array([path, np.abs(angles[:, -1]).mean(), growth]), found

    paper, boxes = tracks()
    for (one, turned), (other, same) in zip(boxes, tracks(speed=1.0)[1]):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(turned, same)
    still, _ = tracks(speed=0.0)
    assert still[0] < 1 and still[1] == 0 and still[2] < 0.01
    np.testing.assert_allclose(tracks(speed=0.5)[0] / paper, 0.5, atol=0.12)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_rois": 0}, "num_rois 0 and"),
        ({"scales": (0, 64)}, r"num_rois 2 and .* scales \(0, 64\) must"),
        ({"motion": "straight"}, "unknown motion_type 'straight'"),
    ],
)
def test_an_overlay_without_objects_or_of_unknown_motion_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectOverlay((224, 224), None, **wrong)
