"""Which samples of a class and which strips of a picture belong to a split, so that splits have none in common."""

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["NUM_SAMPLES", "check_split", "samples_of_split"]

Sample = TypeVar("Sample")

# Default number of scenes in a split: training has more than any run reads, evaluation must end.
NUM_SAMPLES = {"train": 2**20, "validation": 1000, "test": 1000}
SPLIT_SAMPLES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}  # by position modulo 5


def check_split(split: str) -> str:
    """The split; ValueError if there is none of that name."""
    if split not in NUM_SAMPLES:
        raise ValueError(f"scenes have no split {split!r}; there are {', '.join(NUM_SAMPLES)}")
    return split


def samples_of_split(samples: Sequence[Sample], split: str) -> list[Sample]:
    """The samples that a split has of a class: every fifth is for validation, every fifth for the test."""
    return [sample for position, sample in enumerate(samples) if position % 5 in SPLIT_SAMPLES[split]]
