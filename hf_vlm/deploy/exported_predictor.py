"""Predictions of an exported model by its own runtime, which needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.runtime import POST_PROCESSING, RUNTIMES, Runtime, find_features

__all__ = ["ExportedPredictor", "has_runtime"]


def has_runtime(folder: str | Path) -> bool:
    """Whether a folder holds a model that is run without torch."""
    return any(Path(folder, name).is_file() for name in RUNTIMES)


class ExportedPredictor:
    """The `predict` of a [`Predictor`], for a folder that `hf-vlm export` wrote.

    Raises:
        ValueError: The folder holds no such model, its runtime is not installed, or it predicts no classes.
    """

    def __init__(self, folder: str | Path) -> None:
        self._runtime = Runtime(folder)
        if POST_PROCESSING[self._runtime.config["model_type"]] is find_features:
            raise ValueError(f"{folder} holds an encoder, which predicts no classes: export a fine-tuned model.")

    @property
    def score_threshold(self) -> float:
        """The threshold that is used where none is given."""
        return float(self._runtime.processor.get("score_threshold", 0.5))

    def predict(self, images: Sequence[NDArray[Any]], threshold: float | None = None) -> list[Prediction]:
        """Predictions of images.

        Args:
            images: RGB images (height, width, 3) of uint8.
            threshold: Lowest score to report, 0 to 1; by default the model's own.
        """
        return [Prediction(**self._runtime.predict(self._as_input(image), threshold)) for image in images]

    def _as_input(self, image: NDArray[Any]) -> NDArray[Any]:
        return image if self._runtime.num_channels == 3 else np.array(Image.fromarray(image).convert("L"))[..., None]
