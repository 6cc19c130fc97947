"""Tracks by motion and appearance: one assignment per frame, by the likelihood of each match.

Motion is a Kalman filter of constant velocity per box with noise relative to the size of the box, as ByteTrack's
(arXiv 2110.06864). The noise of the velocity is four times as much as there, for cameras that shake, and that of
detections twice as much. Appearance is a moving average of features per track. The score of a match is the
log-likelihood of its box, plus the log of how much likelier the cosine of its features is between detections of one
object than of two, less a penalty for detections that are not sure. The ratio is learned from the matches so far, so
that features count as much as they tell objects apart, whatever encoder they are from; a limit of their distance, as
in BoT-SORT (arXiv 2206.14651), suits one encoder. The penalty replaces ByteTrack's second stage, which lets a sure
detection of another object take a track before the unsure one of its own is considered.
Only numpy and scipy are needed: the trackers of libraries keep their filters private.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from hf_vlm.metrics.detection_matches import box_ious

__all__ = ["AppearanceTracker", "TrackerSettings"]

Array = NDArray[Any]

# Standard deviations relative to the box: per frame, and of detections.
POSITION_NOISE, VELOCITY_NOISE, DETECTION_NOISE = 1 / 20, 1 / 40, 1 / 10
PRIOR_PAIRS, PRIOR_VARIANCE = 30, 0.1  # of cosines, before the first match: both kinds of pairs are alike
MIN_VARIANCE = 0.1  # added to the variance of each dimension of features, relative to their mean variance


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """How detections are associated with tracks.

    Args:
        threshold: Confidence from which a detection may begin a track, and counts as sure.
        max_missed: Frames without a detection after which a track ends.
        min_hits: Detections in a row after which a track gets its id; until then one miss ends it.
        min_score: Score of a match, in nats, above which a detection may continue a track: `Tracks.log_likelihood` of
            its box, plus `AppearanceModel.log_ratio` of its features, less the penalty.
        confidence_weight: Factor of the penalty, which is the log of threshold / confidence below the threshold. With
            10, a confidence of a fifth of the threshold is too little for any match by its box alone.
        momentum: Of the moving average of a track's features.
        max_crowding: IoU with another detection up to which a box's features are taken over into the average: of
            boxes that overlap more they are of both objects.
    """

    threshold: float = 0.5
    max_missed: int = 30
    min_hits: int = 2
    min_score: float = -16.0
    confidence_weight: float = 10.0
    momentum: float = 0.9
    max_crowding: float = 0.3


@dataclass
class Tracks:
    """All tracks as rows of arrays; boxes are (centre x, centre y, width, height) in pixels."""

    ids: Array  # (n,) int64, 0 until confirmed
    box: Array  # (n, 4)
    velocity: Array  # (n, 4), per frame
    variance: Array  # (n, 3, 4): of the box, of box and velocity together, of the velocity
    hits: Array  # (n,) int64, detections so far
    missed: Array  # (n,) int64, frames since the last one
    features: Array  # (n, dim), moving average; dim 0 without appearance

    @classmethod
    def begin(cls, boxes: Array, features: Array) -> "Tracks":
        """New tracks of detections, which may move in any direction."""
        number, size = len(boxes), np.tile(boxes[:, 2:], 2)
        variance = np.stack([(2 * POSITION_NOISE * size) ** 2, np.zeros_like(size), (10 * VELOCITY_NOISE * size) ** 2])
        counts = np.zeros(number, dtype=np.int64)
        return cls(
            counts, boxes, np.zeros_like(boxes), variance.transpose(1, 0, 2), counts + 1, counts.copy(), features
        )

    def select(self, rows: Array) -> "Tracks":
        return Tracks(*(getattr(self, field.name)[rows] for field in fields(self)))

    def extended(self, others: "Tracks") -> "Tracks":
        return Tracks(
            *(np.concatenate([getattr(one, field.name) for one in (self, others)]) for field in fields(self))
        )

    def predict(self) -> None:
        """One frame later."""
        size = np.tile(self.box[:, 2:], 2)
        own, joint, rate = self.variance.transpose(1, 0, 2).copy()
        self.box = self.box + self.velocity
        self.box[:, 2:] = np.maximum(self.box[:, 2:], 1.0)
        self.variance = np.stack(
            [
                own + 2 * joint + rate + (POSITION_NOISE * size) ** 2,
                joint + rate,
                rate + (VELOCITY_NOISE * size) ** 2,
            ],
            axis=1,
        )
        self.missed = self.missed + 1

    def log_likelihood(self, boxes: Array) -> Array:
        """(n, m) of detections (m, 4), relative to that of an exact detection of a track without uncertainty."""
        noise = (DETECTION_NOISE * np.tile(self.box[:, 2:], 2)) ** 2
        variance = self.variance[:, 0] + noise
        residual = boxes - self.box[:, None]  # (n, m, 4)
        spread = np.log(variance / noise).sum(axis=1)
        return -0.5 * ((residual**2 / variance[:, None]).sum(axis=2) + spread[:, None])

    def update(self, rows: Array, boxes: Array) -> None:
        """Correct tracks by the boxes of their detections."""
        own, joint, rate = self.variance[rows].transpose(1, 0, 2)
        total = own + (DETECTION_NOISE * np.tile(self.box[rows, 2:], 2)) ** 2
        gain, rate_gain = own / total, joint / total
        residual = boxes - self.box[rows]
        self.box[rows] += gain * residual
        self.velocity[rows] += rate_gain * residual
        self.variance[rows] = np.stack([(1 - gain) * own, (1 - gain) * joint, rate - rate_gain * joint], axis=1)
        self.hits[rows] += 1
        self.missed[rows] = 0


class AppearanceModel:
    """How much likelier a cosine of features is between detections of one object than of two, learned online.

    Features are standardised first: objects have their mean in common, and a few dimensions would outweigh the
    others. The cosines of both kinds of pairs are taken to be normally distributed with one variance, as in linear
    discriminant analysis: the log ratio is linear in the cosine.
    """

    def __init__(self) -> None:
        self.num_features = 0
        self.feature_sum: Array = np.zeros(1)
        self.feature_squares: Array = np.zeros(1)
        # Of pairs of one object, and of two objects.
        self.num_pairs = np.full(2, float(PRIOR_PAIRS))
        self.cosine_sum = np.zeros(2)
        self.cosine_squares = np.full(2, PRIOR_PAIRS * PRIOR_VARIANCE)

    def learn_features(self, features: Array) -> None:
        """Features (n, dim) of the detections of a frame."""
        self.num_features += len(features)
        self.feature_sum = self.feature_sum + features.sum(axis=0)
        self.feature_squares = self.feature_squares + (features**2).sum(axis=0)

    def learn_cosines(self, of_one: Array, of_two: Array) -> None:
        """Cosines of pairs of one object, (n,), and of two objects, (m,)."""
        for kind, cosines in enumerate((of_one, of_two)):
            self.num_pairs[kind] += len(cosines)
            self.cosine_sum[kind] += cosines.sum()
            self.cosine_squares[kind] += (cosines**2).sum()

    def cosines(self, first: Array, second: Array) -> Array:
        """(n, m) of standardised features, given (n, dim) and (m, dim)."""
        number = max(1, self.num_features)
        mean = self.feature_sum / number
        variance = np.maximum(self.feature_squares / number - mean**2, 0.0)
        scale = np.sqrt(variance + MIN_VARIANCE * variance.mean() + 1e-12)
        units = []
        for features in (first, second):
            standardised = (features - mean) / scale
            units.append(standardised / np.maximum(np.linalg.norm(standardised, axis=1, keepdims=True), 1e-9))
        return units[0] @ units[1].T

    def log_ratio(self, cosines: Array) -> Array:
        """Log of the ratio of both likelihoods; 0 while those of one object are not more alike than those of two."""
        mean = self.cosine_sum / self.num_pairs
        variance = (self.cosine_squares - self.num_pairs * mean**2).sum() / self.num_pairs.sum()
        return max(0.0, mean[0] - mean[1]) / variance * (cosines - mean.mean())


class AppearanceTracker:
    """Gives detections of one frame after the other the ids of their objects.

    Without features it tracks by motion alone.
    """

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        self.settings = settings or TrackerSettings()
        self.tracks: Tracks | None = None
        self.num_ids = 0
        self.is_first_frame = True
        self.appearance = AppearanceModel()

    def update(self, boxes: Array, scores: Array, features: Array | None = None) -> NDArray[np.int64]:
        """Ids of the detections of the next frame, from 1; 0 for those that belong to no confirmed track.

        Args:
            boxes: (n, 4) x1, y1, x2, y2 in pixels.
            scores: (n,) from 0 to 1, also below the threshold.
            features: (n, dim) of what each box shows, of any length.
        """
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        features = np.zeros((len(corners), 0)) if features is None else np.asarray(features, dtype=np.float64)
        centered = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        centered[:, 2:] = np.maximum(centered[:, 2:], 1.0)
        scores = np.asarray(scores)
        if self.tracks is None:
            self.tracks = Tracks.begin(centered[:0], features[:0])

        tracks = self.tracks
        tracks.predict()
        match_scores, cosines = self._match_scores(tracks, centered, features)
        doubt = np.log(np.maximum(self.settings.threshold / np.maximum(scores, 1e-9), 1.0))
        row_of = self._match(match_scores - self.settings.confidence_weight * doubt)
        matched = np.flatnonzero(row_of >= 0)
        if cosines is not None:
            self._learn(tracks, row_of, cosines)
            self._update_features(tracks, row_of, corners, features)
        tracks.update(row_of[matched], centered[matched])
        self._confirm(tracks)
        ids = np.zeros(len(corners), dtype=np.int64)
        ids[matched] = tracks.ids[row_of[matched]]
        new = np.flatnonzero((scores >= self.settings.threshold) & (row_of < 0))
        begun = Tracks.begin(centered[new], features[new])
        if self.is_first_frame:
            begun.ids[:] = self._new_ids(len(new))
            ids[new] = begun.ids
        self.is_first_frame = False
        limit = np.where(tracks.ids > 0, self.settings.max_missed, 0)
        self.tracks = tracks.select(tracks.missed <= limit).extended(begun)
        return ids

    def _match_scores(self, tracks: Tracks, centered: Array, features: Array) -> tuple[Array, Array | None]:
        """Scores (tracks, detections) of all matches, and the cosines of their features where they have any."""
        scores = tracks.log_likelihood(centered)
        if features.shape[1] == 0 or tracks.features.shape[1] != features.shape[1]:
            return scores, None
        self.appearance.learn_features(features)
        cosines = self.appearance.cosines(tracks.features, features)
        return scores + self.appearance.log_ratio(cosines), cosines

    def _match(self, scores: Array) -> Array:
        """The track of each detection, -1 for none, by the assignment with the highest sum of scores.

        A match that is not allowed counts as none.
        """
        gain = np.maximum(scores - self.settings.min_score, 0.0)  # (tracks, detections)
        rows, columns = linear_sum_assignment(gain, maximize=True)
        row_of = np.full(scores.shape[1], -1)
        row_of[columns] = np.where(gain[rows, columns] > 0, rows, -1)
        return row_of

    def _learn(self, tracks: Tracks, row_of: Array, cosines: Array) -> None:
        """Pairs of matches, and of their detections with the other tracks that have ids."""
        matched = np.flatnonzero(row_of >= 0)
        is_own = np.arange(len(tracks.ids))[:, None] == row_of[matched]
        is_other = ~is_own & (tracks.ids > 0)[:, None]
        self.appearance.learn_cosines(cosines[:, matched][is_own], cosines[:, matched][is_other])

    def _update_features(self, tracks: Tracks, row_of: Array, corners: Array, features: Array) -> None:
        overlap = box_ious(corners, corners)
        np.fill_diagonal(overlap, 0.0)
        is_clear = overlap.max(axis=1, initial=0.0) <= self.settings.max_crowding
        chosen = np.flatnonzero((row_of >= 0) & is_clear)
        rows, momentum = row_of[chosen], self.settings.momentum
        tracks.features[rows] = momentum * tracks.features[rows] + (1 - momentum) * features[chosen]

    def _confirm(self, tracks: Tracks) -> None:
        due = np.flatnonzero((tracks.ids == 0) & (tracks.hits >= self.settings.min_hits))
        tracks.ids[due] = self._new_ids(len(due))

    def _new_ids(self, number: int) -> Array:
        self.num_ids += number
        return np.arange(self.num_ids - number + 1, self.num_ids + 1)
