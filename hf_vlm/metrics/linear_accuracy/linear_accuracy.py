"""`evaluate` module over `hf_vlm.metrics.linear_accuracy`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.probe import linear_accuracy

__all__ = ["LinearAccuracy"]


class LinearAccuracy(evaluate.Metric):
    """Accuracy on test features (predictions) and labels (references); also takes inverse_regularization, max_iter."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of a logistic regression over frozen, standardised features.",
            citation="",
            inputs_description=linear_accuracy.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
            reference_urls=[
                "https://scikit-learn.org/stable/modules/generated/sklearn.linear_model.LogisticRegression.html"
            ],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[int],
        train_features: Any,
        train_labels: Any,
        **options: Any,
    ) -> dict[str, float]:
        return {"linear_accuracy": linear_accuracy(train_features, train_labels, predictions, references, **options)}
