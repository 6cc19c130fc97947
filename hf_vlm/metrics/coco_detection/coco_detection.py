"""`evaluate` module over `hf_vlm.metrics.coco_detection_metrics`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.detection import coco_detection_metrics

__all__ = ["CocoDetection"]

_CITATION = """@inproceedings{lin2014coco,
  title={Microsoft COCO: Common objects in context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva
          and Doll{\\'a}r, Piotr and Zitnick, C Lawrence},
  booktitle={ECCV},
  year={2014}
}"""

_OPTIONAL = {"area": None, "iscrowd": None}


class CocoDetection(evaluate.Metric):
    """COCO box AP and AR; `compute` also takes num_classes or class_names, max_detections and per_class."""

    def _info(self) -> evaluate.MetricInfo:
        boxes = datasets.List(datasets.List(datasets.Value("float64"), length=4))
        numbers = datasets.List(datasets.Value("float64"))
        labels = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="COCO average precision and recall of predicted boxes (x1, y1, x2, y2 in pixels).",
            citation=_CITATION,
            inputs_description=coco_detection_metrics.__doc__,
            features=datasets.Features(
                {
                    "predictions": {"boxes": boxes, "scores": numbers, "labels": labels},
                    "references": {"boxes": boxes, "labels": labels, "area": numbers, "iscrowd": labels},
                }
            ),
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    # The features must name every key an entry may have, and evaluate rejects an entry that lacks one.
    def add(self, *, prediction: dict[str, Any], reference: dict[str, Any], **inputs: Any) -> None:
        """Add one image."""
        super().add(prediction=prediction, reference=_OPTIONAL | reference, **inputs)

    def add_batch(self, *, predictions: list[dict[str, Any]], references: list[dict[str, Any]], **inputs: Any) -> None:
        """Add a list of images."""
        super().add_batch(predictions=predictions, references=[_OPTIONAL | r for r in references], **inputs)

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]], **options: Any
    ) -> dict[str, float]:
        return coco_detection_metrics(predictions, references, **options)
