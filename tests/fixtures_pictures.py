"""What the tests of pictures share: texts must lie on the page and not on each other. PYTEST_DONT_REWRITE."""

from itertools import combinations
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def drawn_texts(figure):
    """Draw a figure; the texts that this drew (labels of ticks beyond the axes are not)."""
    found, draw = [], Text.draw

    def note(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found.append((text, text.get_window_extent(renderer)))

    with patch.object(Text, "draw", note):
        FigureCanvasAgg(figure).draw()
    return found


def check_texts(figure):
    """Every text of a figure lies inside of it and covers no other one, slanted ones aside. Returns them all."""
    found = drawn_texts(figure)
    boxes = [(text.get_text(), box) for text, box in found if text.get_rotation() in (0, 90)]
    assert boxes
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
    return [text.get_text() for text, _ in found]
