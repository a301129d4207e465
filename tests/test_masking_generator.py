"""Masks against their definition: exact counts, a brute-force loop for the object tokens, properties of the balance,
and the shares of hidden object tokens measured on the released code.
"""

from math import ceil, floor

import numpy as np
import pytest

from masking_generator import (
    MASK_TYPES,
    SUB_MASK_TYPES,
    MaskGenerator,
    num_masked,
    object_tokens,
    random_mask,
    trajectory_mask,
    tube_mask,
)
from object_overlay import ObjectOverlay

GRID = (8, 14, 14)  # 16 frames of 224 px


def random_boxes(rng, frames, height, width):
    """1 to 3 objects of 1 px to three frames in size, drifting inside and far outside the frame; int [K, T, 4]."""
    num = rng.integers(1, 4)
    centre = rng.uniform(-1, 2, (num, 1, 2)) * (width, height)
    centre = centre + np.cumsum(rng.normal(0, 0.05 * width, (num, frames, 2)), axis=1)
    size = np.exp(rng.uniform(0, np.log(3 * width), (num, 1, 2))) * np.exp(rng.normal(0, 0.1, (num, frames, 2)))
    return np.concatenate([np.rint(centre - size / 2), np.rint(centre + size / 2)], axis=2).astype(int)


def fixed_boxes(x1, y1, x2, y2, frames=16):
    """One object that stands still."""
    return np.tile(np.array([x1, y1, x2, y2]), (1, frames, 1))


def smile_boxes(rng, frames=16):
    """Two objects, as SMILE moves them."""
    overlay = ObjectOverlay((224, 224), None, motion="gaussian")
    return np.stack([overlay.draw_track(rng, frames)[0] for _ in range(2)])


COUNTS = [  # grid, ratio, hidden tokens of a step
    ((8, 14, 14), 0.8, 156), ((8, 14, 14), 0.9, 176), ((8, 14, 14), 0.75, 147), ((1, 3, 3), 0.5, 4),
    ((16, 24, 24), 0.8, 460), ((8, 7, 10), 0.7, 49), ((8, 14, 10), 0.7, 98), ((16, 6, 20), 0.9, 108),
    ((1, 2, 3), 0.5, 3),
]  # fmt: skip


@pytest.mark.parametrize("grid, ratio, count", COUNTS)
def test_number_of_hidden_tokens(grid, ratio, count):
    rng = np.random.default_rng(0)
    assert num_masked(grid, ratio) == grid[0] * count
    for mask in (random_mask(rng, grid, ratio), tube_mask(rng, grid, ratio)):
        assert mask.dtype == bool and mask.shape == (np.prod(grid),) and mask.sum() == grid[0] * count


def test_tube_is_constant_in_time_and_random_is_not():
    rng = np.random.default_rng(0)
    tube = tube_mask(rng, GRID, 0.8).reshape(GRID)
    assert (tube == tube[0]).all() and tube[0].sum() == 156
    assert not (random_mask(rng, GRID, 0.8).reshape(GRID) == tube[0]).all()


@pytest.mark.parametrize("draw", [random_mask, tube_mask])
def test_every_token_is_equally_likely(draw):
    rng, grid, draws = np.random.default_rng(0), (2, 5, 4), 4000
    share = np.mean([draw(rng, grid, 0.6) for _ in range(draws)], axis=0)
    assert np.abs(share - 0.6).max() < 5 * np.sqrt(0.6 * 0.4 / draws)


def brute_force_tokens(boxes, grid, patch_size, tubelet_size):
    """the recipe's definition, a loop a token: patches floor(min / patch) up to and including ceil(max / patch)."""
    t, h, w = grid
    under = np.zeros(grid, dtype=bool)
    for box in boxes:
        for step in range(t):
            of_step = box[step * tubelet_size : (step + 1) * tubelet_size]
            x1, y1 = min(b[0] for b in of_step), min(b[1] for b in of_step)
            x2, y2 = max(b[2] for b in of_step), max(b[3] for b in of_step)
            for row in range(floor(y1 / patch_size[0]), ceil(y2 / patch_size[0]) + 1):
                for column in range(floor(x1 / patch_size[1]), ceil(x2 / patch_size[1]) + 1):
                    if 0 <= row < h and 0 <= column < w:
                        under[step, row, column] = True
    return under


