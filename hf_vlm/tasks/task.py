"""The contract of a task: all that fine-tuning, evaluation, prediction and model cards need of it.

A new task is one file beside this one and one row in `hf_vlm/tasks/__init__.py`; commands use this contract alone and
never compare names of tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.pseudo_labels import PseudoLabels
from hf_vlm.data.source import Source
from hf_vlm.data.stream import Transform
from hf_vlm.data.tiles import Tiling
from hf_vlm.tasks.calibration import Calibration
from hf_vlm.tasks.reports.parts import Part, default_report

__all__ = ["Collate", "Evaluation", "ServedOutput", "Task"]

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of evaluating a model on a split.

    Attributes:
        metrics: Values by name.
        class_names: Names of the classes 0, 1, ...
        confusion: (classes, classes) counts, rows the true class, columns the predicted one; None for tasks that have
            no such matrix.
        counted: What the matrix counts.
        outcomes: What the task's `report` shows beside the metrics, in a form of its own; images are numbered in the
            order of the stream.
    """

    metrics: dict[str, float]
    class_names: Sequence[str] = ()
    confusion: NDArray[np.int64] | None = None
    counted: str = "images"
    outcomes: Any = None


@dataclass(frozen=True, kw_only=True)
class ServedOutput:
    """What an exported model returns: what serving reads of the model's output, in an output class of transformers.

    Such a class is found by whoever loads the export, unlike one of hf_vlm.

    Attributes:
        output_class: Full name of the class.
        fields: Its fields that are filled, by those of the model's output with the same names.
        is_set: Whether the second axis of each field has no order, as the queries of a detector.
    """

    output_class: str
    fields: tuple[str, ...]
    is_set: bool = False


def _no_fields(source: Source) -> dict[str, Any]:
    return {}


def _no_minimum(source: Source) -> dict[str, int]:
    return {}


def _no_calibration(metrics: Mapping[str, float]) -> Calibration:
    return Calibration()


def _never(model: PreTrainedModel) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the commands need of a task.

    Attributes:
        name: Its name, as in the rows of the registry.
        pipeline: Name of transformers' pipeline for it, where that is another: two tasks may have the same.
        class_names: Function from a source to the names of its classes; ValueError where the data do not fit.
        head_fields: Function from a source to configuration fields of the model that depend on the data.
        minimum_fields: Function from a source to the lowest values of configuration fields that suffice for its
            examples. A model with lower ones is built with these, and a warning.
        transform: Function `(processor, *, train, class_names, augmentation)` that returns the transform of examples.
        collate: Function `(*, train, class_names, augmentation)` that returns the collate function.
        evaluate: Function `(model, stream, processor, *, class_names, batch_size, per_class, fit_stream)` that returns
            an [`Evaluation`], the same on all ranks.
        has_confusion: Function from a model to whether its evaluation has a confusion matrix.
        post_process: Function `(processor, outputs, *, threshold, sizes, model)` that returns one dict per image:
            `scores` and `labels` (n,), best first, and where the task has them `boxes` (n, 4) in pixels, `masks` (n,
            height, width) bool, or `segmentation` (height, width), the class of each pixel, whose `scores` are
            fractions of the image. A threshold of None is the model's own. None for tasks without predictions.
        calibrate: Function from the metrics of an evaluation on held-out images to the settings that the model takes
            from it: its score threshold, or the temperature of its logits.
        report: Function from an [`Evaluation`] to the parts of a report: tables, plots, and images to look at. By
            default a table of the classes and the confusion matrix, where there are any.
        headline: Labels of the metrics that commands print first, by name of the metric; higher is better for all.
        metric_names: Names of metrics in a model card, that of `ap/<class>` under `ap/`; others keep their keys.
        undefined: Why a metric may be NaN, by its name, or as `metric_names` under `ap/`; see `why_undefined`.
        recipes: Shipped recipes by encoder preset.
        card: Template of the model card.
        tile: Function from a [`Tiling`] to the task whose evaluation looks at tiles of images; None for tasks of which
            tiles are not put together.
        find_labels: Function `(source, labels_from, *, size, num_channels, per_image, num_workers, rank, world_size,
            max_bad_fraction)` that returns [`PseudoLabels`], labels that nobody annotated, by which the head can be
            pretrained; None for tasks that have no such labels.
        served: What exported models return; None for tasks that are not exported.
        reads_object_masks: Whether it takes the masks of objects, without which sources are opened else.
        has_open_classes: Whether a model takes classes by their names, and so those of any data.
        fits_on_train: Whether evaluation needs the train split too, as classifiers on frozen features do.
    """

    name: str
    pipeline: str = ""
    class_names: Callable[[Source], list[str]]
    transform: Callable[..., Transform]
    collate: Callable[..., Collate]
    evaluate: Callable[..., Evaluation]
    card: str
    head_fields: Callable[[Source], dict[str, Any]] = _no_fields
    has_confusion: Callable[[PreTrainedModel], bool] = _never
    minimum_fields: Callable[[Source], dict[str, int]] = _no_minimum
    post_process: Callable[..., list[dict[str, Tensor]]] | None = None
    calibrate: Callable[[Mapping[str, float]], Calibration] = _no_calibration
    report: Callable[[Evaluation], list[Part]] = default_report
    headline: Mapping[str, str] = field(default_factory=dict)
    metric_names: Mapping[str, str] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    recipes: Mapping[str, str] = field(default_factory=dict)
    tile: "Callable[[Tiling], Task] | None" = None
    find_labels: Callable[..., PseudoLabels] | None = None
    served: ServedOutput | None = None
    reads_object_masks: bool = False
    has_open_classes: bool = False
    fits_on_train: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pipeline", self.pipeline or self.name)

    def why_undefined(self, metric: str) -> str:
        """Why a metric is NaN, as people read it."""
        group = metric.partition("/")[0] + "/"
        return self.undefined.get(metric) or self.undefined.get(group) or "not defined on this split"
