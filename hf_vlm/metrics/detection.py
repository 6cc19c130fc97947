"""COCO average precision and recall of predicted boxes."""

from collections.abc import Sequence

from hf_vlm.metrics.coco import CocoMetric, Entry

__all__ = ["CocoDetectionMetric", "coco_detection_metrics"]


def coco_detection_metrics(
    predictions: Sequence[Entry],
    references: Sequence[Entry],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    max_detections: int = 100,
    per_class: bool = False,
) -> dict[str, float]:
    """COCO box AP and AR of `predictions` against `references`, one entry per image in the same order.

    The metrics are those of pycocotools (Lin et al. 2014, https://cocodataset.org/#detection-eval): AP is the mean of
    101 interpolated precisions, averaged over the IoU thresholds 0.50:0.05:0.95 and over the classes.

    Args:
        predictions: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `scores` (n,) and `labels` (n,) of each image.
        references: `boxes` and `labels` as above; optionally `area` (n,) in pixels (default: the box's) and `iscrowd`
            (n,), whose regions may be matched any number of times and count neither as found nor as missed.
        num_classes: Number of classes, where the classes have no names. Default: the labels that occur.
        class_names: Names of the classes 0, 1, ...; used for the keys of `per_class`.
        max_detections: Number of best-scored predictions that count, per image and class.
        per_class: Also return `ap/<class name>` of every class.

    Returns:
        `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar_1`, `ar_10`, `ar_<max_detections>`, `ar_small`,
        `ar_medium`, `ar_large`, each 0 to 1. A metric over no object at all is NaN (pycocotools returns -1), and a
        class without objects does not enter the mean; objects without predictions score 0.

    Raises:
        ValueError: The two lists differ in length, or boxes, scores or labels are malformed.
    """
    metric = CocoDetectionMetric(num_classes=num_classes, class_names=class_names, max_detections=max_detections)
    metric.add(predictions, references)
    return metric.compute(per_class=per_class)


class CocoDetectionMetric(CocoMetric):
    """Accumulates images by `add`, then computes the metrics of `coco_detection_metrics` over all of them."""

    def compute(self, *, per_class: bool = False) -> dict[str, float]:
        """The metrics over all images added so far, which are kept; see `coco_detection_metrics`."""
        return self._compute("bbox", per_class=per_class)
