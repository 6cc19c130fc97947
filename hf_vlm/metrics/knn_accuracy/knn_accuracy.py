"""`evaluate` module over `hf_vlm.metrics.knn_accuracy`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.probe import knn_accuracy

__all__ = ["KnnAccuracy"]


class KnnAccuracy(evaluate.Metric):
    """Accuracy on test features (predictions) and labels (references); also takes num_neighbors, temperature."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Weighted nearest-neighbour accuracy of frozen features (DINO's protocol).",
            citation="",
            inputs_description=knn_accuracy.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2104.14294"],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[int],
        train_features: Any,
        train_labels: Any,
        **options: Any,
    ) -> dict[str, float]:
        return {"knn_accuracy": knn_accuracy(train_features, train_labels, predictions, references, **options)}
