"""Tracks by motion and appearance: ByteTrack's two stages of association, with BoT-SORT's fusion of both distances.

Motion is a Kalman filter of constant velocity per box, with noise relative to the size of the box: of the position
that of ByteTrack (arXiv 2110.06864), of the velocity four times as much, for cameras that shake. Appearance is a
moving average of features per track, compared where motion allows the match (BoT-SORT, arXiv 2206.14651, equation 13).
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

POSITION_NOISE, VELOCITY_NOISE = 1 / 20, 1 / 40  # standard deviations relative to the box, per frame
IMPOSSIBLE = 1e6  # cost of a match that is not allowed


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """How detections are associated with tracks.

    Args:
        threshold: Score from which a detection may begin a track, and is matched first.
        max_missed: Frames without a detection after which a track ends.
        min_hits: Detections in a row after which a track gets its id; until then one miss ends it.
        min_iou: Overlap with the predicted box from which a detection may continue a track.
        min_low_iou: The same for detections below the threshold, in the second stage.
        max_appearance_distance: Distance, (1 - cosine) / 2, below which appearance counts.
        growth: By how much of its size, on each side, the region grows per missed frame in which a detection that
            looks alike may continue a track.
        max_growth: Upper bound of that.
        momentum: Of the moving average of a track's features.
        max_crowding: IoU with another detection up to which a box's features are taken over into the average: of
            boxes that overlap more they are of both objects.
    """

    threshold: float = 0.5
    max_missed: int = 30
    min_hits: int = 2
    min_iou: float = 0.2
    min_low_iou: float = 0.2
    max_appearance_distance: float = 0.25
    growth: float = 0.1
    max_growth: float = 2.0
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

    def update(self, rows: Array, boxes: Array) -> None:
        """Correct tracks by the boxes of their detections."""
        own, joint, rate = self.variance[rows].transpose(1, 0, 2)
        total = own + (POSITION_NOISE * np.tile(self.box[rows, 2:], 2)) ** 2
        gain, rate_gain = own / total, joint / total
        residual = boxes - self.box[rows]
        self.box[rows] += gain * residual
        self.velocity[rows] += rate_gain * residual
        self.variance[rows] = np.stack([(1 - gain) * own, (1 - gain) * joint, rate - rate_gain * joint], axis=1)
        self.hits[rows] += 1
        self.missed[rows] = 0


class AppearanceTracker:
    """Gives detections of one frame after the other the ids of their objects.

    Without features it tracks by motion alone.
    """

    def __init__(self, settings: TrackerSettings | None = None) -> None:
        self.settings = settings or TrackerSettings()
        self.tracks: Tracks | None = None
        self.num_ids = 0
        self.is_first_frame = True
        self.feature_sum: Array | None = None  # over all detections so far: what features have in common
        self.num_features = 0

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
        high = np.flatnonzero(np.asarray(scores) >= self.settings.threshold)
        low = np.flatnonzero(np.asarray(scores) < self.settings.threshold)
        if self.tracks is None:
            self.tracks = Tracks.begin(centered[:0], features[:0])
        self._learn_center(features[high])

        tracks = self.tracks
        tracks.predict()
        ids = np.zeros(len(corners), dtype=np.int64)
        row_of = np.full(len(corners), -1)  # the track of each detection
        everyone = np.arange(len(tracks.ids))
        self._match(row_of, everyone, high, self._fused_cost(tracks, corners[high], features[high]))
        free = np.setdiff1d(everyone, row_of)
        distance = 1 - box_ious(_corners(tracks.box[free]), corners[low])
        self._match(row_of, free, low, np.where(distance <= 1 - self.settings.min_low_iou, distance, IMPOSSIBLE))

        matched = np.flatnonzero(row_of >= 0)
        tracks.update(row_of[matched], centered[matched])
        self._update_features(tracks, row_of, corners, features, high)
        self._confirm(tracks)
        ids[matched] = tracks.ids[row_of[matched]]
        new = high[row_of[high] < 0]
        begun = Tracks.begin(centered[new], features[new])
        if self.is_first_frame:
            begun.ids[:] = self._new_ids(len(new))
            ids[new] = begun.ids
        self.is_first_frame = False
        limit = np.where(tracks.ids > 0, self.settings.max_missed, 0)
        self.tracks = tracks.select(tracks.missed <= limit).extended(begun)
        return ids

    def _match(self, row_of: Array, rows: Array, detections: Array, cost: Array) -> None:
        """Note the track of each detection by the assignment of least cost (tracks, detections)."""
        for row, column in zip(*linear_sum_assignment(np.minimum(cost, 2.0)), strict=True):
            if cost[row, column] < IMPOSSIBLE:
                row_of[detections[column]] = rows[row]

    def _fused_cost(self, tracks: Tracks, corners: Array, features: Array) -> Array:
        """The lesser of the distances of boxes and of appearance, each where it allows the match."""
        settings = self.settings
        overlap = 1 - box_ious(_corners(tracks.box), corners)
        cost = np.where(overlap <= 1 - settings.min_iou, overlap, IMPOSSIBLE)
        if features.shape[1] == 0 or tracks.features.shape[1] != features.shape[1]:
            return cost
        margin = np.minimum(settings.growth * tracks.missed, settings.max_growth)[:, None]
        region = tracks.box * np.concatenate([np.ones_like(margin)] * 2 + [1 + 2 * margin] * 2, axis=1)
        is_near = box_ious(_corners(region), corners) > 0
        distance = (1 - self._cosine(tracks.features, features)) / 2
        is_alike = is_near & (distance < settings.max_appearance_distance)
        return np.minimum(cost, np.where(is_alike, distance, IMPOSSIBLE))

    def _learn_center(self, features: Array) -> None:
        if self.feature_sum is None:
            self.feature_sum = np.zeros(features.shape[1])
        self.feature_sum = self.feature_sum + features.sum(axis=0)
        self.num_features += len(features)

    def _cosine(self, first: Array, second: Array) -> Array:
        """(n, m) cosines of features relative to their mean, which all objects have in common."""
        assert self.feature_sum is not None
        center = self.feature_sum / max(1, self.num_features)
        unit = [
            x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (first - center, second - center)
        ]
        return unit[0] @ unit[1].T

    def _update_features(self, tracks: Tracks, row_of: Array, corners: Array, features: Array, high: Array) -> None:
        overlap = box_ious(corners, corners)
        np.fill_diagonal(overlap, 0.0)
        is_clear = overlap.max(axis=1, initial=0.0) <= self.settings.max_crowding
        chosen = high[(row_of[high] >= 0) & is_clear[high]]
        rows = row_of[chosen]
        momentum = self.settings.momentum
        tracks.features[rows] = momentum * tracks.features[rows] + (1 - momentum) * features[chosen]

    def _confirm(self, tracks: Tracks) -> None:
        due = np.flatnonzero((tracks.ids == 0) & (tracks.hits >= self.settings.min_hits))
        tracks.ids[due] = self._new_ids(len(due))

    def _new_ids(self, number: int) -> Array:
        self.num_ids += number
        return np.arange(self.num_ids - number + 1, self.num_ids + 1)


def _corners(boxes: Array) -> Array:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
