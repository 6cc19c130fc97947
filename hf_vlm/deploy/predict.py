"""Predictions of a trained model of any task on images from anywhere."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.data.images import ImageLike, expand_images, load_image
from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.masks import render_mask
from hf_vlm.viz.sheets import captioned, legend, stacked

if TYPE_CHECKING:
    import torch

    from hf_vlm.features.loading import LoadedModel

__all__ = ["Prediction", "Predictor"]

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
        segmentation: (height, width) class number of each pixel; None for tasks that do not classify pixels.
        path: Path of the image; None where it was not read from a file.
    """

    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    label_names: list[str]
    image_size: tuple[int, int]
    boxes: NDArray[np.float32] | None = None
    segmentation: NDArray[np.int64] | None = None
    path: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values: `detections` with boxes as in transformers' pipelines, or `classes` with
        their scores, or with the fractions of the image that they cover.
        """
        height, width = self.image_size
        value = "score" if self.segmentation is None else "fraction"
        entries: list[dict[str, Any]] = [
            {"label": name, "label_id": int(label), value: float(score)}
            for name, label, score in zip(self.label_names, self.labels, self.scores, strict=True)
        ]
        if self.boxes is not None:
            for entry, box in zip(entries, self.boxes, strict=True):
                entry["box"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), map(float, box), strict=True))
        what = "classes" if self.boxes is None else "detections"
        return {"path": self.path, "height": height, "width": width, what: entries}

    def draw(self, image: ImageLike | None = None, *, scale: int | None = None) -> Image.Image:
        """The image (read from its path by default) with boxes, names and scores rendered on it or below it, or in
        the colours of its pixels' classes, with these below it.

        Raises:
            ValueError: There is neither an image nor a path, or the image has another size.
        """
        source = self.path if image is None else image
        if source is None:
            raise ValueError("This prediction was not made from a file: give the image to render it on.")
        array = load_image(source, num_channels=3)
        if array.shape[:2] != self.image_size:
            raise ValueError(f"The image is {array.shape[:2]}, but the prediction was made on {self.image_size}.")
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


class Predictor:
    """A loaded model; `from_pretrained` loads one."""

    def __init__(self, loaded: "LoadedModel") -> None:
        from hf_vlm.tasks import TASKS

        self.model, self.processor = loaded.model.eval(), loaded.processor
        self.task = TASKS[loaded.entry.task]
        if self.task.post_process is None:
            raise ValueError(f"A model for {self.task.name} predicts no classes: fine-tune it (hf-vlm finetune).")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, device: "str | torch.device | None" = None) -> "Predictor":
        """Load a run's folder, or a model from the Hub.

        Args:
            device: Device to compute on; the accelerator by default where there is one, else the CPU.

        Raises:
            ValueError: There is no such model, it is not of this package, predicts nothing, or lacks weights.
        """
        # Importing torch and transformers takes seconds, which reading predictions should not cost.
        from hf_vlm.features.device import to_best_device
        from hf_vlm.features.loading import load_model

        predictor = cls(load_model(path_or_repo))
        to_best_device(predictor.model, device)
        return predictor

    def predict(
        self, images: ImageLike | Iterable[ImageLike], threshold: float | None = None, *, batch_size: int = 8
    ) -> list[Prediction]:
        """Predictions of images.

        Args:
            images: Paths (of files, of folders, or with wildcards), Pillow images, or arrays (height, width) or
                (height, width, channels) of uint8 with RGB colours; one or several.
            threshold: Lowest score to report, 0 to 1; by default the model's own (`score_threshold` of its image
                processor), and 0 for models with one class per image or pixel, of which the fraction of the image is
                the score.
            batch_size: Images that go through the model at a time.

        Returns:
            One prediction per image, in order; the files of folders and wildcards are sorted by name.

        Raises:
            ValueError: An image cannot be read or a path matches none.
        """
        import torch

        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; scores are from 0 to 1.")
        everything = list(expand_images(images))
        found: list[Prediction] = []
        with torch.inference_mode():
            for first in range(0, len(everything), batch_size):
                found += self._predict_batch(everything[first : first + batch_size], threshold)
        return found

    def _predict_batch(self, batch: Sequence[ImageLike], threshold: float | None) -> list[Prediction]:
        assert self.task.post_process is not None
        arrays = [load_image(image, num_channels=self.processor.num_channels) for image in batch]
        sizes = [(array.shape[0], array.shape[1]) for array in arrays]
        inputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")
        outputs = self.model(**inputs.to(self.model.device))
        results = self.task.post_process(self.processor, outputs, threshold=threshold, sizes=sizes, model=self.model)
        names = self.model.config.id2label
        return [
            Prediction(
                boxes=result["boxes"].float().cpu().numpy() if "boxes" in result else None,
                segmentation=result["segmentation"].cpu().numpy() if "segmentation" in result else None,
                scores=result["scores"].float().cpu().numpy(),
                labels=result["labels"].long().cpu().numpy(),
                label_names=[names[label] for label in result["labels"].tolist()],
                image_size=size,
                path=os.fspath(image) if isinstance(image, str | os.PathLike) else None,
            )
            for image, result, size in zip(batch, results, sizes, strict=True)
        ]
