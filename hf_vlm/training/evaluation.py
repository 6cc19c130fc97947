"""Evaluators: each takes a model and a finite stream and returns name -> value, the same on all ranks."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.features.extraction import encode
from hf_vlm.metrics import coco_detection_metrics, knn_accuracy, linear_accuracy
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

MAX_DETECTIONS = 100  # COCO counts no more; kept boxes bound the memory


@torch.inference_mode()
def predict_detection(
    model: nn.Module, stream: ExampleStream, processor: VLMViTImageProcessor, *, batch_size: int = 32
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions and references of every image of a stream, as `coco_detection_metrics` takes them, in pixels."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    predictions, references = [], []
    loader = DataLoader(stream, batch_size=batch_size, collate_fn=collate_detection)
    for batch in tqdm(loader, desc="Evaluating", leave=False, disable=stream.rank != 0):
        outputs = model(pixel_values=batch["pixel_values"].to(device))
        sizes = [(int(height), int(width)) for height, width in (labels["orig_size"] for labels in batch["labels"])]
        found = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes, max_detections=MAX_DETECTIONS
        )
        predictions += [{name: value.cpu() for name, value in image.items()} for image in found]
        references += [_reference(labels, size) for labels, size in zip(batch["labels"], sizes)]
    model.train(was_training)
    return predictions, references


def _reference(labels: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    centre, extent = labels["boxes"].cpu().split(2, dim=-1)
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1)  # (n, 4) in 0..1
    height, width = size
    return {
        "boxes": corners * torch.tensor([width, height, width, height]),
        "labels": labels["class_labels"].cpu(),
        "area": labels["area"].cpu(),
        "iscrowd": labels["iscrowd"].cpu(),
    }


def evaluate_detection(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTImageProcessor,
    *,
    class_names: list[str],
    batch_size: int = 32,
    per_class: bool = False,
) -> dict[str, float]:
    """COCO's figures over a stream, gathered from all ranks; ValueError for a stream without images."""
    predictions, references = predict_detection(model, stream, processor, batch_size=batch_size)
    if stream.world_size > 1:
        predictions, references = gather_object(predictions), gather_object(references)
    return coco_detection_metrics(predictions, references, class_names=class_names, per_class=per_class)


def extract_features(
    encoder: VLMViTModel, stream: ExampleStream, *, pooling: str = "mean", batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Pooled features (images, features), see `encode`, and labels (images,) of a labelled stream."""
    features, labels = [], []
    for batch in tqdm(DataLoader(stream, batch_size=batch_size), desc="Features", leave=False):
        features.append(encode(encoder, batch["pixel_values"], pooling=pooling))
        labels.append(batch["label"])
    return torch.cat(features), torch.cat(labels)


def evaluate_features(
    encoder: VLMViTModel, train: ExampleStream, test: ExampleStream, *, batch_size: int = 64
) -> dict[str, float]:
    """kNN and linear accuracy of frozen features: how far the encoder has come without any fine-tuning.

    `knn` and `linear` are of the mean patch token. Where there is a class token, `knn_class` and `linear_class` are of
    it, and `knn_both` and `linear_both` of the two side by side.
    """
    pooling, width = "both" if encoder.config.use_class_token else "mean", encoder.config.hidden_size
    train_features, train_labels = extract_features(encoder, train, pooling=pooling, batch_size=batch_size)
    test_features, test_labels = extract_features(encoder, test, pooling=pooling, batch_size=batch_size)
    parts = {"": slice(-width, None)}
    if pooling == "both":
        parts |= {"_class": slice(width), "_both": slice(None)}
    figures: dict[str, float] = {}
    for suffix, part in parts.items():
        accuracies = classify(train_features[:, part], train_labels, test_features[:, part], test_labels)
        figures |= {name + suffix: value for name, value in accuracies.items()}
    return figures


def classify(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """kNN and linear accuracy on test features (n, D) with labels (n,), fitted on train features."""
    data = train_features, train_labels, test_features, test_labels
    return {"knn": knn_accuracy(*data, num_neighbors=min(20, len(train_labels))), "linear": linear_accuracy(*data)}


__all__ = ["classify", "evaluate_detection", "evaluate_features", "extract_features", "predict_detection"]
