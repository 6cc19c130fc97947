"""`evaluate` module over `hf_vlm.metrics.coco_instance_metrics`."""

from typing import Any

import datasets
import evaluate

from hf_vlm.metrics.instance_segmentation import coco_instance_metrics, encode_masks

__all__ = ["CocoInstanceSegmentation"]


class CocoInstanceSegmentation(evaluate.Metric):
    """COCO mask, boundary and box AP and AR; `compute` also takes class_names and the other options."""

    def _info(self) -> evaluate.MetricInfo:
        masks = datasets.List({"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")})
        boxes = datasets.List(datasets.List(datasets.Value("float64"), length=4))
        numbers, labels = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("int64"))
        objects = {"masks": masks, "labels": labels, "boxes": boxes}
        return evaluate.MetricInfo(
            description="COCO average precision and recall of predicted masks, their boundaries and boxes.",
            citation="",
            inputs_description=coco_instance_metrics.__doc__,
            features=datasets.Features(
                {
                    "predictions": {**objects, "scores": numbers},
                    "references": {**objects, "area": numbers, "iscrowd": labels},
                }
            ),
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    # The features must name every key an entry may have, and evaluate rejects an entry that lacks one.
    def add(self, *, prediction: dict[str, Any], reference: dict[str, Any], **inputs: Any) -> None:
        """Add one image."""
        super().add(prediction=_complete(prediction, "scores"), reference=_complete(reference), **inputs)

    def add_batch(self, *, predictions: list[dict[str, Any]], references: list[dict[str, Any]], **inputs: Any) -> None:
        """Add a list of images."""
        super().add_batch(
            predictions=[_complete(entry, "scores") for entry in predictions],
            references=[_complete(entry) for entry in references],
            **inputs,
        )

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]], **options: Any
    ) -> dict[str, float]:
        return coco_instance_metrics(predictions, references, **options)


def _complete(entry: dict[str, Any], *required: str) -> dict[str, Any]:
    optional = {} if required else {"area": None, "iscrowd": None}
    masks = entry["masks"]
    encoded = masks if len(masks) == 0 or isinstance(masks[0], dict) else encode_masks(masks)
    return {"boxes": None, **optional, **entry, "masks": list(encoded)}
