"""Images of a report with what is marked on them, as data of the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.data.images import examples_at
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.source import Source
from hf_vlm.tasks.reports.parts import Case, Marks
from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.masks import render_mask
from hf_vlm.viz.sheets import in_colors

__all__ = ["CaseImages", "as_url", "view_of"]

SIDE = 320  # pixels of the longer side of a picture
QUALITY = 82
MIN_CONTEXT = 4  # sides of a box that a crop around it shows
MIN_FRACTION = 0.25  # of the image's longer side that a crop shows


class View(NamedTuple):
    """A part of an image as a picture; a point of the image is at (point - origin) * scale."""

    picture: Image.Image
    origin: NDArray[np.float64]  # x and y in pixels of the image
    scale: float


class CaseImages:
    """The images of cases, which are read from their source once, those of all cases together."""

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.examples: Mapping[int, dict[str, Any]] = examples_at(source, positions) if positions else {}

    def pictures(self, case: Case, position: int) -> list[tuple[str, str]]:
        """Pairs of a title and a picture, as a URL that holds its data: predicted and true marks, or the image alone.

        Args:
            position: The image's position in the source.
        """
        view = view_of(self.examples[position]["image"], case.focus)
        if case.predicted.boxes is None and case.predicted.segmentation is None:
            return [("", as_url(view.picture))]
        marks = {"predicted": case.predicted, "ground truth": case.truth}
        return [(title, as_url(_marked(view, marked))) for title, marked in marks.items()]


def view_of(image: Any, focus: Sequence[float] | None) -> View:
    """An encoded image as a picture of a report, or the part around `focus` (left, top, right, bottom), in pixels."""
    array, (height, width) = decode_image(image, at_least=None if focus is not None else (SIDE, SIDE))
    picture = Image.fromarray(in_colors(array))
    side = float(max(height, width))
    if focus is not None:
        left, top, right, bottom = focus
        cropped = max(MIN_CONTEXT * max(right - left, bottom - top), MIN_FRACTION * side)
        if cropped < min(height, width) and side > SIDE:
            center = np.array([left + right, top + bottom]) / 2
            origin = np.clip((center - cropped / 2).round(), 0, np.array([width, height]) - cropped)
            size = (SIDE, SIDE)
            box = (*origin.tolist(), *(origin + cropped).tolist())
            return View(picture.resize(size, Image.Resampling.BICUBIC, box=box), origin, SIDE / cropped)
    size = max(1, round(width * SIDE / side)), max(1, round(height * SIDE / side))
    return View(picture.resize(size, Image.Resampling.BICUBIC), np.zeros(2), SIDE / side)


def _marked(view: View, marks: Marks) -> Image.Image:
    if marks.segmentation is not None:
        return render_mask(view.picture, marks.segmentation, background=marks.ignored)
    assert marks.boxes is not None
    boxes = (marks.boxes - np.tile(view.origin, 2)) * view.scale  # (n, 4)
    shown = ((boxes[:, 2:] > 0) & (boxes[:, :2] < view.picture.size)).all(axis=1)
    indices = np.flatnonzero(shown).tolist()
    return render_detections(
        view.picture,
        boxes[shown],
        [marks.names[index] for index in indices],
        scores=None if marks.scores is None else [marks.scores[index] for index in indices],
        class_ids=[marks.class_ids[index] for index in indices],
        scale=1,
    )


def as_url(picture: Image.Image) -> str:
    """A picture as a URL that holds its data."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
