"""Objects of a video with numbers that stay the same from frame to frame."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_vlm.data.video import Frame, Video
from hf_vlm.deploy.appearance_tracker import AppearanceTracker, TrackerSettings
from hf_vlm.deploy.prediction import Prediction

if TYPE_CHECKING:
    from hf_vlm.deploy.predict import Predictor

__all__ = ["TRACKERS", "Tracker", "create_tracker", "track"]

TRACKERS = ("motion", "appearance", "bytetrack", "botsort", "ocsort")  # the last three are of the package trackers
DEFAULT_THRESHOLD = 0.5
LOW_SCORE = 0.2  # of the threshold: the score from which a detection may continue a track, as ByteTrack's 0.1 of 0.5

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Gives the detections of one frame after the other the ids of their objects."""

    def __call__(self, prediction: Prediction, image: NDArray[Any]) -> NDArray[np.int64]:
        """Ids (n,) of the detections of the next frame, from 1; 0 for those of no confirmed track."""
        ...


def create_tracker(name: str, *, threshold: float = 0.5, frame_rate: float = 30.0) -> Tracker:
    """A tracker by its name, which forgets objects that were not seen for a second.

    Args:
        name: `motion`; `appearance`, by motion and by features of what boxes show; or `bytetrack`, `botsort`
            or `ocsort` of the package trackers.
        threshold: Score from which a detection may begin a track. It replaces the libraries' own, which are for
            detectors whose scores are close to 1, and would track nothing of others.
        frame_rate: Frames per second that the tracker is given.

    Raises:
        ValueError: There is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"there is no tracker {name!r}; there are {', '.join(TRACKERS)}")
    if name in ("appearance", "motion"):
        own = AppearanceTracker(TrackerSettings(threshold=threshold, max_missed=max(1, round(frame_rate))))
        if name == "motion":
            return lambda prediction, image: own.update(prediction.boxes, prediction.scores)
        return lambda prediction, image: own.update(prediction.boxes, prediction.scores, prediction.appearance)
    return _library_tracker(name, threshold, frame_rate)


def _library_tracker(name: str, threshold: float, frame_rate: float) -> Tracker:
    try:
        import trackers
    except ImportError as error:
        raise ValueError(
            f'the tracker {name} is of the package trackers, which is not installed: pip install "hf_vlm[track]"'
        ) from error
    scores = {"track_activation_threshold": threshold, "high_conf_det_threshold": threshold}
    if name == "bytetrack":
        tracker = trackers.ByteTrackTracker(frame_rate=frame_rate, **scores)
    elif name == "botsort":
        tracker = trackers.BoTSORTTracker(frame_rate=frame_rate, **scores)
    else:
        tracker = trackers.OCSORTTracker(frame_rate=frame_rate, high_conf_det_threshold=threshold)

    def update(prediction: Prediction, image: NDArray[Any]) -> NDArray[np.int64]:
        detections = prediction.to_supervision()
        detections.data["row"] = np.arange(len(prediction))  # they may come back in another order, and fewer
        tracked = tracker.update(detections, frame=image if name == "botsort" else None)
        ids = np.zeros(len(prediction), dtype=np.int64)
        if len(tracked):
            ids[tracked.data["row"]] = tracked.tracker_id + 1  # theirs are from 0, and -1 for unconfirmed ones
        return ids

    return update


def track(
    predictor: "Predictor",
    video: Video,
    *,
    tracker: str = "appearance",
    threshold: float | None = None,
    batch_size: int = 8,
    **tiling: Any,
) -> Iterator[tuple[Frame, Prediction]]:
    """The frames of a video, each with the objects that are tracked in it and their `track_ids`.

    The class of an object is the one with the highest sum of scores so far in its track: trackers leave classes out
    of account, and a detector may be undecided.

    Args:
        predictor: A detector.
        video: What `hf_vlm.data.video.open_video` returns.
        tracker: Name of the tracker, as of `create_tracker`.
        threshold: Score from which a detection may begin a track; by default the model's own, else 0.5. A fifth of it
            is enough to continue one.
        batch_size: Frames that go through the model at a time.
        tiling: `tile` and `overlap` of `Predictor.predict`. Boxes of tiles have no appearance.

    Raises:
        ValueError: The model predicts no boxes, or the tracker is not there.
    """
    if threshold is None:
        threshold = getattr(predictor.processor, "score_threshold", None) or DEFAULT_THRESHOLD
    update = create_tracker(tracker, threshold=threshold, frame_rate=video.frame_rate / video.every)
    votes: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    has_warned = False
    options = {"batch_size": batch_size, "with_appearance": tracker == "appearance", **tiling}
    for frame, prediction in predictor.predict_video(video, LOW_SCORE * threshold, **options):
        if prediction.boxes is None:
            raise ValueError("this model predicts no boxes, which are what is tracked: give a detector")
        if tracker == "appearance" and prediction.appearance is None and not has_warned:
            logger.warning(
                "The boxes of this model, or of tiles, have no appearance: they are tracked by motion alone."
            )
            has_warned = True
        ids = update(prediction, frame.image)
        found = dataclasses.replace(prediction, track_ids=ids).select(ids > 0)
        yield frame, _with_voted_classes(found, votes, predictor.model.config.id2label)


def _with_voted_classes(
    prediction: Prediction, votes: dict[int, dict[int, float]], names: dict[int, str]
) -> Prediction:
    assert prediction.track_ids is not None
    labels = []
    for track_id, label, score in zip(
        prediction.track_ids.tolist(), prediction.labels.tolist(), prediction.scores.tolist(), strict=True
    ):
        of_track = votes[track_id]
        of_track[label] += score
        labels.append(max(of_track, key=lambda one: of_track[one]))
    return dataclasses.replace(
        prediction, labels=np.array(labels, dtype=np.int64), label_names=[names[label] for label in labels]
    )