@pytest.mark.parametrize(
    "grid, patch_size, tubelet_size",
    [((8, 14, 14), (16, 16), 2), ((4, 7, 7), (16, 16), 2), ((3, 5, 9), (16, 8), 1), ((2, 6, 4), (14, 14), 4)],
)
def test_object_tokens_equal_a_loop(grid, patch_size, tubelet_size):
    rng = np.random.default_rng(0)
    size = grid[1] * patch_size[0], grid[2] * patch_size[1]
    for _ in range(60):
        boxes = random_boxes(rng, grid[0] * tubelet_size, *size)
        expected = brute_force_tokens(boxes.tolist(), grid, patch_size, tubelet_size)
        np.testing.assert_array_equal(object_tokens(boxes, grid, patch_size, tubelet_size), expected)


def check_balance(mask, under, grid, ratio, keep):
    """The order of balancing: tokens of the tube outside the objects first, objects only when these run out."""
    mask, hidden_positions = mask.reshape(grid), int(ratio * (grid[1] * grid[2]))
    outside, visible = mask[~under], under & ~mask
    exhausted = outside.all() or not outside.any()
    if keep is None:  # picked frame: all objects hidden except in one step, where they are wholly visible
        steps = np.flatnonzero(visible.any(axis=(1, 2)))
        assert exhausted or len(steps) == 0 or (len(steps) == 1 and (visible[steps[0]] == under[steps[0]]).all())
    else:
        assert visible.sum() == keep or (not outside.any() if visible.sum() > keep else outside.all())
    # Only one kind of flip happened, so one side still lies within the positions of a single tube.
    ever_hidden, ever_visible = (mask & ~under).any(axis=0).sum(), (~mask & ~under).any(axis=0).sum()
    assert exhausted or ever_hidden <= hidden_positions or ever_visible <= grid[1] * grid[2] - hidden_positions


@pytest.mark.parametrize("sub_type", SUB_MASK_TYPES)
@pytest.mark.parametrize("grid, ratio", [(GRID, 0.8), ((4, 7, 7), 0.9), ((8, 4, 9), 0.5), ((2, 2, 3), 0.75)])
def test_exact_counts_and_balance_on_random_trajectories(sub_type, grid, ratio):
    """10,000 trajectories a sub type over the four grids."""
    rng = np.random.default_rng(0)
    for _ in range(2500):
        boxes = random_boxes(rng, 2 * grid[0], 16 * grid[1], 16 * grid[2])
        mask = trajectory_mask(rng, boxes, grid, ratio, sub_type)
        assert mask.dtype == bool and mask.sum() == grid[0] * int(ratio * (grid[1] * grid[2]))
        under = object_tokens(boxes, grid, (16, 16), 2)
        check_balance(mask, under, grid, ratio, int(0.1 * under.sum()) if sub_type == "tube+traj_mask" else None)


@pytest.mark.parametrize("sub_type", SUB_MASK_TYPES)
def test_counts_in_extreme_positions(sub_type):
    rng = np.random.default_rng(0)
    everything, outside = fixed_boxes(-50, -50, 300, 300), fixed_boxes(-90, 400, -40, 500)
    for boxes in (everything, outside, np.concatenate([everything, outside]), np.zeros((0, 16, 4), dtype=int)):
        for ratio in (0.1, 0.8, 0.95):
            assert trajectory_mask(rng, boxes, GRID, ratio, sub_type).sum() == 8 * int(ratio * 196)
    assert object_tokens(everything, GRID, (16, 16), 2).all() and not object_tokens(outside, GRID, (16, 16), 2).any()
    mask = trajectory_mask(rng, outside, GRID, 0.8).reshape(GRID)
    assert (mask == mask[0]).all()  # a tube


@pytest.mark.parametrize(
    "sub_type, share, tolerance", [("tube+traj_mask", 0.90, 0.01), ("tube+picked_frame_visible", 0.87, 0.02)]
)
def test_share_of_object_tokens_hidden(sub_type, share, tolerance):
    """Measured on the released code, ratio .8, gaussian motion."""
    rng, hidden = np.random.default_rng(0), []
    for _ in range(1200):
        boxes = smile_boxes(rng)
        under = object_tokens(boxes, GRID, (16, 16), 2).reshape(-1)
        hidden.append(trajectory_mask(rng, boxes, GRID, 0.8, sub_type)[under].mean())
    assert abs(np.mean(hidden) - share) < tolerance


