"""Metrics as plain functions; each folder here wraps one of them for `evaluate.load("<path of the folder>")`."""

from hf_vlm.metrics.calibration import fit_temperature
from hf_vlm.metrics.classification import classification_metrics, confusion_matrix, multi_label_metrics
from hf_vlm.metrics.detection import CocoDetectionMetric, coco_detection_metrics
from hf_vlm.metrics.detection_matches import detection_confusion, match_detections
from hf_vlm.metrics.features import alignment, effective_rank, feature_std, mean_cosine, uniformity
from hf_vlm.metrics.instance_segmentation import CocoInstanceMetric, coco_instance_metrics
from hf_vlm.metrics.precision_recall import best_f1, precision_recall_curve
from hf_vlm.metrics.probe import knn_accuracy, linear_accuracy
from hf_vlm.metrics.segmentation import confusion_segmentation_metrics, pixel_confusion, segmentation_metrics

__all__ = [
    "CocoDetectionMetric",
    "CocoInstanceMetric",
    "alignment",
    "best_f1",
    "classification_metrics",
    "coco_detection_metrics",
    "coco_instance_metrics",
    "confusion_matrix",
    "confusion_segmentation_metrics",
    "detection_confusion",
    "effective_rank",
    "feature_std",
    "fit_temperature",
    "knn_accuracy",
    "linear_accuracy",
    "match_detections",
    "mean_cosine",
    "multi_label_metrics",
    "pixel_confusion",
    "precision_recall_curve",
    "segmentation_metrics",
    "uniformity",
]
