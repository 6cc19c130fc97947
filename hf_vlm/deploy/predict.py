"""A trained detector on images from anywhere."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hf_vlm.viz.draw import render_detections

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

__all__ = ["ImageLike", "Prediction", "Predictor", "expand_images", "image_paths", "load_image"]

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """What was found in one image, best first.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels of the image.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64 class numbers.
        label_names: Their n names.
        image_size: Height and width of the image in pixels, after its orientation was applied.
        path: The file it came from, where it came from one.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    label_names: list[str]
    image_size: tuple[int, int]
    path: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """The prediction in values that JSON knows; boxes as `{"xmin", "ymin", "xmax", "ymax"}` as pipelines do."""
        detections = [
            {
                "label": name,
                "label_id": int(label),
                "score": float(score),
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(float, box), strict=True)),
            }
            for name, label, score, box in zip(self.label_names, self.labels, self.scores, self.boxes, strict=True)
        ]
        height, width = self.image_size
        return {"path": self.path, "height": height, "width": width, "detections": detections}

    def draw(self, image: ImageLike | None = None, *, scale: int | None = None) -> Image.Image:
        """The image, read again from its path where none is given, with boxes, names and scores on it.

        Raises:
            ValueError: Where there is neither an image nor a path, or the image has another size.
        """
        source = self.path if image is None else image
        if source is None:
            raise ValueError("This prediction was not made from a file: give the image to draw on.")
        array = load_image(source, num_channels=3)
        if array.shape[:2] != self.image_size:
            raise ValueError(f"The image is {array.shape[:2]}, but the prediction was made on {self.image_size}.")
        return render_detections(
            array, self.boxes, self.label_names, scores=self.scores, class_ids=self.labels, scale=scale
        )


class Predictor:
    """A detector with its image processor; `from_pretrained` loads both."""

    def __init__(self, model: "PreTrainedModel", processor: "BaseImageProcessor") -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, device: "str | torch.device | None" = None) -> "Predictor":
        """Load a run's folder, or a model from the Hub.

        Args:
            device: Where to compute; the accelerator by default where there is one, else the CPU.

        Raises:
            ValueError: Where there is no such model, it is no detector, or it lacks weights.
        """
        # Importing torch and transformers takes seconds, which reading predictions should not cost.
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        import hf_vlm.registry  # noqa: F401  the Auto classes have to know the package's classes
        from hf_vlm.features.device import to_best_device
        from hf_vlm.training.build import refuse_missing

        name = str(path_or_repo)
        try:
            model, report = AutoModelForObjectDetection.from_pretrained(name, output_loading_info=True)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be loaded as a detector: {_first_line(error)}") from error
        refuse_missing(name, report, "model")
        return cls(to_best_device(model, device), processor)

    def predict(
        self, images: ImageLike | Iterable[ImageLike], threshold: float = 0.5, *, batch_size: int = 8
    ) -> list[Prediction]:
        """Find objects in images.

        Args:
            images: Paths (of files, of folders, or with wildcards), Pillow images, or arrays (height, width) or
                (height, width, channels) of uint8 with RGB colours; one or several.
            threshold: Lowest score that counts, 0 to 1.
            batch_size: Images that go through the model at a time.

        Returns:
            One prediction an image, in order; folders and wildcards give their files by name.

        Raises:
            ValueError: Where an image cannot be read or a path matches none.
        """
        import torch

        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; scores are from 0 to 1.")
        everything = list(expand_images(images))
        found: list[Prediction] = []
        with torch.inference_mode():
            for first in range(0, len(everything), batch_size):
                found += self._predict_batch(everything[first : first + batch_size], threshold)
        return found

    def _predict_batch(self, batch: Sequence[ImageLike], threshold: float) -> list[Prediction]:
        arrays = [load_image(image, num_channels=self._num_channels) for image in batch]
        sizes = [array.shape[:2] for array in arrays]
        inputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")
        outputs = self.model(**inputs.to(self.model.device))
        results = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        names = self.model.config.id2label
        return [
            Prediction(
                boxes=result["boxes"].float().cpu().numpy(),
                scores=result["scores"].float().cpu().numpy(),
                labels=result["labels"].long().cpu().numpy(),
                label_names=[names[label] for label in result["labels"].tolist()],
                image_size=size,
                path=os.fspath(image) if isinstance(image, str | os.PathLike) else None,
            )
            for image, result, size in zip(batch, results, sizes, strict=True)
        ]

    @property
    def _num_channels(self) -> int:
        encoder = getattr(self.model.config, "backbone_config", None) or self.model.config
        return int(getattr(encoder, "num_channels", 3))


def image_paths(path: str | os.PathLike[str]) -> list[str]:
    """The image files of a folder (and those below it) or of wildcards, by name; a file or a URL is returned as it is.

    Raises:
        ValueError: Where there are none.
    """
    from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, find_images

    text = os.fspath(path)
    if "://" in text or os.path.isfile(text):
        return [text]
    if os.path.isdir(text):
        found = [str(file) for file in find_images(Path(text))]
    else:
        names = sorted(glob.glob(text, recursive=True))
        found = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
    if not found:
        raise ValueError(f"There are no images at {text!r}: give an image file, a folder of some, or wildcards.")
    return found


def expand_images(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """One image or several; paths of folders and with wildcards become those of their files, by name.

    Raises:
        ValueError: Where a path matches none.
    """
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
        images = [images]
    for image in images:
        if isinstance(image, str | os.PathLike):
            yield from image_paths(image)
        else:
            yield image


def _first_line(error: Exception) -> str:
    """transformers lists all the classes it knows below what it has to say."""
    return str(error).strip().split("\n")[0]


def load_image(image: ImageLike, *, num_channels: int) -> NDArray[Any]:
    """An image as (height, width, num_channels) uint8; only grey and RGB are turned into each other.

    Raises:
        ValueError: Where it cannot be read, or is an array of another type or of other channels.
    """
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim != 3 or array.dtype != np.uint8:
            raise ValueError(
                f"An image array has shape {image.shape} and type {image.dtype}; expected (height, width) or "
                "(height, width, channels) of uint8."
            )
        if array.shape[2] == num_channels:
            return array
        if array.shape[2] not in (1, 3) or num_channels not in (1, 3):
            raise ValueError(f"An image array has {array.shape[2]} channels, but the model takes {num_channels}.")
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    if isinstance(image, Image.Image):
        mode = "L" if num_channels == 1 else "RGB"
        array = np.array(ImageOps.exif_transpose(image).convert(mode))
        return array.reshape(*array.shape[:2], -1)
    from hf_vlm.data.io.decode import decode_image

    return decode_image(os.fspath(image), num_channels=num_channels)[0]
