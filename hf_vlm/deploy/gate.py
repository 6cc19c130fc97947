"""The gate of an export: an artifact is compared with the model it came from before anyone gets to use it."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_vlm.features.loading import LoadedModel
from hf_vlm.metrics.detection_matches import box_ious
from hf_vlm.tasks import TASKS, Task
from hf_vlm.tasks.task import ServedOutput

__all__ = ["MAX_DIFFERENCE", "Comparison", "Metric", "compare", "failures", "time_interleaved"]

Image = NDArray[np.uint8]
Result = dict[str, Tensor]

MAX_DIFFERENCE = 1e-4  # of float32 outputs, relative where they are above 1
# Other precisions are compared by what is found: where scores nearly tie, a two-stage detector picks other queries,
# and outputs differ by any amount while detections stay the same.
MIN_AGREEMENT = {"fp16": 0.98, "bf16": 0.9, "int8": 0.8}
MAX_METRIC_LOSS = {"fp32": 0.002, "fp16": 0.002, "bf16": 0.01, "int8": 0.01}
MIN_SCORE, MIN_IOU, MAX_SCORE_DIFFERENCE = 0.3, 0.9, 0.02  # of detections that match
NUM_TIMED = 15
BATCH_SIZES = (1, 3)  # in turn, for the batch is dynamic


@dataclass(frozen=True)
class Metric:
    """The first headline metric of a task, of the model and of its artifact."""

    name: str
    before: float
    after: float
    data: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the gate judges by.

    Attributes:
        num_images: Images that both ran on.
        max_difference: Largest difference of an output, relative where it is above 1.
        agreement: 0 to 1: of detections (same class, IoU of 0.9, scores within 0.02) that both find, of images or
            pixels with the same class, or mean cosine of the features.
        ms_before: Median milliseconds of the model in torch for a batch of one image.
        ms_after: Those of the artifact.
        speed_up: Median of the ratios of pairs, timed in turn.
    """

    num_images: int
    max_difference: float
    agreement: float
    ms_before: float
    ms_after: float
    speed_up: float
    metric: Metric | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return asdict(self)


@torch.inference_mode()
def compare(reference: LoadedModel, artifact: LoadedModel, images: Sequence[Image]) -> Comparison:
    """Runs a model and its artifact on images (height, width, channels) uint8, in batches of several sizes.

    Raises:
        ValueError: The artifact does not run on a batch.
    """
    task = TASKS[reference.entry.task_in_use]
    assert task.served is not None
    differences: list[float] = []
    agreements: list[tuple[float, float]] = []
    for batch in batches(images):
        inputs = reference.processor(batch, return_tensors="pt", input_data_format="channels_last")
        try:
            expected, found = (loaded.model(**inputs) for loaded in (reference, artifact))
        except Exception as error:  # runtimes raise their own types
            raise ValueError(
                f"The artifact does not run on a batch of {len(inputs['pixel_values'])}: {str(error).splitlines()[0]}"
            ) from error
        differences.append(difference(expected, found, task.served))
        sizes = [(image.shape[0], image.shape[1]) for image in batch]
        results = (predictions(task, reference, outputs, sizes) for outputs in (expected, found))
        agreements += [agreement(one, other) for one, other in zip(*results, strict=True)]
    pixels = inputs["pixel_values"][:1]
    timed = time_interleaved(lambda: reference.model(pixels), lambda: artifact.model(pixels))
    agreed, total = np.sum(agreements, axis=0)
    return Comparison(
        num_images=len(images),
        max_difference=float(np.max(differences)),  # NaN where one is, unlike Python's
        agreement=float(agreed / total) if total else 1.0,
        ms_before=statistics.median(before for before, _ in timed),
        ms_after=statistics.median(after for _, after in timed),
        speed_up=statistics.median(before / after for before, after in timed),
    )


def batches(images: Sequence[Image]) -> Iterator[list[Image]]:
    """The images in batches of `BATCH_SIZES`, in turn."""
    remaining, sizes = iter(images), itertools.cycle(BATCH_SIZES)
    while batch := list(itertools.islice(remaining, next(sizes))):
        yield batch


