"""What a model predicts on an image, in numpy and Pillow: this file imports neither torch nor transformers."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.deploy.runtime import DECIMALS

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
        path: Path of the image, or of its video; None where it was not read from a file.
        frame: Position of the image in its video, from 0; None for single images.
        seconds: Time of the frame since the beginning of its video; None for single images.
        track_ids: (n,) int64 numbers from 1, the same for an object in all frames of its video; None without tracking.
        appearance: (n, dim) float32 features of what the boxes show; None where they were not asked for.
    """

    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    label_names: list[str]
    image_size: tuple[int, int]
    boxes: NDArray[np.float32] | None = None
    masks: NDArray[np.bool_] | None = None
    segmentation: NDArray[np.int64] | None = None
    path: str | None = None
    frame: int | None = None
    seconds: float | None = None
    track_ids: NDArray[np.int64] | None = None
    appearance: NDArray[np.float32] | None = None

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
            track_ids=None if self.track_ids is None else self.track_ids[rows],
            appearance=None if self.appearance is None else self.appearance[rows],
            masks=None if self.masks is None else self.masks[rows],
        )

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values: `detections` with boxes as in transformers' pipelines, and masks as COCO's
        run lengths, or `classes` with their scores, or with the fractions of the image that they cover. Scores have
        four decimals, and boxes hundredths of a pixel.
        """
        from hf_vlm.data.segmentations import encode_mask

        height, width = self.image_size
        value = "score" if self.segmentation is None else "fraction"
        entries: list[dict[str, Any]] = [
            {"label": name, "label_id": int(label), value: round(float(score), DECIMALS[value])}
            for name, label, score in zip(self.label_names, self.labels, self.scores, strict=True)
        ]
        if self.boxes is not None:
            for entry, box in zip(entries, self.boxes.astype(float).round(DECIMALS["box"]).tolist(), strict=True):
                entry["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        if self.track_ids is not None:
            for entry, track_id in zip(entries, self.track_ids.tolist(), strict=True):
                entry["track_id"] = track_id
        if self.masks is not None:
            for entry, mask in zip(entries, self.masks, strict=True):
                entry["mask"] = encode_mask(mask, offset=(0, 0), size=self.image_size)
        what = "classes" if self.boxes is None else "detections"
        moment: dict[str, Any] = {}
        if self.frame is not None:
            moment = {"frame": self.frame, "seconds": None if self.seconds is None else round(self.seconds, 3)}
        return {"path": self.path, **moment, "height": height, "width": width, what: entries}

    def to_coco(self, *, image_id: int) -> list[dict[str, Any]]:
        """The detections as COCO's annotations: `bbox` is [x, y, width, height] in pixels, `category_id` the class,
        `segmentation` the run lengths of the mask where there is one.

        They have scores, as COCO's results have, so that `pycocotools` and its like load them with `loadRes`.

        Raises:
            ValueError: The task has no boxes.
        """
        from hf_vlm.data.segmentations import encode_mask

        corners = self._boxes("COCO's annotations").astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)  # (n, 4) x, y, w, h
        boxes = boxes.round(DECIMALS["box"])
        annotations: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": box,
                "area": round(box[2] * box[3], DECIMALS["box"]),
                "iscrowd": 0,
                "score": round(score, DECIMALS["score"]),
            }
            for label, box, score in zip(self.labels.tolist(), boxes.tolist(), self.scores.tolist(), strict=True)
        ]
        if self.masks is not None:
            for annotation, mask in zip(annotations, self.masks, strict=True):
                annotation["segmentation"] = encode_mask(mask, offset=(0, 0), size=self.image_size)
                annotation["area"] = int(mask.sum())
        if self.track_ids is not None:
            for annotation, track_id in zip(annotations, self.track_ids.tolist(), strict=True):
                annotation["track_id"] = track_id
        return annotations

    def to_yolo(self, *, with_scores: bool = False) -> list[str]:
        """The detections as lines of a label file of YOLO: class, centre x, centre y, width, height, in fractions.

        Args:
            with_scores: Whether each line ends with the score. Such a line is no label that can be trained on.

        Raises:
            ValueError: The task has no boxes.
        """
        height, width = self.image_size
        corners = self._boxes("YOLO's labels").astype(np.float64) / [width, height, width, height]
        low, high = corners[:, :2], corners[:, 2:]
        rows = np.concatenate([(low + high) / 2, high - low], axis=1)  # (n, 4) cx, cy, w, h
        if with_scores:
            rows = np.concatenate([rows, self.scores[:, None]], axis=1)
        return [
            " ".join([str(label), *(f"{value:.6f}" for value in row)])
            for label, row in zip(self.labels.tolist(), rows.tolist(), strict=True)
        ]

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`, with `class_name` in their data and their `tracker_id`.

        Raises:
            ValueError: The task has no boxes, or supervision is not installed.
        """
        boxes = self._boxes("supervision's detections")
        try:
            import supervision
        except ImportError as error:
            raise ValueError('supervision is not installed: pip install "hf_vlm[track]"') from error
        return supervision.Detections(
            xyxy=boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            tracker_id=None if self.track_ids is None else self.track_ids.astype(int),
            data={"class_name": np.array(self.label_names, dtype=object)},
        )

    def _boxes(self, what: str) -> NDArray[np.float32]:
        if self.boxes is None:
            raise ValueError(f"{what} are boxes, which this model does not predict.")
        return self.boxes

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

        source = (self.path if self.frame is None else None) if image is None else image
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
