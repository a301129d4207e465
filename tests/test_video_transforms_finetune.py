"""Fine-tuning's augmentation against timm, torchvision and PIL, and the crops of the tests by hand."""

import random

import numpy as np
import pytest
import torch
from fixtures_video import decode_all
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resize as torchvision_resize

from video_transforms_finetune import TrainAugmentation, long_side_crop, random_resized_box, short_side_resize

pytest_plugins = "fixtures_video"
POLICY = "rand-m7-n4-mstd0.5-inc1"


def textured(num_frames, height, width, seed=0):
    """Frames of smooth colours that differ everywhere, from side to side and from frame to frame."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (num_frames, 3, 5, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_equal_frames_stay_equal(interpolation):
    """One draw for all frames; another clip has another."""
    frame = textured(1, 60, 80)
    augment = TrainAugmentation(48, POLICY, True, interpolation)
    results = [augment(np.random.default_rng(seed), np.repeat(frame, 5, axis=0)) for seed in range(25)]
    assert all((clip == clip[:1]).all() and clip.shape == (5, 48, 48, 3) for clip in results)
    assert all(clip.dtype == np.uint8 and clip.flags.c_contiguous and clip.flags.writeable for clip in results)
    assert len({clip.tobytes() for clip in results}) == 25


@pytest.mark.parametrize("size", [48, 224])
def test_rand_augment_equals_timm_on_every_frame(size):
    frames, changed = textured(4, 60, 80), 0
    ours = TrainAugmentation(size, POLICY, True, "bicubic")
    theirs = rand_augment_transform(POLICY, {"translate_const": int(0.45 * size), "interpolation": Image.BICUBIC})
    for seed in range(25):
        expected = []
        for frame in frames:
            random.seed(seed)
            np.random.seed(seed)
            expected.append(np.asarray(theirs(Image.fromarray(frame))))
        got = ours.same_for_all(seed, frames)
        assert np.array_equal(got, np.stack(expected))
        changed += not np.array_equal(got, frames)
    assert changed > 15


def test_a_crop_keeps_the_smallest_area_given():
    frames = textured(2, 64, 64)
    rng, whole = np.random.default_rng(0), TrainAugmentation(64, "", False, min_area=1)
    assert np.array_equal(whole(rng, frames), frames), "only the whole square has all of the area"
    with pytest.raises(ValueError, match="crop_area 0: must be"):
        TrainAugmentation(64, "", False, min_area=0)


def test_no_policy_draws_nothing():
    frames = textured(3, 64, 64)
    clip = TrainAugmentation(64, "", False)(np.random.default_rng(3), frames)
    x, y, w, h = random_resized_box(np.random.default_rng(3), (64, 64))
    for frame, got in zip(frames, clip):
        cut = Image.fromarray(frame).crop((x, y, x + w, y + h)).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(got.astype(int) - np.asarray(cut)).max() <= 2


@pytest.mark.parametrize("width, height", [(340, 256), (256, 256), (180, 320), (500, 200)])
def test_boxes_are_distributed_as_in_torchvision(width, height):
    rng, image = np.random.default_rng(0), torch.zeros(3, height, width)
    ours = np.array([random_resized_box(rng, (width, height)) for _ in range(4000)])
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.25, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width → x, y, width, height

    def describe(boxes):
        x, y, w, h = boxes.T
        room_x, room_y = np.maximum(width - w, 1), np.maximum(height - h, 1)
        return {"area": w * h, "ratio": w / h, "x": x / room_x, "y": y / room_y, "left": x, "top": y}

    ours_described, theirs_described = describe(ours), describe(theirs)
    for name, values in ours_described.items():
        assert ks_2samp(values, theirs_described[name]).pvalue > 1e-3, name


@pytest.mark.parametrize("area, ratio", [((0.25, 1.0), (3 / 4, 4 / 3)), ((0.1, 0.3), (0.5, 2.0))])
def test_boxes_keep_their_bounds(area, ratio):
    rng, (width, height) = np.random.default_rng(1), (340, 256)
    boxes = np.array([random_resized_box(rng, (width, height), area, ratio) for _ in range(3000)])
    x, y, w, h = boxes.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= width).all() and (y + h <= height).all()
    share, aspect = w * h / (width * height), w / h
    assert share.min() >= area[0] - 0.01 and share.max() <= area[1] + 0.01 and np.ptp(share) > 0.9 * np.ptp(area)
    assert aspect.min() > ratio[0] * 0.97 and aspect.max() < ratio[1] * 1.03
    assert (x + w == width).any() and (y + h == height).any() and (x == 0).any() and (y == 0).any()


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000), (300, 40), (1, 1), (2, 9)])
def test_a_frame_that_no_box_fits_gives_the_largest_centred_one(width, height):
    """torchvision's fall-back, by an area that is never reached."""
    rng = np.random.default_rng(0)
    top, left, h, w = RandomResizedCrop.get_params(torch.zeros(3, height, width), (1.5, 1.6), (3 / 4, 4 / 3))
    assert random_resized_box(rng, (width, height), (1.5, 1.6)) == (left, top, w, h)


