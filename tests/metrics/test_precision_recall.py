"""The precision-recall curve and the best F1 against scikit-learn and a loop over all thresholds."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve as sklearn_curve

from hf_vlm.metrics.precision_recall import best_f1, operating_point, precision_recall_curve


def predictions(seed, num=200, num_values=40):
    """Scores, some of them equal, and whether the predictions are right: more often for higher ones."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, num_values, num) / num_values
    return scores, rng.random(num) < scores


def test_the_curve_is_that_of_scikit_learn():
    scores, is_right = predictions(0)
    curve = precision_recall_curve(scores, is_right, int(is_right.sum()))
    precision, recall, thresholds = sklearn_curve(is_right, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.thresholds, thresholds[::-1])
    np.testing.assert_allclose(curve.precision, precision[:-1][::-1])  # its last point is (1, 0), of no prediction
    np.testing.assert_allclose(curve.recall, recall[:-1][::-1])


def test_what_no_prediction_finds_lowers_recall():
    scores, is_right = predictions(1)
    curve, twice = (precision_recall_curve(scores, is_right, n * int(is_right.sum())) for n in (1, 2))
    np.testing.assert_allclose(twice.recall, curve.recall / 2)
    np.testing.assert_allclose(twice.precision, curve.precision)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_f1_is_that_of_a_loop(seed):
    scores, is_right = predictions(seed)
    num_relevant = int(is_right.sum()) + 30
    by_threshold = {}
    for threshold in {0.0, *scores.tolist()}:
        true, found = int(is_right[scores > threshold].sum()), int((scores > threshold).sum())
        by_threshold[threshold] = 2 * true / (found + num_relevant)
    best = best_f1(scores, is_right, num_relevant)
    assert best.f1 == pytest.approx(max(by_threshold.values()))
    assert not np.isin(best.threshold, scores)  # so that it does not matter whether equal scores are kept
    assert best == pytest.approx(operating_point(scores, is_right, num_relevant, best.threshold))


def test_nothing_right_and_nothing_to_find():
    scores = np.array([0.2, 0.7])
    nothing_right = best_f1(scores, np.zeros(2, dtype=bool), 3)
    assert (nothing_right.f1, nothing_right.recall) == (0, 0)
    assert np.isnan(
        [nothing_right.threshold, nothing_right.precision, *best_f1(scores, np.zeros(2, dtype=bool), 0)]
    ).all()
    assert best_f1(np.array([0.3]), np.array([True]), 1) == (0.15, 1, 1, 1)
