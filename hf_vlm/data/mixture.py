"""Several streams mixed by weight."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import datasets

from hf_vlm.data.schema import COLUMNS, class_names
from hf_vlm.data.splits import listing

__all__ = ["mix_streams"]

logger = logging.getLogger(__name__)

SEED = 0  # of the draws in the first epoch; the training stream sets another one each epoch


def mix_streams(
    streams: Mapping[str, datasets.IterableDataset], weights: Mapping[str, float]
) -> datasets.IterableDataset:
    """Draw each example from one of several streams, with probabilities in proportion to their weights.

    An epoch ends when every stream has been read to its end; until then shorter ones begin again. The mixture has the
    columns that all of them have, without the labels where their classes differ. Its image_ids are theirs times the
    number of streams, plus the position of the stream.

    Raises:
        ValueError: A weight is not positive.
    """
    wrong = [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_weight(weight)]
    if wrong:
        raise ValueError(f"the weights of a mixture must be positive numbers, not {listing(wrong)}")
    columns = [name for name in COLUMNS if all(name in stream.features for stream in streams.values())]
    if {"label", "objects"} & set(columns) and not _have_equal_classes(streams):
        columns = [name for name in columns if name not in ("label", "objects")]
    numbered = [
        stream.select_columns(columns).map(
            _Renumber(index, len(streams)),
            input_columns=["image_id"],
            features=datasets.Features({name: stream.features[name] for name in columns}),
        )
        for index, stream in enumerate(streams.values())
    ]
    total = sum(weights.values())
    return datasets.interleave_datasets(
        numbered,
        probabilities=[weights[name] / total for name in streams],
        seed=SEED,
        stopping_strategy="all_exhausted",
    )


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _have_equal_classes(streams: Mapping[str, datasets.IterableDataset]) -> bool:
    classes = {name: class_names(stream) for name, stream in streams.items()}
    (first, expected), *others = classes.items()
    for name, found in others:
        if found != expected:
            logger.warning(
                "labels are left out, since the classes differ: %s has %s, %s has %s",
                first,
                listing(expected or []),
                name,
                listing(found or []),
            )
            return False
    return True


@dataclass(frozen=True)
class _Renumber:
    """Makes ids unique among the streams of a mixture."""

    index: int
    count: int

    def __call__(self, image_id: int) -> dict[str, int]:
        return {"image_id": image_id * self.count + self.index}
