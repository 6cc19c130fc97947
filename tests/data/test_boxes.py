import numpy as np
import pytest

from hf_vlm.data.boxes import MIN_BOX_SIDE, clean_boxes


def clean_one(box, width, height):
    """The rule in plain words, one box at a time."""
    x, y, w, h = (float(side) for side in box)
    if not all(np.isfinite([x, y, w, h])) or w <= 0 or h <= 0:
        return None
    left, right = max(x, 0.0), min(x + w, float(width))
    top, bottom = max(y, 0.0), min(y + h, float(height))
    if right - left < MIN_BOX_SIDE or bottom - top < MIN_BOX_SIDE:
        return None
    return [left, top, right - left, bottom - top]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([-1, -2, 3, 4], [0, 0, 2, 2]),
        ([8, 15, 5, 10], [8, 15, 2, 5]),
        ([-5, -5, 100, 100], [0, 0, 10, 20]),
        ([0, 0, 10, 20], [0, 0, 10, 20]),
        ([1, 1, 0, 4], None),
        ([1, 1, 4, -4], None),
        ([5, 5, -3, 4], None),
        ([10, 0, 5, 5], None),
        ([-5, 0, 5, 5], None),
        ([30, 30, 5, 5], None),
        ([np.nan, 0, 5, 5], None),
        ([0, 0, np.inf, 5], None),
        ([9.9999, 0, 5, 5], None),
    ],
)
def test_each_box(box, expected):
    clipped, keep = clean_boxes(np.array([box], dtype=np.float64), width=10, height=20)
    assert keep.tolist() == [expected is not None]
    np.testing.assert_allclose(clipped[0], expected or [0, 0, 0, 0], atol=1e-6)


def test_many_boxes_agree_with_the_rule():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-30, 60, (500, 4))
    clipped, keep = clean_boxes(boxes, width=40, height=25)
    assert clipped.dtype == np.float32
    expected = [clean_one(box, 40, 25) for box in boxes]
    assert keep.tolist() == [box is not None for box in expected]
    assert 50 < keep.sum() < 450
    np.testing.assert_allclose(clipped[keep], [box for box in expected if box is not None], rtol=1e-5, atol=1e-5)


def test_no_boxes():
    clipped, keep = clean_boxes(np.zeros((0, 4)), width=4, height=4)
    assert clipped.shape == (0, 4)
    assert keep.shape == (0,)
