"""Predictions of a trained model of any task on images from anywhere."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_vlm.data.images import ImageLike, expand_images, load_image
from hf_vlm.data.tiles import OVERLAP, Tiling, merge_tiles
from hf_vlm.data.video import Frame, Video
from hf_vlm.deploy.prediction import Prediction

if TYPE_CHECKING:
    import torch

    from hf_vlm.features.loading import LoadedModel

__all__ = ["Prediction", "Predictor"]


class Predictor:
    """A loaded model; `from_pretrained` loads one."""

    def __init__(self, loaded: "LoadedModel") -> None:
        from hf_vlm.tasks import TASKS

        self.model, self.processor = loaded.model.eval(), loaded.processor
        self.task = TASKS[loaded.entry.task_in_use]
        if self.task.post_process is None:
            raise ValueError(f"A model for {self.task.name} predicts no classes: fine-tune it (hf-vlm finetune).")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, device: "str | torch.device | None" = None) -> "Predictor":
        """Load the folder of a run or of an export, or a model from the Hub.

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

    @property
    def score_threshold(self) -> float:
        """The threshold that is used where none is given and an image has several classes or objects."""
        return float(getattr(self.processor, "score_threshold", 0.5))

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float | None = None,
        *,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = OVERLAP,
        with_appearance: bool = False,
    ) -> list[Prediction]:
        """Predictions of images.

        Args:
            images: Paths (of files, of folders, or with wildcards), Pillow images, or arrays (height, width) or
                (height, width, channels) of uint8 with RGB colours; one or several.
            threshold: Lowest score to report, 0 to 1; by default the model's own (`score_threshold` of its image
                processor), and 0 for models with one class per image or pixel, of which the fraction of the image is
                the score.
            batch_size: Images, or tiles of one, that go through the model at a time.
            tile: Side in pixels of the tiles in which objects are looked for in images that are larger; by default an
                image is looked at whole, resized to what the model takes.
            overlap: Fraction of a tile's side that the next one repeats, at least: objects up to that size are seen
                whole by one of them.
            with_appearance: Whether boxes come with the features of what they show, of images that are not tiled.

        Returns:
            One prediction per image, in order; the files of folders and wildcards are sorted by name.

        Raises:
            ValueError: An image cannot be read, a path matches none, or the model finds no boxes but tiles are asked
                for.
        """
        import torch

        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; scores are from 0 to 1.")
        tiling = None if tile is None else Tiling(tile, overlap)
        everything = list(expand_images(images))
        found: list[Prediction] = []
        with torch.inference_mode():
            for first in range(0, len(everything), batch_size):
                batch = everything[first : first + batch_size]
                arrays = [load_image(image, num_channels=self.processor.num_channels) for image in batch]
                whole = [image for image in arrays if not _is_larger(image, tiling)]
                predicted = iter(self._predict_arrays(whole, threshold, with_appearance) if whole else [])
                for image, array in zip(batch, arrays, strict=True):
                    if tiling is not None and _is_larger(array, tiling):
                        prediction = self._predict_tiles(array, threshold, batch_size, tiling)
                    else:
                        prediction = next(predicted)
                    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
                    found.append(dataclasses.replace(prediction, path=path))
        return found

    def predict_video(
        self, video: Video, threshold: float | None = None, *, batch_size: int = 8, **options: Any
    ) -> Iterator[tuple[Frame, Prediction]]:
        """The frames of a video, each with its prediction; `batch_size` of them are in memory.

        Args:
            video: What `hf_vlm.data.video.open_video` returns.
            threshold: As for `predict`.
            batch_size: Frames that go through the model at a time.
            options: `tile`, `overlap` and `with_appearance` of `predict`.
        """
        for frames in _batched(video, batch_size):
            found = self.predict([frame.image for frame in frames], threshold, batch_size=batch_size, **options)
            for frame, prediction in zip(frames, found, strict=True):
                yield (
                    frame,
                    dataclasses.replace(prediction, path=video.path, frame=frame.index, seconds=frame.seconds),
                )

    def _predict_tiles(
        self, image: NDArray[Any], threshold: float | None, batch_size: int, tiling: Tiling
    ) -> Prediction:
        size = image.shape[0], image.shape[1]
        tiles = tiling.tiles(size)
        found: list[Prediction] = []
        for first in range(0, len(tiles), batch_size):
            windows = [np.ascontiguousarray(image[one.slices]) for one in tiles[first : first + batch_size]]
            found += self._predict_arrays(windows, threshold)
        if any(one.boxes is None for one in found):
            raise ValueError(f"tile is {tiling.side}, but tiles are for models that predict boxes; leave it out.")
        if any(one.masks is not None for one in found):
            raise ValueError(f"tile is {tiling.side}, but masks of objects are not merged from tiles; leave it out.")
        merged = merge_tiles([vars(one) for one in found], tiles, image_size=size)
        names = self.model.config.id2label
        return Prediction(
            scores=merged["scores"],
            labels=merged["labels"],
            label_names=[names[label] for label in merged["labels"].tolist()],
            image_size=size,
            boxes=merged["boxes"],
        )

    def _predict_arrays(
        self, arrays: Sequence[NDArray[Any]], threshold: float | None, with_appearance: bool = False
    ) -> list[Prediction]:
        assert self.task.post_process is not None
        sizes = [(array.shape[0], array.shape[1]) for array in arrays]
        inputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")
        from hf_vlm.features.boxes import appearance_features, recorded_maps

        with contextlib.ExitStack() as stack:
            maps = stack.enter_context(recorded_maps(self.model)) if with_appearance else []
            outputs = self.model(**inputs.to(self.model.device))
        results = self.task.post_process(self.processor, outputs, threshold=threshold, sizes=sizes, model=self.model)
        names, covered = self.model.config.id2label, self.processor.covered_size
        return [
            Prediction(
                boxes=result["boxes"].float().cpu().numpy() if "boxes" in result else None,
                masks=result["masks"].cpu().numpy() if "masks" in result else None,
                segmentation=result["segmentation"].cpu().numpy() if "segmentation" in result else None,
                scores=result["scores"].float().cpu().numpy(),
                labels=result["labels"].long().cpu().numpy(),
                label_names=[names[label] for label in result["labels"].tolist()],
                image_size=size,
                appearance=appearance_features(maps[-1][row], result["boxes"], covered(size)).cpu().numpy()
                if maps and "boxes" in result
                else None,
            )
            for row, (result, size) in enumerate(zip(results, sizes, strict=True))
        ]


def _is_larger(image: NDArray[Any], tiling: Tiling | None) -> bool:
    return tiling is not None and max(image.shape[:2]) > tiling.side


def _batched(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
