"""Image classification: one class per image, or several where the data have boxes instead of labels."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.classification import ClassificationTransform, collate_classification
from hf_vlm.metrics.classification import classification_metrics, confusion_matrix, multi_label_metrics
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.tasks.task import Collate, Evaluation, ServedOutput, Task

__all__ = ["CLASSIFICATION", "evaluate_classification", "predict_classification"]

MULTI_LABEL = "multi_label_classification"


def class_names(source: Source) -> list[str]:
    """The classes of a source's labels, or, without labels, of its objects.

    Raises:
        ValueError: The source has neither, or only one class.
    """
    names = source.label_names if source.label_names is not None else source.object_names
    if names is None:
        raise ValueError(
            f"{source.name} has neither labels nor boxes in split {source.split!r}: image classification needs a "
            "folder for each of two or more classes, a column 'label' or a column 'objects'."
        )
    if len(names) < 2:
        raise ValueError(
            f"{source.name} has the classes {names} in split {source.split!r}, but classification needs at least 2: "
            "add images that show something else as a second class."
        )
    return list(names)


def head_fields(source: Source) -> dict[str, Any]:
    """Configuration fields that depend on the data: one class per image, or several."""
    return {"problem_type": "single_label_classification" if source.label_names is not None else MULTI_LABEL}


def classification_transform(
    processor: VLMViTClassificationImageProcessor,
    *,
    train: bool,
    class_names: Sequence[str],
    augmentation: Mapping[str, Any] | None = None,
) -> ClassificationTransform:
    """The transform that prepares images as the processor does, and augments them in training."""
    return ClassificationTransform.from_dict(
        augmentation or {},
        size=(processor.size["height"], processor.size["width"]),
        train=train,
        num_classes=len(class_names),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
    )


def collate(*, train: bool, class_names: Sequence[str], augmentation: Mapping[str, Any] | None = None) -> Collate:
    """A function that stacks examples, and mixes those whose transform sampled mixup or CutMix."""
    return functools.partial(collate_classification, num_classes=len(class_names))


@torch.inference_mode()
def predict_classification(
    model: PreTrainedModel, stream: ExampleStream, *, num_classes: int, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Probabilities (images, classes) float32 and labels (images,) or (images, classes) of this rank's images.

    Raises:
        ValueError: The data have several classes per image and the model predicts one, or the other way round.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    is_multi_label = model.config.problem_type == MULTI_LABEL
    # The first ones are empty, for a rank without images.
    probabilities = [torch.empty(0, num_classes)]
    labels = [torch.empty(0, num_classes) if is_multi_label else torch.empty(0, dtype=torch.int64)]
    loader = DataLoader(
        stream, batch_size=batch_size, collate_fn=functools.partial(collate_classification, num_classes=num_classes)
    )
    for batch in tqdm(loader, desc="Evaluating", leave=False, disable=stream.rank != 0 or None):
        if (batch["labels"].ndim == 2) != is_multi_label:
            raise ValueError(
                "The data have several classes per image, but the model predicts one."
                if batch["labels"].ndim == 2
                else "The data have one class per image, but the model predicts several."
            )
        logits = model(pixel_values=batch["pixel_values"].to(device)).logits.float()
        probabilities.append((logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)).cpu())
        labels.append(batch["labels"])
    model.train(was_training)
    return torch.cat(probabilities), torch.cat(labels)


def evaluate_classification(
    model: PreTrainedModel,
    stream: ExampleStream,
    processor: VLMViTClassificationImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 32,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
) -> Evaluation:
    """Accuracy or average precision over a stream, gathered from all ranks, and the confusion matrix.

    Raises:
        ValueError: The stream has no images, or several classes per image where the model predicts one, or vice versa.
    """
    probabilities, labels = predict_classification(model, stream, num_classes=len(class_names), batch_size=batch_size)
    if stream.world_size > 1:
        probabilities, labels = (torch.cat(gather_object([part])) for part in (probabilities, labels))
    if not len(labels):
        raise ValueError("There is no image to evaluate on.")
    options: dict[str, Any] = {"class_names": class_names, "per_class": per_class}
    if model.config.problem_type == MULTI_LABEL:
        return Evaluation(metrics=multi_label_metrics(probabilities, labels, **options), class_names=class_names)
    return Evaluation(
        metrics=classification_metrics(probabilities, labels, **options),
        class_names=class_names,
        confusion=confusion_matrix(labels, probabilities.argmax(dim=1), len(class_names)),
    )


def has_confusion(model: PreTrainedModel) -> bool:
    """Whether the model gives one class per image."""
    return bool(model.config.problem_type != MULTI_LABEL)


def post_process(
    processor: VLMViTClassificationImageProcessor,
    outputs: Any,
    *,
    threshold: float | None,
    sizes: Sequence[tuple[int, int]],
    model: PreTrainedModel,
) -> list[dict[str, Tensor]]:
    """One dict per image: `scores` and `labels`, best first, of the classes that reach the threshold.

    The default threshold is 0.5 for several classes per image, and 0 for one: the best class, whatever its score.
    """
    is_multi_label = model.config.problem_type == MULTI_LABEL
    if threshold is None:
        threshold = 0.5 if is_multi_label else 0.0
    return processor.post_process_image_classification(
        outputs,
        threshold=threshold,
        top_k=model.config.num_labels if is_multi_label else 1,
        problem_type=model.config.problem_type,
    )


CLASSIFICATION = Task(
    name="image-classification",
    class_names=class_names,
    head_fields=head_fields,
    transform=classification_transform,
    collate=collate,
    evaluate=evaluate_classification,
    has_confusion=has_confusion,
    post_process=post_process,
    served=ServedOutput(output_class="transformers.modeling_outputs.ImageClassifierOutput", fields=("logits",)),
    headline={"top1": "accuracy", "balanced_accuracy": "balanced accuracy", "map": "mAP", "macro_f1": "macro F1"},
    metric_names={
        "recall/": "recall",
        "ap/": "AP",
        "top1": "accuracy",
        "top5": "accuracy of the best five classes",
        "balanced_accuracy": "balanced accuracy (mean recall of the classes)",
        "macro_f1": "macro F1",
        "ece": "expected calibration error",
        "map": "mAP (mean average precision of the classes)",
        "micro_f1": "micro F1",
    },
    recipes={"nano": "classification/vit_nano_cpu.yaml", "small": "classification/vit_small.yaml"},
    card="classifier.md",
)
