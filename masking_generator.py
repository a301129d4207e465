"""Which tokens the student does not see: random, tube and trajectory masks.

One convention everywhere: a mask is boolean over the token grid (t, h, w), flattened to ``[N]`` in the
order time, row, column; **True = hidden from the encoder**. Every mask of a run hides exactly
``t * int(ratio * (h * w))`` tokens, so that the visible tokens of a batch form one tensor ``[B, N_visible, D]``.
Boxes come from object_overlay.py; nothing here knows pixels, files or torch.
"""

from dataclasses import dataclass

import numpy as np

MASK_TYPES = ("random", "tube", "tubelet")  # tubelet, the released name: trajectory_mask, which follows the objects
SUB_MASK_TYPES = ("tube+traj_mask", "tube+picked_frame_visible")


def num_masked(grid: tuple[int, int, int], ratio: float) -> int:
    """Number of hidden tokens of every mask: whole tubes, so rounded down per time step."""
    t, h, w = grid
    return t * int(ratio * (h * w))


def random_mask(rng: np.random.Generator, grid: tuple[int, int, int], ratio: float) -> np.ndarray:
    """Tokens drawn uniformly over space and time. Returns bool ``[N]``."""
    mask = np.zeros(int(np.prod(grid)), dtype=bool)
    mask[rng.permutation(mask.size)[: num_masked(grid, ratio)]] = True
    return mask


def tube_mask(rng: np.random.Generator, grid: tuple[int, int, int], ratio: float) -> np.ndarray:
    """One random set of positions, hidden at every time step (VideoMAE). Returns bool ``[N]``."""
    t, h, w = grid
    return np.tile(random_mask(rng, (1, h, w), ratio), t)


def object_tokens(
    boxes: np.ndarray, grid: tuple[int, int, int], patch_size: tuple[int, int], tubelet_size: int
) -> np.ndarray:
    """Tokens of the regions of the moving objects.

    A time step covers ``tubelet_size`` frames; an object's region in it spans its boxes in all of them,
    patches ``floor(min / patch)`` to ``ceil(max / patch)`` *inclusive*. The region therefore has one row
    and one column of patches more than the box touches, below and to the right, as in the released models.

    Args:
        boxes: ``[K, T, 4]`` x1, y1, x2, y2 in pixels; may lie partly or wholly outside the frame.
        grid: token grid (t, h, w).
        patch_size: (height, width) of a patch in pixels.
    Returns:
        bool ``[t, h, w]``.
    Raises:
        ValueError: T is not t * tubelet_size.
    """
    t, h, w = grid
    if boxes.shape[1] != t * tubelet_size:
        raise ValueError(f"boxes cover {boxes.shape[1]} frames, the token grid {t} x {tubelet_size}")
    steps = boxes.reshape(len(boxes), t, tubelet_size, 4)
    patch = np.array([patch_size[1], patch_size[0]])  # x, y
    first = np.floor(steps[..., :2].min(axis=2) / patch)[..., None]  # [K, t, 2, 1]
    last = np.ceil(steps[..., 2:].max(axis=2) / patch)[..., None]
    columns, rows = np.arange(w), np.arange(h)
    in_x = (columns >= first[:, :, 0]) & (columns <= last[:, :, 0])  # [K, t, w]
    in_y = (rows >= first[:, :, 1]) & (rows <= last[:, :, 1])  # [K, t, h]
    return (in_y[:, :, :, None] & in_x[:, :, None, :]).any(axis=0)


