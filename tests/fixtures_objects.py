"""Object images for the tests of the overlay, and the limit of their statistics."""

import numpy as np
from PIL import Image

P_VALUE = 1e-4  # all seeds are fixed: a test passes always or never


def write(folder, name, content):
    """Save bytes, or an array as an image, as `folder`/`name`; returns the path as str."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)
    return str(path)


def solid(*rgba, size=(60, 40)):
    """One-coloured RGBA image, size (w, h)."""
    return np.tile(np.array(rgba, dtype=np.uint8), (size[1], size[0], 1))


def noise(rng, *shape):
    """uint8 frames."""
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
