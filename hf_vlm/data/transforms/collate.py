"""Puts transformed examples together into what the models' `forward` takes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["collate_detection", "collate_views", "empty_batch", "stack"]

MAX_MESSAGE_BYTES = 2**16  # of a tensor that is sent within a message


def collate_views(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack `pixel_values` (V, C, H, W) or (C, H, W), `local_pixel_values` where there are any, and `label`.

    Returns:
        `pixel_values` (B, V, C, H, W) or (B, C, H, W), `local_pixel_values` (B, V, C, h, w), and `labels` (B,) int64
        where the examples have a label.
    """
    batch: dict[str, torch.Tensor] = {
        name: stack([example[name] for example in examples])
        for name in ("pixel_values", "local_pixel_values")
        if name in examples[0]
    }
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([example["label"] for example in examples], dtype=torch.int64)  # (B,)
    return batch


def collate_detection(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack `pixel_values` (C, H, W) to (B, C, H, W) and list the labels, one dict per image."""
    labels = [example["labels"] for example in examples]
    return {
        "pixel_values": stack([example["pixel_values"] for example in examples]),
        "labels": labels if torch.utils.data.get_worker_info() is None else WorkerLabels(labels),
    }


class WorkerLabels(list[dict[str, Any]]):
    """Labels that leave a data worker as arrays within its message, and arrive as a plain list of dicts of tensors.

    Small tensors would each travel as a file in shared memory: with 16 images of 6 tensors 17 ms per batch instead of
    1. Masks do, since within the message they would be copied.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_tensors, ([{name: _as_array(value) for name, value in labels.items()} for labels in self],)


def _as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) and value.nbytes <= MAX_MESSAGE_BYTES else value


def _as_tensors(labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in image.items()}
        for image in labels
    ]


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors; in a data worker straight into shared memory."""
    first = tensors[0]
    return torch.stack(list(tensors), out=empty_batch(len(tensors), first.shape, first.dtype))


def empty_batch(size: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """(size, *shape) to be filled; in a data worker shared memory, which saves the copy on the way out."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(size, *shape, dtype=dtype)
    empty = torch.empty(0, dtype=dtype)
    storage: Any = empty.untyped_storage()._new_shared(size * math.prod(shape) * dtype.itemsize)
    return empty.set_(storage).view(size, *shape)
