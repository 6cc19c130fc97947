"""An opened source: its examples, still encoded, and what is known of them without reading them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

__all__ = ["Source"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images with their labels, as `open_source` opens them; iterating gives examples with the columns of the schema.

    Args:
        dataset: The stream of examples, with its features.
        num_examples: Number of examples; None where that is not known without reading all, as for tars and mixtures.
        name: Path, URL or id of the source, without secrets, for messages.
        format: One of `hf_vlm.data.sources.FORMATS`, or "mixture".
        split: Name of the split.
        max_objects: Largest number of objects of an image; None where there are none, or they are not known without
            reading all images.
        mask_class_names: Names of the values 0, 1, 2, ... of `mask`; None where they are not known.
        annotated_sizes: (num_examples, 2), width and height in pixels that the annotations give for each image, not
            finite where they give none; None where the format has no such thing.
        findings: What was found when it was opened and logged as warnings: what is left out, and what looks wrong.
    """

    dataset: datasets.IterableDataset
    num_examples: int | None = None
    name: str = ""
    format: str = ""
    split: str = ""
    max_objects: int | None = None
    mask_class_names: tuple[str, ...] | None = None
    annotated_sizes: np.ndarray[Any, Any] | None = None
    findings: tuple[str, ...] = ()

    @property
    def features(self) -> datasets.Features:
        """Types of the columns."""
        return self.dataset.features

    @property
    def label_names(self) -> list[str] | None:
        """Class names of the column `label`; None where there is none."""
        return list(self.features["label"].names) if "label" in self.features else None

    @property
    def object_names(self) -> list[str] | None:
        """Class names of the column `objects`; None where there are no boxes."""
        return list(self.features["objects"]["category"].feature.names) if "objects" in self.features else None

    @property
    def mask_names(self) -> list[str] | None:
        """Class names of the column `mask`; None where there is none, or its names are not known."""
        if self.mask_class_names is None or "mask" not in self.features:
            return None
        return list(self.mask_class_names)

    def unlabelled(self) -> "Source":
        """The source with nothing but `image` and `image_id`."""
        return replace(self, dataset=self.dataset.select_columns(["image", "image_id"]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)
