"""Several sources mixed by weight."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import COLUMNS
from hf_vlm.data.source import Source

__all__ = ["mix_sources"]

logger = logging.getLogger(__name__)

MAX_ID = 2**63  # ids that are hashes may be large
SEED = 0  # of the choices in the first epoch; the training stream sets another one each epoch


def mix_sources(sources: Mapping[str, Source], weights: Mapping[str, float]) -> Source:
    """Sample each example from one of several sources, with probabilities in proportion to their weights.

    An epoch ends when every source has been read to its end; until then shorter ones begin again. The mixture has the
    columns that all of them have, without the labels where their classes differ, and masks of objects where all have
    them. Its image_ids are theirs times the number of sources, plus the position of the source.

    Raises:
        ValueError: A weight is not positive.
    """
    wrong = [f"{name}: {weight!r}" for name, weight in weights.items() if not _is_weight(weight)]
    if wrong:
        raise ValueError(f"the weights of a mixture must be positive numbers, not {summarise(wrong)}")
    if not all(source.has_object_masks for source in sources.values()):
        sources = {name: source.without_object_masks() for name, source in sources.items()}
    shared = [name for name in COLUMNS if all(name in source.features for source in sources.values())]
    columns = [name for name in shared if _has_equal_classes(name, sources)]
    numbered = [
        source.dataset.select_columns(columns).map(
            _Renumber(index, len(sources)),
            input_columns=["image_id"],
            features=datasets.Features({name: source.features[name] for name in columns}),
        )
        for index, source in enumerate(sources.values())
    ]
    total = sum(weights.values())
    dataset = datasets.interleave_datasets(
        numbered,
        probabilities=[weights[name] / total for name in sources],
        seed=SEED,
        stopping_strategy="all_exhausted",
    )
    mask_class_names = {source.mask_class_names for source in sources.values()}
    max_objects = [source.max_objects for source in sources.values() if source.max_objects is not None]
    return Source(
        dataset=dataset,
        max_objects=max(max_objects) if len(max_objects) == len(sources) else None,
        mask_class_names=next(iter(mask_class_names)) if len(mask_class_names) == 1 else None,
    )


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _has_equal_classes(column: str, sources: Mapping[str, Source]) -> bool:
    """Whether a column has the same classes in all sources; a warning names two that differ."""
    (first, expected), *others = ((name, source.features[column]) for name, source in sources.items())
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
    """Makes ids unique among the sources of a mixture."""

    index: int
    count: int

    def __call__(self, image_id: int) -> dict[str, int]:
        return {"image_id": (image_id * self.count + self.index) % MAX_ID}
