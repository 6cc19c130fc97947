"""The contract of a task: all that fine-tuning, evaluation, prediction and model cards need to know of it.

A new task is one file beside this one and one row in `hf_vlm/tasks/__init__.py`; commands read this contract and never
ask what a task is called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.source import Source
from hf_vlm.data.stream import Transform

__all__ = ["Collate", "Evaluation", "Task"]

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model is worth on a split.

    Attributes:
        metrics: Name to value.
        class_names: Names of the classes 0, 1, ...
        confusion: (classes, classes) counts, rows the true class, columns the predicted one; None for tasks that have
            no such matrix.
    """

    metrics: dict[str, float]
    class_names: Sequence[str] = ()
    confusion: NDArray[np.int64] | None = None


def _no_fields(source: Source) -> dict[str, Any]:
    return {}


def _never(model: PreTrainedModel) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task by what the commands ask of it.

    Attributes:
        name: The name of transformers' pipeline for it, which rows of the registry carry.
        class_names: Source to the names of the classes 0, 1, ...; ValueError where the data do not fit the task.
        head_fields: Source to fields of the model's configuration that the data decide.
        transform: `(processor, *, train, class_names, augmentation)` to what an example becomes.
        collate: `(*, train, class_names, augmentation)` to the function that makes a batch of examples.
        evaluate: `(model, stream, processor, *, class_names, batch_size, per_class, fit_stream)` to an
            [`Evaluation`], the same on all ranks.
        has_confusion: Model to whether its evaluation has a confusion matrix.
        post_process: `(processor, outputs, *, threshold, sizes, model)` to one dict per image: `scores` and `labels`
            (n,), best first, and `boxes` (n, 4) in pixels where the task has them. A threshold of None is the task's
            own. None where nothing is predicted.
        headline: The metrics that commands print first, by name with the label shown; they are higher-is-better.
        metric_names: Names of metrics in a model card, of `ap/<class>` under `ap/`; others are shown as they are.
        recipes: Shipped recipes by the preset of the encoder that they are for.
        card: Template of the model card.
        fits_on_train: Whether evaluation needs the train split too, as classifiers on frozen features do.
    """

    name: str
    class_names: Callable[[Source], list[str]]
    transform: Callable[..., Transform]
    collate: Callable[..., Collate]
    evaluate: Callable[..., Evaluation]
    card: str
    head_fields: Callable[[Source], dict[str, Any]] = _no_fields
    has_confusion: Callable[[PreTrainedModel], bool] = _never
    post_process: Callable[..., list[dict[str, Tensor]]] | None = None
    headline: Mapping[str, str] = field(default_factory=dict)
    metric_names: Mapping[str, str] = field(default_factory=dict)
    recipes: Mapping[str, str] = field(default_factory=dict)
    fits_on_train: bool = False
