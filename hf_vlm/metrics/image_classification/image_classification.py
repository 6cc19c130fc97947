"""`evaluate` module over `hf_vlm.metrics.classification_metrics`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.classification import classification_metrics

__all__ = ["ImageClassification"]


class ImageClassification(evaluate.Metric):
    """Accuracy, F1 and calibration of class probabilities; `compute` also takes class_names and per_class."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1, top-5 and balanced accuracy, macro F1 and expected calibration error.",
            citation="",
            inputs_description=classification_metrics.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(self, predictions: list[list[float]], references: list[int], **options: Any) -> dict[str, float]:
        return classification_metrics(predictions, references, **options)