def failures(comparison: Comparison, precision: str) -> list[str]:
    """What keeps an artifact from passing, one text each."""
    found = []
    if not math.isfinite(comparison.max_difference):
        found.append("its outputs are not finite")
    elif precision == "fp32" and comparison.max_difference > MAX_DIFFERENCE:
        found.append(f"its outputs differ by {comparison.max_difference:.2g} (at most {MAX_DIFFERENCE:g} is allowed)")
    least = MIN_AGREEMENT.get(precision, 0.0)
    if not comparison.agreement >= least:
        found.append(f"it agrees with the model in {comparison.agreement:.3f} of its predictions (at least {least})")
    if comparison.metric is not None:
        name, before, after = comparison.metric.name, comparison.metric.before, comparison.metric.after
        if not before - after <= MAX_METRIC_LOSS[precision]:
            found.append(
                f"{name} falls from {before:.4f} to {after:.4f} (by at most {MAX_METRIC_LOSS[precision]} is allowed)"
            )
    return found


def difference(expected: Any, found: Any, served: ServedOutput) -> float:
    """Largest difference of outputs, relative where they are above 1; rows of a set are compared in any order."""
    other = aligned(expected, found, served) if served.is_set else found
    errors = [
        ((expected[name] - other[name]).abs() / expected[name].abs().clamp(min=1)).max() for name in served.fields
    ]
    return float(torch.stack(errors).max())


def aligned(expected: Any, found: Any, served: ServedOutput) -> dict[str, Tensor]:
    """The fields of `found` with their rows in the order of those of `expected` that they are nearest to."""
    small = [name for name in served.fields if expected[name].ndim == 3]  # (batch, rows, values), and no masks
    one, other = (torch.cat([outputs[name].float() for name in small], dim=-1) for outputs in (expected, found))
    costs = torch.cdist(one, other, p=torch.inf).nan_to_num(nan=1e6)  # (batch, rows, rows)
    order = torch.stack([torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) for cost in costs])
    return {name: found[name][torch.arange(order.shape[0])[:, None], order] for name in served.fields}


def predictions(task: Task, loaded: LoadedModel, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Result]:
    """What a task finds in outputs, whatever its score; of an encoder the features."""
    if task.post_process is None:
        return [{"features": tokens.flatten()} for tokens in outputs.last_hidden_state]
    return task.post_process(loaded.processor, outputs, threshold=0.0, sizes=sizes, model=loaded.model)


def agreement(one: Result, other: Result) -> tuple[float, float]:
    """How much of two predictions of an image is the same, and of how much."""
    return next(count for name, count in AGREEMENTS.items() if name in one)(one, other)


def matched_detections(one: Result, other: Result) -> tuple[float, float]:
    """Detections above `MIN_SCORE` that the other has too, in both directions."""
    same_class = one["labels"][:, None] == other["labels"][None]
    near_score = (one["scores"][:, None] - other["scores"][None]).abs() <= MAX_SCORE_DIFFERENCE
    ious = box_ious(one["boxes"].numpy(), other["boxes"].numpy())
    is_match = same_class & near_score & (torch.from_numpy(ious) >= MIN_IOU)  # (n, m)
    rows, columns = one["scores"] > MIN_SCORE, other["scores"] > MIN_SCORE
    matched = is_match[rows].any(dim=1).sum() + is_match[:, columns].any(dim=0).sum()
    return float(matched), float(rows.sum() + columns.sum())


def same_pixels(one: Result, other: Result) -> tuple[float, float]:
    """Pixels of the same class."""
    same = one["segmentation"] == other["segmentation"]
    return float(same.sum()), float(same.numel())


def same_class(one: Result, other: Result) -> tuple[float, float]:
    """Whether the best class is the same."""
    return float(torch.equal(one["labels"][:1], other["labels"][:1])), 1.0


def cosine(one: Result, other: Result) -> tuple[float, float]:
    """Cosine of the features."""
    return float(F.cosine_similarity(one["features"], other["features"], dim=0)), 1.0


AGREEMENTS: dict[str, Callable[[Result, Result], tuple[float, float]]] = {  # by the field that a result has
    "boxes": matched_detections,
    "segmentation": same_pixels,
    "features": cosine,
    "scores": same_class,
}


def time_interleaved(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    repetitions: int = NUM_TIMED,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Milliseconds of two calls in turn, so that other work meets both alike, after two of each to warm up."""
    times = []
    for _ in range(repetitions + 2):
        marks = [clock()]
        for call in (before, after):
            call()
            marks.append(clock())
        times.append((1000 * (marks[1] - marks[0]), 1000 * (marks[2] - marks[1])))
    return times[2:]
