"""Tracked objects on the frames of a video: boxes in the colour of their track, and the way that each came."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.sheets import class_color

__all__ = ["TrackRenderer"]


class TrackRenderer:
    """Renders one frame after the other.

    Args:
        trail_length: Frames of which the centres of a box are joined into its trail.
    """

    def __init__(self, trail_length: int = 30) -> None:
        self.trail_length = trail_length
        self.trails: dict[int, deque[tuple[int, float, float]]] = {}  # of a track: frame, x, y
        self.frame = 0

    def render(
        self, image: NDArray[Any], boxes: Any, names: Sequence[str], track_ids: Any, *, scale: int | None = None
    ) -> Image.Image:
        """The next frame with its objects.

        Args:
            image: (height, width, 3) uint8 RGB.
            boxes: (n, 4) x1, y1, x2, y2 in pixels.
            names: n class names.
            track_ids: (n,) numbers of the tracks.
            scale: Whole factor by which the frame is enlarged, as of `render_detections`.
        """
        boxes, ids = np.asarray(boxes, dtype=float).reshape(-1, 4), [int(number) for number in track_ids]
        self.frame += 1
        for number, box in zip(ids, boxes, strict=True):
            trail = self.trails.setdefault(number, deque())
            trail.append((self.frame, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        self._forget()
        labels = [f"{name} {number}" for name, number in zip(names, ids, strict=True)]
        picture = render_detections(image, boxes, labels, class_ids=ids, scale=scale)
        factor, canvas = picture.width / image.shape[1], ImageDraw.Draw(picture)
        for number, trail in self.trails.items():
            points = [(x * factor, y * factor) for _, x, y in trail]
            if len(points) > 1:
                canvas.line(points, fill=class_color(number), width=max(2, round(max(picture.size) / 320)))
        return picture

    def _forget(self) -> None:
        for number, trail in list(self.trails.items()):
            while trail and trail[0][0] <= self.frame - self.trail_length:
                trail.popleft()
            if not trail:
                del self.trails[number]
