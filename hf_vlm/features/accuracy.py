"""kNN and linear accuracy of frozen features: the quality of an encoder without any fine-tuning."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_vlm.data.stream import ExampleStream
from hf_vlm.features.extraction import encode
from hf_vlm.metrics import knn_accuracy, linear_accuracy
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

__all__ = ["classify", "evaluate_features", "extract_features"]


def extract_features(
    encoder: VLMViTModel, stream: ExampleStream, *, pooling: str = "mean", batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Pooled features (images, features), see `encode`, and labels (images,) of a labelled stream."""
    features, labels = [], []
    for batch in tqdm(DataLoader(stream, batch_size=batch_size), desc="Features", leave=False, disable=None):
        features.append(encode(encoder, batch["pixel_values"], pooling=pooling))
        labels.append(batch["label"])
    return torch.cat(features), torch.cat(labels)


def evaluate_features(
    encoder: VLMViTModel, train: ExampleStream, test: ExampleStream, *, batch_size: int = 64
) -> dict[str, float]:
    """kNN and linear accuracy of frozen features: the quality of an encoder without any fine-tuning.

    `knn` and `linear` use the mean patch token. Where there is a class token, `knn_class` and `linear_class` use that
    token, and `knn_both` and `linear_both` the two concatenated.
    """
    pooling, width = "both" if encoder.config.use_class_token else "mean", encoder.config.hidden_size
    train_features, train_labels = extract_features(encoder, train, pooling=pooling, batch_size=batch_size)
    test_features, test_labels = extract_features(encoder, test, pooling=pooling, batch_size=batch_size)
    parts = {"": slice(-width, None)}
    if pooling == "both":
        parts |= {"_class": slice(width), "_both": slice(None)}
    metrics: dict[str, float] = {}
    for suffix, part in parts.items():
        accuracies = classify(train_features[:, part], train_labels, test_features[:, part], test_labels)
        metrics |= {name + suffix: value for name, value in accuracies.items()}
    return metrics


def classify(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """kNN and linear accuracy on test features (n, D) with labels (n,), fitted on train features."""
    data = train_features, train_labels, test_features, test_labels
    return {"knn": knn_accuracy(*data, num_neighbors=min(20, len(train_labels))), "linear": linear_accuracy(*data)}
