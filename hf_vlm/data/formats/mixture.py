"""Several streams mixed by weight."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import COLUMNS

__all__ = ["mix_streams"]

logger = logging.getLogger(__name__)

MAX_ID = 2**63  # ids that are hashes may be large
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
        raise ValueError(f"the weights of a mixture must be positive numbers, not {summarise(wrong)}")
    shared = [name for name in COLUMNS if all(name in stream.features for stream in streams.values())]
    columns = [name for name in shared if _is_alike(name, streams)]
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


def _is_alike(column: str, streams: Mapping[str, datasets.IterableDataset]) -> bool:
    """Whether a column is of the same classes in all streams; that it is not is said."""
    (first, expected), *others = ((name, stream.features[column]) for name, stream in streams.items())
    for name, found in others:
        if found != expected:
            logger.warning(
                "the column %r is left out, since its classes differ: %s has %s, %s has %s",
                column,
                first,
                summarise(_classes(expected)),
                name,
                summarise(_classes(found)),
            )
            return False
    return True


def _classes(feature: Any) -> list[str]:
    names = getattr(feature["category"].feature if isinstance(feature, dict) else feature, "names", None)
    return list(names or [])


@dataclass(frozen=True)
class _Renumber:
    """Makes ids unique among the streams of a mixture."""

    index: int
    count: int

    def __call__(self, image_id: int) -> dict[str, int]:
        return {"image_id": (image_id * self.count + self.index) % MAX_ID}