def test_flips_only_where_allowed_and_half_of_the_time():
    frames, flipped = textured(2, 64, 96), 0
    plain, flipping = TrainAugmentation(32, "", False), TrainAugmentation(32, "", True)
    for seed in range(300):
        straight = plain(np.random.default_rng(seed), frames)
        maybe = flipping(np.random.default_rng(seed), frames)
        mirrored = not np.array_equal(maybe, straight)
        assert np.array_equal(maybe, straight[:, :, ::-1] if mirrored else straight)  # all frames or none
        flipped += mirrored
    assert 110 < flipped < 190


@pytest.mark.parametrize(
    "name, side, expected",
    [
        ("bikes.mp4", 64, (64, 88)),  # 128 x 176
        ("bikes.mp4", 100, (100, 137)),  # 137.5
        ("upright.mp4", 64, (82, 64)),  # 144 x 112; 82.3
        ("upright.mp4", 200, (257, 200)),  # growing; 257.1
        ("short.mp4", 96, (96, 96)),  # square
        ("small.mp4", 64, (64, 80)),  # as it is
    ],
)
def test_the_short_side_is_resized_and_the_long_one_keeps_the_ratio(clips, name, side, expected):
    frames = decode_all(clips[name])[:3]
    ours = short_side_resize(frames, side)
    assert ours.dtype == np.uint8 and ours.shape == (3, *expected, 3)
    for frame, got in zip(frames, ours):
        resized = torchvision_resize(
            torch.from_numpy(frame.copy()).permute(2, 0, 1), list(expected), InterpolationMode.BILINEAR, antialias=True
        )
        assert np.abs(got.astype(int) - resized.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize(
    "long, side, crops, offsets",
    [
        (341, 224, 3, [0, 58, 117]),
        (342, 224, 3, [0, 59, 118]),
        (224, 224, 3, [0, 0, 0]),
        (225, 224, 3, [0, 0, 1]),
        (341, 224, 1, [58]),
        (225, 224, 1, [0]),
        (300, 100, 5, [0, 50, 100, 150, 200]),
        (300, 100, 2, [0, 200]),
        (110, 100, 4, [0, 3, 6, 10]),
    ],
)
def test_crops_are_spread_along_the_long_side(long, side, crops, offsets):
    ramp = np.arange(long, dtype=np.int64)
    wide = np.broadcast_to(ramp[None, None, :, None], (2, side, long, 3))
    tall = np.broadcast_to(ramp[None, :, None, None], (2, long, side, 3))
    for number, offset in enumerate(offsets):
        across, down = (long_side_crop(frames, side, number, crops) for frames in (wide, tall))
        assert across.shape == down.shape == (2, side, side, 3)
        assert (across == ramp[offset : offset + side][None, None, :, None]).all()
        assert (down == ramp[offset : offset + side][None, :, None, None]).all()


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40)])
def test_a_square_smaller_than_the_short_side_is_central_across(height, width):
    frames = np.arange(height * width).reshape(1, height, width, 1).repeat(3, axis=3)
    for crop, offset in enumerate([0, 14, 28]):  # of 60 - 32 along the long side
        y, x = (offset, 4) if height > width else (4, offset)
        assert np.array_equal(long_side_crop(frames, 32, crop, 3), frames[:, y : y + 32, x : x + 32])