@pytest.mark.parametrize("unmask_ratio", [0.0, 0.1, 0.2, 0.5])
def test_unmask_ratio_sets_the_visible_object_tokens(unmask_ratio):
    boxes = fixed_boxes(40, 60, 100, 110)  # patches 2..7 × 3..7: 6 · 5 tokens a step
    mask = trajectory_mask(np.random.default_rng(0), boxes, GRID, 0.8, unmask_ratio=unmask_ratio)
    assert (~mask.reshape(GRID)[:, 3:8, 2:8]).sum() == int(unmask_ratio * 240)


def test_picked_frame_is_any_step():
    rng, boxes = np.random.default_rng(0), fixed_boxes(40, 60, 100, 110)
    draw = lambda: trajectory_mask(rng, boxes, GRID, 0.8, "tube+picked_frame_visible").reshape(GRID)
    visible = np.array([(~draw()[:, 3:8, 2:8]).all(axis=(1, 2)) for _ in range(800)])
    assert (visible.sum(axis=1) == 1).all()
    assert np.abs(visible.mean(axis=0) - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 800)


def test_object_tokens_are_drawn_alike_and_so_are_those_of_the_background():
    rng, boxes, draws = np.random.default_rng(0), fixed_boxes(40, 60, 100, 110), 2000
    under = object_tokens(boxes, GRID, (16, 16), 2).reshape(-1)
    share = np.mean([trajectory_mask(rng, boxes, GRID, 0.8) for _ in range(draws)], axis=0)
    of_background = (1248 - 216) / (1568 - 240)  # 24 of the 240 object tokens are visible
    for tokens, expected in ((under, 0.9), (~under, of_background)):
        assert np.abs(share[tokens] - expected).max() < 5 * np.sqrt(expected * (1 - expected) / draws)


def test_patch_and_tubelet_size_are_respected():
    grid, boxes = (4, 8, 16), fixed_boxes(40, 14, 60, 27, frames=4)
    rng = np.random.default_rng(0)
    mask = trajectory_mask(rng, boxes, grid, 0.8, unmask_ratio=0, patch_size=(14, 8), tubelet_size=1)
    assert mask.reshape(grid)[:, 1:3, 5:9].all() and mask.sum() == 4 * int(0.8 * 128)


def test_generator_equals_the_functions():
    boxes = smile_boxes(np.random.default_rng(5))
    for mask_type, expected in [
        ("random", random_mask(np.random.default_rng(3), GRID, 0.8)),
        ("tube", tube_mask(np.random.default_rng(3), GRID, 0.8)),
        ("tubelet", trajectory_mask(np.random.default_rng(3), boxes, GRID, 0.8, "tube+traj_mask", 0.3)),
    ]:
        masks = MaskGenerator(mask_type, GRID, 0.8, unmask_ratio=0.3)
        np.testing.assert_array_equal(masks(np.random.default_rng(3), boxes), expected)
    np.testing.assert_array_equal(masks.under(boxes), object_tokens(boxes, GRID, (16, 16), 2).reshape(-1))


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("sub_type", SUB_MASK_TYPES)
def test_seed_decides_the_mask(mask_type, sub_type):
    generator, boxes = MaskGenerator(mask_type, GRID, 0.8, sub_type), smile_boxes(np.random.default_rng(5))
    first, again, other = (generator(np.random.default_rng(seed), boxes) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any() and first.sum() == other.sum() == 1248


@pytest.mark.parametrize("ratio", [0.0, 0.004, 1.0, 1.5])
def test_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {ratio}"):
        MaskGenerator("tube", GRID, ratio)


def test_unknown_types_and_wrong_boxes_are_refused():
    with pytest.raises(ValueError, match="agnostic"):
        MaskGenerator("agnostic", GRID, 0.8)
    with pytest.raises(ValueError, match="tube[+]other"):
        MaskGenerator("tubelet", GRID, 0.8, "tube+other")
    with pytest.raises(ValueError, match="tube[+]other"):
        trajectory_mask(np.random.default_rng(0), fixed_boxes(0, 0, 9, 9), GRID, 0.8, "tube+other")
    with pytest.raises(ValueError, match="boxes"):
        MaskGenerator("tubelet", GRID, 0.8)(np.random.default_rng(0))
    with pytest.raises(ValueError, match="12"):
        object_tokens(fixed_boxes(0, 0, 50, 50, frames=12), GRID, (16, 16), 2)
