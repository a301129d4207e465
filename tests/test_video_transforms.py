"""Crops against a brute-force enumeration of the recipe's boxes, and the resize against PIL's bilinear filter."""

from itertools import product

import numpy as np
import pytest
from fixtures_video import decode_all
from PIL import Image

from video_transforms import ClipSource, multi_scale_box, resize

pytest_plugins = "fixtures_video"


def sides(short, out):
    """Crop sides: parts of the short side, the input size where that is less than 3 px away (and fits)."""
    found = []
    for scale in (1, 0.875, 0.75, 0.66):
        side = int(short * scale)
        found.append(min(out, short) if side - 3 < out < side + 3 else side)
    return found


def anchors(room_x, room_y):
    """13 positions in a room of 4 x 4 steps: corners, centre, edge midpoints, quarter points."""
    x, y = room_x // 4, room_y // 4
    corners = {(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y)}
    edges = {(0, 2 * y), (4 * x, 2 * y), (2 * x, 0), (2 * x, 4 * y)}
    quarters = {(x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y)}
    return corners | edges | quarters | {(2 * x, 2 * y)}


def all_boxes(frame, size):
    """Every box that may come out."""
    boxes = set()
    widths, heights = sides(min(frame), size[0]), sides(min(frame), size[1])
    for i, j in product(range(4), range(4)):
        if abs(i - j) <= 1:
            boxes |= {(x, y, widths[i], heights[j]) for x, y in anchors(frame[0] - widths[i], frame[1] - heights[j])}
    return boxes


def draw_boxes(frame, size, count=8000):
    rng = np.random.default_rng(0)
    return [tuple(int(value) for value in multi_scale_box(rng, frame, size)) for _ in range(count)]


@pytest.mark.parametrize(
    "frame, size",
    [
        ((340, 256), (224, 224)),  # 256 * .875 = 224
        ((456, 258), (224, 224)),  # 225: within 3 px, becomes 224
        ((320, 240), (224, 224)),
        ((180, 320), (112, 112)),
        ((101, 101), (64, 64)),
        ((400, 226), (224, 224)),  # 2 px more than the input: becomes 224
        ((400, 227), (224, 224)),  # 3 px more: stays
        ((400, 222), (224, 224)),  # 2 px less: the frame has no 224
        ((340, 256), (192, 160)),
        ((60, 80), (224, 224)),
    ],
)
def test_boxes_are_those_of_the_method(frame, size):
    assert set(draw_boxes(frame, size)) == all_boxes(frame, size)


def test_boxes_lie_in_the_frame_and_all_shapes_and_anchors_are_equally_likely():
    frame, size = (340, 256), (100, 100)
    drawn = draw_boxes(frame, size, 13000)
    assert all(x >= 0 and y >= 0 and x + w <= frame[0] and y + h <= frame[1] for x, y, w, h in drawn)
    shapes, counts = np.unique([box[2:] for box in drawn], axis=0, return_counts=True)
    assert len(shapes) == 10 and counts.min() > 1300 * 0.85 and counts.max() < 1300 * 1.15
    square = [box[:2] for box in drawn if box[2:] == (256, 224)]
    _, counts = np.unique(square, axis=0, return_counts=True)
    assert len(counts) == 13 and counts.min() > 0.5 * len(square) / 13


@pytest.mark.parametrize("height, width", [(64, 64), (96, 160), (128, 176), (224, 224), (300, 200)])
def test_resize_is_bilinear_like_pil(clips, height, width):
    frames = decode_all(clips["bikes.mp4"])[::20]  # 128 x 176: shrinking, growing and both at once
    expected = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
    ours = resize(frames, height, width)
    error = np.abs(ours.astype(int) - np.stack([np.asarray(image) for image in expected]))
    assert ours.dtype == np.uint8 and ours.shape == (len(frames), height, width, 3)
    assert error.mean() <= 1 and error.max() <= 3


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (2, 2), (3, 1000)])
@pytest.mark.parametrize("pan", [0, 0.3, 0.9])
def test_tiny_pictures_are_cropped_too(height, width, pan, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    source, out = ClipSource((64, 48), 4, kind="image", pan=pan), np.zeros((4, 48, 64, 3), np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        source.crop(rng, source.read(rng, str(tmp_path / "p.png")).frames, out)
        assert set(np.unique(out)) <= set(range(int(picture.min()), int(picture.max()) + 1)) and out.any()


def test_the_crop_is_the_same_in_every_frame_and_what_the_box_says(clips):
    frames = decode_all(clips["upright.mp4"])[:6]  # 112 wide, 144 high
    for seed in range(20):
        out = np.empty((6, 48, 64, 3), np.uint8)
        ClipSource((64, 48), 6).crop(np.random.default_rng(seed), frames, out)
        x, y, w, h = multi_scale_box(np.random.default_rng(seed), (112, 144), (64, 48))
        for frame, got in zip(frames, out):
            cut = Image.fromarray(frame).crop((x, y, x + w, y + h)).resize((64, 48), Image.Resampling.BILINEAR)
            assert np.abs(got.astype(int) - np.asarray(cut)).mean() <= 1
