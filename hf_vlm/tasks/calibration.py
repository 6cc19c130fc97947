"""What evaluation on held-out images sets in a model: the score threshold of the best F1, or a temperature."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from hf_vlm.data.io.durable import replace_text
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor

__all__ = ["Calibration", "threshold_of_best_f1"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Settings that follow from an evaluation: `config` of the model, `processor` of its image processor."""

    config: Mapping[str, float] = field(default_factory=dict)
    processor: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, float]:
        """All settings by name."""
        return {**self.config, **self.processor}

    def __bool__(self) -> bool:
        return bool(self.settings)

    def apply(self, model: PreTrainedModel, processor: VLMViTImageProcessor) -> None:
        """Set a model's settings in memory."""
        for owner, settings in ((model.config, self.config), (processor, self.processor)):
            for name, value in settings.items():
                setattr(owner, name, value)

    def store(self, folder: Path) -> None:
        """Set those of the model that is saved in a folder, whose other settings stay as they are.

        Raises:
            ValueError: The folder holds no model, or cannot be written.
        """
        for name, settings in ((CONFIG_NAME, self.config), (IMAGE_PROCESSOR_NAME, self.processor)):
            if settings:
                path = folder / name
                try:
                    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                    replace_text(path, json.dumps({**saved, **settings}, indent=2, sort_keys=True) + "\n")
                except OSError as error:
                    raise ValueError(
                        f"{', '.join(settings)} cannot be stored in {path}: {error.strerror}. Give a run's folder."
                    ) from error


def threshold_of_best_f1(metrics: Mapping[str, float]) -> Calibration:
    """The score threshold by the metric `score_threshold`; nothing where no prediction is right."""
    threshold = metrics.get("score_threshold", math.nan)
    return (
        Calibration(processor={"score_threshold": rounded(threshold)}) if math.isfinite(threshold) else Calibration()
    )


def rounded(value: float) -> float:
    """A value to four digits, as people read it."""
    return float(f"{value:.4g}")
