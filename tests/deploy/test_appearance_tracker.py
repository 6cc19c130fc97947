"""Motion equals a Kalman filter of matrices; appearance keeps the ids of objects that motion alone mixes up."""

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from hf_vlm.deploy.appearance_tracker import (
    DETECTION_NOISE,
    MIN_VARIANCE,
    POSITION_NOISE,
    PRIOR_PAIRS,
    PRIOR_VARIANCE,
    VELOCITY_NOISE,
    AppearanceModel,
    AppearanceTracker,
    TrackerSettings,
    Tracks,
)
from hf_vlm.metrics.detection_matches import box_ious

LOOKS = np.array([[4.0, 1.0, 0.0], [4.0, 0.0, 1.0], [4.0, -1.0, -1.0]])  # most of a feature is common to all


def boxes_at(*centers, side=10.0):
    return np.array([[x - side / 2, y - side / 2, x + side / 2, y + side / 2] for x, y in centers])


def test_motion_is_a_kalman_filter():
    generator = np.random.default_rng(0)
    box = np.array([50.0, 40.0, 20.0, 10.0])
    tracks = Tracks.begin(box[None], np.zeros((1, 0)))
    mean = np.concatenate([box, np.zeros(4)])
    size = np.tile(box[2:], 2)
    covariance = np.diag(np.concatenate([(2 * POSITION_NOISE * size) ** 2, (10 * VELOCITY_NOISE * size) ** 2]))
    step, observed = np.eye(8) + np.eye(8, k=4), np.eye(4, 8)
    for frame in range(8):
        noise = np.tile(mean[2:4], 4) * np.repeat([POSITION_NOISE, VELOCITY_NOISE], 4)
        mean, covariance = step @ mean, step @ covariance @ step.T + np.diag(noise**2)
        tracks.predict()
        error = np.diag((DETECTION_NOISE * np.tile(mean[2:4], 2)) ** 2)
        measured = box + frame + generator.normal(size=4)
        expected = multivariate_normal(observed @ mean, observed @ covariance @ observed.T + error).logpdf(measured)
        exact = multivariate_normal(measured, error).logpdf(measured)
        np.testing.assert_allclose(tracks.log_likelihood(measured[None]), [[expected - exact]], rtol=1e-9)
        if frame != 4:  # missed
            gain = covariance @ observed.T @ np.linalg.inv(observed @ covariance @ observed.T + error)
            mean, covariance = mean + gain @ (measured - observed @ mean), covariance - gain @ observed @ covariance
            tracks.update(np.array([0]), measured[None])
        np.testing.assert_allclose(np.concatenate([tracks.box[0], tracks.velocity[0]]), mean, rtol=1e-9)
        np.testing.assert_allclose(tracks.variance[0, 0], np.diag(covariance)[:4], rtol=1e-9)
        np.testing.assert_allclose(tracks.variance[0, 1], np.diag(covariance, k=4), rtol=1e-9)
        np.testing.assert_allclose(tracks.variance[0, 2], np.diag(covariance)[4:], rtol=1e-9)


def test_cosines_are_of_standardised_features():
    model, generator = AppearanceModel(), np.random.default_rng(0)
    frames = [generator.normal(3, [1, 5, 0.1], (n, 3)) for n in (4, 0, 7)]
    for features in frames:
        model.learn_features(features)
    everything = np.concatenate(frames)
    variance = everything.var(axis=0)
    scale = np.sqrt(variance + MIN_VARIANCE * variance.mean())
    for i, first in enumerate((everything[:2] - everything.mean(axis=0)) / scale):
        for j, second in enumerate((everything[3:6] - everything.mean(axis=0)) / scale):
            expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert model.cosines(everything[:2], everything[3:6])[i, j] == pytest.approx(expected, rel=1e-9)


