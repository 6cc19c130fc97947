"""Predictions of a trained model of any task on images from anywhere."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_vlm.data.images import ImageLike, expand_images, load_image
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
        self.task = TASKS[loaded.entry.task]
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
                masks=result["masks"].cpu().numpy() if "masks" in result else None,
                segmentation=result["segmentation"].cpu().numpy() if "segmentation" in result else None,
                scores=result["scores"].float().cpu().numpy(),
                labels=result["labels"].long().cpu().numpy(),
                label_names=[names[label] for label in result["labels"].tolist()],
                image_size=size,
                path=os.fspath(image) if isinstance(image, str | os.PathLike) else None,
            )
            for image, result, size in zip(batch, results, sizes, strict=True)
        ]
