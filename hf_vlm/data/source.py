"""An opened source: its examples, still encoded, and what is known of them without reading them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import cv2
import datasets
import numpy as np

from hf_vlm.data.masks import IGNORED, read_classes
from hf_vlm.data.schema import objects_feature

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
    def has_object_masks(self) -> bool:
        """Whether the column `objects` has the field `segmentation`."""
        return "objects" in self.features and "segmentation" in self.features["objects"]

    @property
    def mask_names(self) -> list[str] | None:
        """Class names of the column `mask`; None where there is none, or its names are not known."""
        if self.mask_class_names is None or "mask" not in self.features:
            return None
        return list(self.mask_class_names)

    @property
    def has_captions(self) -> bool:
        """Whether there is the column `text`."""
        return "text" in self.features

    def unlabelled(self) -> "Source":
        """The source with nothing but `image` and `image_id`."""
        return replace(self, dataset=self.dataset.select_columns(["image", "image_id"]))

    def without_object_masks(self) -> "Source":
        """The source without the field `segmentation` of its objects."""
        if not self.has_object_masks:
            return self
        features = datasets.Features(self.features)
        features["objects"] = objects_feature(self.object_names or [])
        return replace(self, dataset=self.dataset.map(_drop_segmentation, features=features))

    def with_classes(self, names: Sequence[str]) -> "Source":
        """The source with the classes `names`, where its own are some of them or are in another order.

        Labels, objects and masks are mapped by name, each where all its classes are among the names.
        """
        columns = {"label": self.label_names, "objects": self.object_names, "mask": self.mask_names}
        maps = {
            column: _indices(own, names)
            for column, own in columns.items()
            if own and own != list(names) and {*own} <= {*names}
        }
        if not maps:
            return self
        features = datasets.Features(self.features)
        if "label" in maps:
            features["label"] = datasets.ClassLabel(names=list(names))
        if "objects" in maps:
            features["objects"] = objects_feature(names, has_masks=self.has_object_masks)
        mask_names = tuple(names) if "mask" in maps else self.mask_class_names
        dataset = self.dataset.map(_Renumbered(maps), features=features)
        return replace(self, dataset=dataset, mask_class_names=mask_names)

    def holdout(self, fraction: float, number: int | None = None) -> tuple["Source", "Source"]:
        """The source without a fraction of its images, and these, or the first `number` of them: a validation split of
        data that have none.

        Each image is on one side by a hash of the last two parts of its path, or of its id where it has no path, so
        that the sides stay as they are when images are added or the data are moved. The numbers of examples are known
        where they can be counted without a server.

        Raises:
            ValueError: The fraction is not between 0 and 1, or a side would be empty.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"holdout={fraction} must be between 0 and 1, such as 0.1 for a tenth of the images")
        kept, apart = (
            replace(
                self,
                dataset=self.dataset.filter(_IsHeldOut(fraction, is_held_out)),
                num_examples=None,
                annotated_sizes=None,  # which are by position
            )
            for is_held_out in (False, True)
        )
        if self.num_examples is not None and self.format not in ("scenes", "hub") and "://" not in self.name:
            held_out = sum(map(_IsHeldOut(fraction, True), self))
            counts = self.num_examples - held_out, held_out
            if not all(counts):
                raise ValueError(
                    f"{self.name}: holdout={fraction} of {self.num_examples} images leaves {counts[0]} to train on "
                    f"and {counts[1]} to hold out; choose another fraction, or name a validation split"
                )
            kept, apart = replace(kept, num_examples=counts[0]), replace(apart, num_examples=counts[1])
        return kept, apart if number is None else apart.take(number)

    def take(self, number: int) -> "Source":
        """The first examples of the source."""
        known = None if self.num_examples is None else min(number, self.num_examples)
        return replace(self, dataset=self.dataset.take(number), num_examples=known)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)


def _drop_segmentation(example: dict[str, Any]) -> dict[str, Any]:
    objects = {name: values for name, values in example["objects"].items() if name != "segmentation"}
    return {**example, "objects": objects}


def _indices(own: Sequence[str], names: Sequence[str]) -> list[int]:
    return [list(names).index(name) for name in own]


@dataclass(frozen=True)
class _Renumbered:
    """Maps the indices of classes in `label`, `objects` and `mask`; those of missing labels stay as they are."""

    maps: Mapping[str, list[int]]

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        if "label" in self.maps:
            label = example["label"]
            changed["label"] = label if label is None or label < 0 else self.maps["label"][label]
        if "objects" in self.maps:
            indices = self.maps["objects"]
            category = [indices[index] for index in example["objects"]["category"]]
            changed["objects"] = {**example["objects"], "category": category}
        if "mask" in self.maps:
            table = np.full(IGNORED + 1, IGNORED, dtype=np.uint8)
            table[: len(self.maps["mask"])] = self.maps["mask"]
            values = table[read_classes(example, len(self.maps["mask"]))]
            changed["mask"] = {"bytes": cv2.imencode(".png", values)[1].tobytes(), "path": None}
        return example | changed


@dataclass(frozen=True)
class _IsHeldOut:
    fraction: float
    is_held_out: bool

    def __call__(self, example: dict[str, Any]) -> bool:
        path = example["image"]["path"]
        name = "/".join(PurePosixPath(path).parts[-2:]) if path else str(example["image_id"])
        position = (
            int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64
        )
        return (position < self.fraction) == self.is_held_out