def test_the_log_ratio_is_that_of_two_normal_distributions():
    model, generator = AppearanceModel(), np.random.default_rng(0)
    pairs = [generator.normal(0.6, 0.2, 500), generator.normal(-0.1, 0.3, 1500)]
    model.learn_cosines(pairs[0][:100], pairs[1][:0])
    model.learn_cosines(pairs[0][100:], pairs[1])
    prior = np.repeat([-1, 1], PRIOR_PAIRS // 2) * PRIOR_VARIANCE**0.5
    one, two = (np.concatenate([prior, of_kind]) for of_kind in pairs)
    deviation = np.concatenate([one - one.mean(), two - two.mean()]).std()
    new = np.linspace(-1, 1, 7)
    expected = norm(one.mean(), deviation).logpdf(new) - norm(two.mean(), deviation).logpdf(new)
    np.testing.assert_allclose(model.log_ratio(new), expected, rtol=1e-9)
    model.learn_cosines(np.full(9999, -0.5), np.zeros(0))  # those of one object are less alike
    assert not model.log_ratio(new).any()


def test_features_that_tell_nothing_apart_leave_tracks_to_motion():
    generator = np.random.default_rng(0)
    motion, appearance = AppearanceTracker(), AppearanceTracker()
    for frame in range(60):
        corners = boxes_at((50 + frame, 50), (100 - frame, 55), (60, 20 + frame), side=20)
        rows = np.flatnonzero(generator.uniform(size=3) > 0.2)
        boxes, scores = corners[rows] + generator.normal(size=(len(rows), 4)), generator.uniform(0.3, 1, len(rows))
        expected = motion.update(boxes, scores)
        assert appearance.update(boxes, scores, np.ones((len(rows), 3))).tolist() == expected.tolist()
    assert motion.num_ids > 2


def bounce(with_looks):
    """Ids, by object, before and after two objects meet and turn back, where their motion says that they go on."""
    tracker = AppearanceTracker()
    ids = []
    for frame in range(41):
        distance = 1.0 + 4 * abs(frame - 20)  # they overlap in the middle
        order = [0, 1] if frame % 2 else [1, 0]
        boxes = boxes_at((100 - distance, 50), (100 + distance, 50), side=20)[order]
        found = tracker.update(boxes, np.full(2, 0.9), LOOKS[order] if with_looks else None)
        ids.append(found[np.argsort(order)].tolist())
    return ids[5], ids[-1]


def test_appearance_keeps_ids_where_motion_swaps_them():
    before, after = bounce(with_looks=False)
    assert after == before[::-1]
    before, after = bounce(with_looks=True)
    assert after == before


def test_an_object_that_was_hidden_gets_its_id_back_by_its_look():
    for looks_again, expected in ((LOOKS[0], True), (LOOKS[2], False)):
        tracker = AppearanceTracker(TrackerSettings(min_hits=1))
        for _ in range(30):
            first, _ = tracker.update(boxes_at((20, 20), (80, 80)), np.full(2, 0.9), LOOKS[:2])
        for _ in range(8):
            tracker.update(boxes_at((80, 80)), np.full(1, 0.9), LOOKS[1:2])
        looks = np.stack([looks_again, LOOKS[1]])
        for _ in range(2):  # farther than motion alone would allow
            again, _ = tracker.update(boxes_at((40, 40), (80, 80)), np.full(2, 0.9), looks)
        assert bool(again == first) is expected


def test_the_assignment_is_the_best_of_all_that_are_allowed():
    generator = np.random.default_rng(0)
    tracker = AppearanceTracker(TrackerSettings(min_score=-10))
    for num_tracks, num_detections in ((3, 4), (4, 2), (3, 3), (0, 2), (2, 0)):
        scores = generator.uniform(-18, -2, (num_tracks, num_detections))
        choices = itertools.product([-1, *range(num_tracks)], repeat=num_detections)
        valid = [rows for rows in choices if len({row for row in rows if row >= 0}) == sum(row >= 0 for row in rows)]
        best = max(valid, key=lambda rows: sum(scores[row, i] + 10 for i, row in enumerate(rows) if row >= 0))
        assert tracker._match(scores).tolist() == list(best)


def test_an_unsure_detection_weighs_less_but_keeps_its_track_from_other_objects():
    def last_ids(*boxes, scores):
        tracker = AppearanceTracker()
        for _ in range(10):
            tracker.update(boxes_at((20, 20), side=20), np.array([0.9]))
        return tracker.update(boxes_at(*boxes, side=20), np.array(scores)).tolist()

    assert last_ids((22, 20), (20, 20), scores=[0.9, 0.3]) == [1, 0]
    assert last_ids((22, 20), (20, 20), scores=[0.9, 0.6]) == [0, 1]
    assert last_ids((32, 20), (20, 20), scores=[0.9, 0.4]) == [0, 1]  # alone, the first one would continue the track
    assert last_ids((32, 20), scores=[0.9]) == [1]


def test_weak_detections_continue_tracks_and_begin_none():
    tracker = AppearanceTracker(TrackerSettings(threshold=0.5))
    assert tracker.update(boxes_at((20, 20)), np.array([0.9])).tolist() == [1]
    assert tracker.update(boxes_at((80, 80), (21, 20)), np.array([0.3, 0.3])).tolist() == [0, 1]
    assert tracker.update(boxes_at((80, 80)), np.array([0.3])).tolist() == [0]
    assert tracker.update(boxes_at((80, 80)), np.array([0.8])).tolist() == [0]  # after the first frame, two in a row
    assert tracker.update(boxes_at((80, 80)), np.array([0.8])).tolist() == [2]


def test_tracks_end_and_frames_may_be_empty():
    tracker = AppearanceTracker(TrackerSettings(max_missed=3, min_hits=1))
    empty = np.zeros((0, 4))
    assert tracker.update(boxes_at((20, 20)), np.array([0.9]), LOOKS[:1]).tolist() == [1]
    for _ in range(3):
        assert tracker.update(empty, np.zeros(0), np.zeros((0, 3))).tolist() == []
    tracker.update(boxes_at((20, 20)), np.array([0.9]), LOOKS[:1])
    assert tracker.update(boxes_at((20, 20)), np.array([0.9]), LOOKS[:1]).tolist() == [1]
    for _ in range(4):
        tracker.update(empty, np.zeros(0), np.zeros((0, 3)))
    tracker.update(boxes_at((20, 20)), np.array([0.9]), LOOKS[:1])
    assert tracker.update(boxes_at((20, 20)), np.array([0.9]), LOOKS[:1]).tolist() == [2]


def test_overlap_equals_the_loop():
    generator = np.random.default_rng(0)
    first, second = (np.sort(generator.uniform(0, 9, (n, 2, 2)), axis=1).reshape(n, 4) for n in (4, 5))
    second[0] = second[0, [0, 1, 0, 1]]  # empty
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            width, height = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
            area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
            assert box_ious(first, second)[i, j] == pytest.approx(width * height / area)
