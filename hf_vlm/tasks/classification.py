"""Image classification: one class per image, or several where the data have boxes instead of labels."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from scipy.special import softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.classification import ClassificationTransform, collate_classification
from hf_vlm.metrics.calibration import calibration_error, fit_temperature
from hf_vlm.metrics.classification import classification_metrics, confusion_matrix, multi_label_metrics
from hf_vlm.metrics.precision_recall import best_f1
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.tasks.calibration import Calibration, rounded, threshold_of_best_f1
from hf_vlm.tasks.reports.classification import ClassificationOutcomes, MultiLabelOutcomes, report_classification
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
    """Logits (images, classes) float32 and labels (images,) or (images, classes) of this rank's images.

    Raises:
        ValueError: The data have several classes per image and the model predicts one, or the other way round.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    is_multi_label = model.config.problem_type == MULTI_LABEL
    # The first ones are empty, for a rank without images.
    logits = [torch.empty(0, num_classes)]
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
        logits.append(model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu())
        labels.append(batch["labels"])
    model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


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

    Also what calibrates the model on these images: the `temperature` of its logits with the error that is left, or the
    `score_threshold` of the `best_micro_f1`.

    Raises:
        ValueError: The stream has no images, or several classes per image where the model predicts one, or vice versa.
    """
    with _inputs_of(getattr(model, "classifier", None)) as features:
        logits, labels = predict_classification(model, stream, num_classes=len(class_names), batch_size=batch_size)
    if stream.world_size > 1:
        logits, labels = (torch.cat(gather_object([part])) for part in (logits, labels))
    if not len(labels):
        raise ValueError("There is no image to evaluate on.")
    options: dict[str, Any] = {"class_names": class_names, "per_class": per_class}
    if model.config.problem_type == MULTI_LABEL:
        probabilities = logits.sigmoid()
        metrics = multi_label_metrics(probabilities, labels, **options)
        several = MultiLabelOutcomes(probabilities.numpy(), labels.numpy().astype(bool), processor.score_threshold)
        best = best_f1(several.probabilities.ravel(), several.labels.ravel(), int(several.labels.sum()))
        metrics |= {"best_micro_f1": best.f1, "score_threshold": best.threshold}
        return Evaluation(metrics=metrics, class_names=class_names, outcomes=several)
    metrics = classification_metrics(logits.softmax(dim=-1), labels, **options)
    outcomes = ClassificationOutcomes(
        logits=(logits * model.config.temperature).numpy(),
        labels=labels.numpy(),
        temperature=model.config.temperature,
        features=torch.cat(features).numpy() if features and stream.world_size == 1 else None,
    )
    return Evaluation(
        metrics=metrics | _calibration_metrics(outcomes),
        class_names=class_names,
        confusion=confusion_matrix(labels, logits.argmax(dim=1), len(class_names)),
        outcomes=outcomes,
    )


@contextmanager
def _inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """A list that gets the inputs of a module meanwhile, float32 on the CPU; exported models have no modules."""
    inputs: list[Tensor] = []
    if module is None:
        yield inputs
        return
    hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].float().cpu()))
    try:
        yield inputs
    finally:
        hook.remove()


def _calibration_metrics(outcomes: ClassificationOutcomes) -> dict[str, float]:
    """The temperature that fits logits to labels, and the expected calibration error with it."""
    temperature = fit_temperature(outcomes.logits, outcomes.labels)
    probabilities = softmax(outcomes.logits.astype(np.float64) / temperature, axis=1)
    error = calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == outcomes.labels)
    return {"temperature": temperature, "ece_calibrated": error}


def calibrate(metrics: Mapping[str, float]) -> Calibration:
    """The temperature of one class per image, or the score threshold of several."""
    if "temperature" in metrics:
        return Calibration(config={"temperature": rounded(metrics["temperature"])})
    return threshold_of_best_f1(metrics)


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

    The default threshold is the processor's for several classes per image, and 0 for one: the best class, whatever its
    score.
    """
    is_multi_label = model.config.problem_type == MULTI_LABEL
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
    calibrate=calibrate,
    report=report_classification,
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
        "temperature": "temperature that calibrates it",
        "ece_calibrated": "expected calibration error with this temperature",
        "map": "mAP (mean average precision of the classes)",
        "micro_f1": "micro F1",
        "best_micro_f1": "best micro F1 over all score thresholds",
        "score_threshold": "score threshold of the best micro F1",
    },
    undefined={
        **dict.fromkeys(("recall/", "ap/"), "no images of this class in this split"),
        "score_threshold": "no prediction is right",
    },
    recipes={"nano": "classification/vit_nano_cpu.yaml", "small": "classification/vit_small.yaml"},
    card="classifier.md",
)