def trajectory_mask(
    rng: np.random.Generator,
    boxes: np.ndarray,
    grid: tuple[int, int, int],
    ratio: float,
    sub_type: str = "tube+traj_mask",
    unmask_ratio: float = 0.1,
    patch_size: tuple[int, int] = (16, 16),
    tubelet_size: int = 2,
) -> np.ndarray:
    """SMILE's mask: a tube mask that also hides the trajectories of the objects.

    ``tube+traj_mask`` leaves ``int(unmask_ratio * |O|)`` of the object tokens O visible, drawn uniformly;
    ``tube+picked_frame_visible`` leaves O visible in one time step. The count is then balanced to that of the
    tube mask with single tokens outside O, and inside O only when those run out. So the mask of
    the background changes over time, at about 40 % of its positions. The released models were trained that way.

    Args and returns: see object_tokens; bool ``[N]`` with exactly ``num_masked(grid, ratio)`` True.
    Raises:
        ValueError: unknown sub_type.
    """
    under = object_tokens(boxes, grid, patch_size, tubelet_size)  # [t, h, w]
    tokens = np.flatnonzero(under)
    mask = tube_mask(rng, grid, ratio)
    mask[tokens] = True
    if sub_type == "tube+traj_mask":
        mask[rng.permutation(tokens)[: int(unmask_ratio * tokens.size)]] = False
    elif sub_type == "tube+picked_frame_visible":
        step = rng.integers(grid[0])
        mask.reshape(grid)[step][under[step]] = False
    else:
        raise ValueError(f"unknown sub_mask_type {sub_type!r}, choose from {SUB_MASK_TYPES}")
    return _balance(rng, mask, under.reshape(-1), num_masked(grid, ratio))


def _balance(rng: np.random.Generator, mask: np.ndarray, under: np.ndarray, target: int) -> np.ndarray:
    """Flip random tokens until `target` are hidden; those where `under` is True only if no others are left."""
    surplus = int(mask.sum()) - target
    wrong = mask if surplus > 0 else ~mask  # the tokens that may flip
    order = np.concatenate(
        [rng.permutation(np.flatnonzero(wrong & ~under)), rng.permutation(np.flatnonzero(wrong & under))]
    )
    mask[order[: abs(surplus)]] ^= True
    return mask


@dataclass(frozen=True)
class MaskGenerator:
    """The masks of a run: checks the settings once, then draws one mask per clip.

    Raises:
        ValueError: a ratio that hides no token or every token, or an unknown type.
    """

    mask_type: str
    grid: tuple[int, int, int]
    ratio: float
    sub_type: str = "tube+traj_mask"
    unmask_ratio: float = 0.1
    patch_size: tuple[int, int] = (16, 16)
    tubelet_size: int = 2

    def __post_init__(self):
        if self.mask_type not in MASK_TYPES or self.sub_type not in SUB_MASK_TYPES:
            raise ValueError(
                f"unknown mask {self.mask_type!r} / {self.sub_type!r}: choose from {MASK_TYPES} / {SUB_MASK_TYPES}"
            )
        if not 0 < num_masked(self.grid, self.ratio) < np.prod(self.grid):
            raise ValueError(
                f"mask_ratio {self.ratio} hides {num_masked(self.grid, self.ratio)} of "
                f"{np.prod(self.grid)} tokens: some must be hidden and some visible"
            )

    def under(self, boxes: np.ndarray) -> np.ndarray:
        """Tokens under objects, bool ``[N]``, of their boxes ``[K, T, 4]``."""
        return object_tokens(boxes, self.grid, self.patch_size, self.tubelet_size).reshape(-1)

    def __call__(self, rng: np.random.Generator, boxes: np.ndarray | None = None) -> np.ndarray:
        """Draw a mask, bool ``[N]``; `boxes` ``[K, T, 4]`` are needed by mask_type `tubelet` only."""
        if self.mask_type == "random":
            mask = random_mask(rng, self.grid, self.ratio)
        elif self.mask_type == "tube":
            mask = tube_mask(rng, self.grid, self.ratio)
        elif boxes is None:
            raise ValueError("mask_type tubelet follows objects: it needs their boxes")
        else:
            size = self.patch_size, self.tubelet_size
            mask = trajectory_mask(rng, boxes, self.grid, self.ratio, self.sub_type, self.unmask_ratio, *size)
        assert mask.sum() == num_masked(self.grid, self.ratio), "the student relies on this number"
        return mask
