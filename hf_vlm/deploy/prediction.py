"""What a model predicts on an image, in numpy and Pillow: this file imports neither torch nor transformers."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from hf_vlm.data.images import ImageLike

__all__ = ["Prediction"]

MAX_NAMES_IN_CAPTION = 3


@dataclass(frozen=True)
class Prediction:
    """A model's predictions on one image, best first: detections, or classes of the whole image or of its pixels.

    Attributes:
        scores: (n,) float32, 0 to 1; of the classes of pixels, the fraction of the image that each covers.
        labels: (n,) int64 class numbers.
        label_names: n class names.
        image_size: Height and width of the image in pixels, after its orientation was applied.
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of the image; None for tasks without boxes.
        masks: (n, height, width) bool, the pixels of each object; None for tasks without masks of objects.
        segmentation: (height, width) class number of each pixel; None for tasks that do not classify pixels.
        path: Path of the image; None where it was not read from a file.
    """

    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    label_names: list[str]
    image_size: tuple[int, int]
    boxes: NDArray[np.float32] | None = None
    masks: NDArray[np.bool_] | None = None
    segmentation: NDArray[np.int64] | None = None
    path: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, rows: NDArray[Any]) -> "Prediction":
        """The detections of some rows, given by their numbers or by a mask, in that order."""
        rows = np.arange(len(self))[rows]
        return dataclasses.replace(
            self,
            scores=self.scores[rows],
            labels=self.labels[rows],
            label_names=[self.label_names[row] for row in rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            masks=None if self.masks is None else self.masks[rows],
        )

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values: `detections` with boxes as in transformers' pipelines, and masks as COCO's
        run lengths, or `classes` with their scores, or with the fractions of the image that they cover.
        """
        from hf_vlm.data.segmentations import encode_mask

        height, width = self.image_size
        value = "score" if self.segmentation is None else "fraction"
        entries: list[dict[str, Any]] = [
            {"label": name, "label_id": int(label), value: float(score)}
            for name, label, score in zip(self.label_names, self.labels, self.scores, strict=True)
        ]
        if self.boxes is not None:
            for entry, box in zip(entries, self.boxes, strict=True):
                entry["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), map(float, box), strict=True))
        if self.masks is not None:
            for entry, mask in zip(entries, self.masks, strict=True):
                entry["mask"] = encode_mask(mask, offset=(0, 0), size=self.image_size)
        what = "classes" if self.boxes is None else "detections"
        return {"path": self.path, "height": height, "width": width, what: entries}

    def draw(self, image: "ImageLike | None" = None, *, scale: int | None = None) -> Image.Image:
        """The image (read from its path by default) with masks, boxes, names and scores rendered on it or below it,
        or in the colours of its pixels' classes, with these below it.

        Raises:
            ValueError: There is neither an image nor a path, or the image has another size.
        """
        from hf_vlm.data.images import load_image
        from hf_vlm.viz.detections import render_detections
        from hf_vlm.viz.masks import render_mask, render_objects
        from hf_vlm.viz.sheets import captioned, legend, stacked

        source = self.path if image is None else image
        if source is None:
            raise ValueError("This prediction was not made from a file: give the image to render it on.")
        array = load_image(source, num_channels=3)
        if array.shape[:2] != self.image_size:
            raise ValueError(f"The image is {array.shape[:2]}, but the prediction was made on {self.image_size}.")
        if self.masks is not None:
            array = np.asarray(render_objects(Image.fromarray(array), self.masks, self.labels.tolist()))
        if self.boxes is not None:
            return render_detections(
                array, self.boxes, self.label_names, scores=self.scores, class_ids=self.labels, scale=scale
            )
        best = list(zip(self.label_names, self.scores, strict=True))[:MAX_NAMES_IN_CAPTION]
        picture = render_detections(array, [], [], scale=scale)  # enlarged as a picture with boxes is
        if self.segmentation is not None:
            names = legend(self.label_names, width=picture.width, class_ids=self.labels.tolist())
            return stacked(render_mask(picture, self.segmentation), names)
        return captioned(picture, ", ".join(f"{name}: {score:.2f}" for name, score in best) or "nothing")
