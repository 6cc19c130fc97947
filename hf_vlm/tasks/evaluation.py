"""Evaluation of a saved model on a split of a source, whatever its task."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.tiles import Tiling
from hf_vlm.features.device import to_best_device
from hf_vlm.features.loading import load_model
from hf_vlm.tasks import TASKS
from hf_vlm.tasks.task import Evaluation, Task

__all__ = ["EvaluatedImage", "EvaluatedSplit", "eval_stream", "evaluate_run", "evaluate_split", "match_class_names"]

logger = logging.getLogger(__name__)


class EvaluatedImage(NamedTuple):
    """An image of an evaluation."""

    position: int  # in the source, where images that cannot be read count too
    image_id: int
    path: str | None


class EvaluatedSplit(NamedTuple):
    """A model's evaluation on a split, and what it was made of."""

    evaluation: Evaluation
    task: Task
    source: Source
    images: list[EvaluatedImage]  # in the order of the evaluation
    holdout: float | None = None  # fraction of the split that the images are, where they were held out

    @property
    def split(self) -> str:
        """Name of the split, and which part of it."""
        return f"{self.source.split}{'' if self.holdout is None else f', the held-out {self.holdout:.4g} of it'}"


def evaluate_run(run_dir: str | Path, data: str, split: str, **options: Any) -> Evaluation:
    """Evaluates a saved model on a split of a source: metrics of its task, also per class; see `evaluate_split`."""
    return evaluate_split(run_dir, data, split, **options).evaluation


def evaluate_split(
    run_dir: str | Path,
    data: str,
    split: str,
    *,
    format: str | None = None,
    holdout: float | None = None,
    num_examples: int | None = None,
    allow_outside: bool = False,
    max_bad_fraction: float = 0.01,
    needs_confusion: bool = False,
    tiling: Tiling | None = None,
) -> EvaluatedSplit:
    """Evaluates a saved model on a split of a source.

    Args:
        holdout: Fraction of the split to evaluate on, which is what training with the same `holdout` did not see. A
            task that fits on the train split fits on the rest instead.
        num_examples: First images to evaluate on.
        tiling: Tiles that the model looks at, as `predict` does with the same; None for whole images.

    Raises:
        ValueError: The folder holds no model, the data lack what its task needs or have other classes, more than
            `max_bad_fraction` of the images cannot be read, `needs_confusion` asks for a confusion matrix of a model
            that has none, or `tiling` for tiles of a task that has none.
    """
    loaded = load_model(run_dir)
    task = TASKS[loaded.entry.task_in_use]
    if needs_confusion and not task.has_confusion(loaded.model):
        raise ValueError(
            f"The model {run_dir} has no confusion matrix to plot: only models that give one class per image or pixel "
            "have one."
        )
    if tiling is not None:
        if task.tile is None:
            raise ValueError(f"tile is {tiling.side}, but tiles are for detectors, not for {task.name}; leave it out.")
        task = task.tile(tiling)
    options = {"format": format, "allow_outside": allow_outside, "object_masks": task.reads_object_masks}
    source, train = _open(data, split, holdout, num_examples, fits_on_train=task.fits_on_train, **options)
    names = found = task.class_names(source)
    if not task.has_open_classes:
        names, owner = loaded.class_names, f"the model {run_dir}"
        if train is not None:
            names, owner = task.class_names(train), f"split {train.split!r}"
        source = match_class_names(source, found, names, owner)

    def stream(source: Source, transform: Transform) -> ExampleStream:
        return eval_stream(source, transform, max_bad_fraction=max_bad_fraction)

    transform = _Recording(task.transform(loaded.processor, train=False, class_names=names))
    evaluation = task.evaluate(
        to_best_device(loaded.model),
        stream(source, transform),
        loaded.processor,
        class_names=names,
        per_class=True,
        fit_stream=None if train is None else stream(train, transform.transform),
    )
    return EvaluatedSplit(evaluation, task, source, transform.images, holdout)


def _open(
    data: str, split: str, holdout: float | None, num_examples: int | None, *, fits_on_train: bool, **options: Any
) -> tuple[Source, Source | None]:
    """The images to evaluate on, and those to fit on, where they are needed."""
    if holdout is None:
        source = open_source(data, split, num_samples=num_examples, **options)
        return source, open_source(data, "train", num_samples=num_examples, **options) if fits_on_train else None
    rest, source = open_source(data, split, **options).holdout(holdout, num_examples)
    return source, (rest if num_examples is None else rest.take(num_examples)) if fits_on_train else None


class _Recording:
    """A transform that records which images passed it, in this process."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.images: list[EvaluatedImage] = []
        self.num_seen = 0

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        position, self.num_seen = self.num_seen, self.num_seen + 1
        transformed = self.transform(example, rng)
        self.images.append(EvaluatedImage(position, int(example["image_id"]), example["image"].get("path")))
        return transformed


def match_class_names(source: Source, found: Sequence[str], expected: Sequence[str], owner: str) -> Source:
    """The source with the classes of `owner`, which it may have in another order or not all, by their names.

    Raises:
        ValueError: The data have classes that `owner` does not have.
    """
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise ValueError(
            f"Split {source.split!r} of {source.name} has classes that {owner} does not have: {unknown}; it has "
            f"{list(expected)}."
        )
    if list(found) != list(expected):
        missing = [name for name in expected if name not in found]
        without = f", of which the data lack {missing}" if missing else ""
        logger.warning(
            "Split %r of %s: its classes are matched by name to those of %s%s",
            source.split,
            source.name,
            owner,
            without,
        )
    return source.with_classes(expected)


def eval_stream(source: Source, transform: Any, *, max_bad_fraction: float, **ranks: int) -> ExampleStream:
    """All examples of a source once, in their order; `rank` and `world_size` for one of several ranks."""
    return ExampleStream(
        source.dataset, transform, shuffle=False, repeat=False, max_bad_fraction=max_bad_fraction, **ranks
    )
