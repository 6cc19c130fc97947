"""`evaluate` module over `hf_vlm.metrics.segmentation_metrics`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.segmentation import segmentation_metrics

__all__ = ["SemanticSegmentation"]


class SemanticSegmentation(evaluate.Metric):
    """Mean IoU and accuracies of maps of classes; `compute` also takes num_classes and the other options."""

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union, mean accuracy of the classes and accuracy of the pixels.",
            citation="",
            inputs_description=segmentation_metrics.__doc__,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(self, predictions: list[Any], references: list[Any], **options: Any) -> dict[str, float]:
        return segmentation_metrics(predictions, references, **options)
