"""Metrics as plain functions; each folder here wraps one of them for `evaluate.load("<path of the folder>")`."""

from hf_vlm.metrics.classification import classification_metrics, confusion_matrix, multi_label_metrics
from hf_vlm.metrics.detection import CocoDetectionMetric, coco_detection_metrics
from hf_vlm.metrics.features import alignment, effective_rank, feature_std, mean_cosine, uniformity
from hf_vlm.metrics.instance_segmentation import CocoInstanceMetric, coco_instance_metrics
from hf_vlm.metrics.probe import knn_accuracy, linear_accuracy
from hf_vlm.metrics.segmentation import confusion_segmentation_metrics, pixel_confusion, segmentation_metrics

__all__ = [
    "CocoDetectionMetric",
    "CocoInstanceMetric",
    "alignment",
    "classification_metrics",
    "coco_detection_metrics",
    "coco_instance_metrics",
    "confusion_matrix",
    "confusion_segmentation_metrics",
    "effective_rank",
    "feature_std",
    "knn_accuracy",
    "linear_accuracy",
    "mean_cosine",
    "multi_label_metrics",
    "pixel_confusion",
    "segmentation_metrics",
    "uniformity",
]
