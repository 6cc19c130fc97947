"""Feature extraction: a frozen encoder, evaluated by kNN and linear accuracy of its features."""

from collections.abc import Sequence
from typing import Any

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.collate import collate_views
from hf_vlm.features.accuracy import evaluate_features
from hf_vlm.features.extraction import eval_transform_for
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.tasks.task import Collate, Evaluation, ServedOutput, Task

__all__ = ["FEATURE_EXTRACTION"]


def class_names(source: Source) -> list[str]:
    """The classes of the labels; ValueError for data without labels."""
    if source.label_names is None:
        raise ValueError(
            f"{source.name} has no class labels in split {source.split!r}: kNN and linear accuracy need them."
        )
    return source.label_names


def transform(processor: VLMViTImageProcessor, **_: Any) -> Transform:
    """The transform that prepares images as the processor does."""
    return eval_transform_for(processor)


def collate(**_: Any) -> Collate:
    """A function that stacks images and labels."""
    return collate_views


def evaluate(
    model: VLMViTModel,
    stream: ExampleStream,
    processor: VLMViTImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 64,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
) -> Evaluation:
    """kNN and linear accuracy on `stream`, with classifiers fitted on `fit_stream`, the train split."""
    assert fit_stream is not None
    return Evaluation(metrics=evaluate_features(model, fit_stream, stream, batch_size=batch_size))


FEATURE_EXTRACTION = Task(
    name="image-feature-extraction",
    class_names=class_names,
    transform=transform,
    collate=collate,
    evaluate=evaluate,
    served=ServedOutput(
        output_class="transformers.modeling_outputs.BaseModelOutputWithPooling",
        fields=("last_hidden_state", "pooler_output"),
    ),
    headline={"knn": "kNN accuracy", "linear": "linear accuracy"},
    metric_names={
        "knn": "kNN accuracy on its features",
        "linear": "accuracy of a linear classifier on its features",
        "knn_class": "kNN accuracy on its class token",
        "linear_class": "accuracy of a linear classifier on its class token",
        "knn_both": "kNN accuracy on its class token and features",
        "linear_both": "accuracy of a linear classifier on its class token and features",
    },
    card="encoder.md",
    fits_on_train=True,
)
