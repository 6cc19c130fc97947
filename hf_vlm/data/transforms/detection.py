"""Decodes an example with objects, augments it and gives what a detector is trained and evaluated on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Self

import numpy as np
import torch

from hf_vlm.data.boxes import clean_boxes
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.segmentations import read_segmentation
from hf_vlm.data.transforms.image_ops import Normalizer, rotate_quarter_turns
from hf_vlm.data.transforms.objects import Masks, Objects, Span
from hf_vlm.data.transforms.options import as_probability, as_size, build_settings
from hf_vlm.data.transforms.windows import (
    WindowParameters,
    WindowSettings,
    pad_to,
    render_window,
    sample_window,
    window_spans,
)

__all__ = ["DetectionSettings", "DetectionTransform"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(WindowSettings):
    """How training images are augmented: as `WindowSettings` says, and which objects are kept.

    Args:
        min_visible: Fraction of its area that an object must show in the window to be kept.

    Raises:
        ValueError: for a value out of its range.
    """

    min_visible: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "min_visible", as_probability("min_visible", self.min_visible))


class DetectionTransform:
    """Turns an example with `objects` into a detector's input and labels, for `ExampleStream`.

    Gives `pixel_values` (C, H, W) float32, normalised, the image resized to `size` whatever its shape or, with
    `letterbox`, to fit into it, with padding of the mean colour at the right or the bottom; and `labels`:

    - `class_labels` (n,) int64;
    - `boxes` (n, 4) float32, centre x, centre y, width, height relative to the output;
    - `image_id` (1,) int64; `orig_size` (2,) int64, height and width of the original as it is displayed;
    - `area` (n,) float32, pixels of the original; `iscrowd` (n,) int64;
    - with `masks`, in training `masks` (n, H, W) bool, and else `segmentation`, a list of COCO's run lengths
      {"size", "counts"} at the size of the original.

    Boxes are clipped to the image, and degenerate ones dropped with all that belongs to them. In training crowds are
    dropped too, as they name no single object. With `masks`, an object without one is a crowd, and in training objects
    are dropped that no pixel of the output shows; a box that is cut becomes that of the mask that is left.

    Args:
        size: Size of the output in pixels, one number or (height, width).
        train: Whether to augment.
        image_mean: Mean of the values in 0 to 1; one number, or one per channel.
        image_std: Standard deviation of the values in 0 to 1; one number, or one per channel.
        num_channels: Channels of the images; colour jitter needs 3.
        num_classes: Number of classes, below which class ids are checked to lie; None for no check.
        masks: Whether to give the masks of objects, which need `objects` with the field `segmentation`.
        letterbox: Whether to keep the aspect ratio.
        settings: Settings of the augmentation; None for the defaults.

    Raises:
        ValueError: for options that do not fit each other; on a call, for objects that are malformed or of an unknown
            class. `BadImageError` for an image that cannot be decoded.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
        num_classes: int | None = None,
        masks: bool = False,
        letterbox: bool = False,
        settings: DetectionSettings | None = None,
    ) -> None:
        self.size = as_size("size", size)
        self.train = train
        self.num_channels = num_channels
        self.num_classes = num_classes
        self.masks = masks
        self.letterbox = letterbox
        self.settings = settings or DetectionSettings()
        self.normalize = Normalizer(image_mean, image_std, num_channels=num_channels)
        self.num_dropped_boxes = 0
        if num_channels != 3 and any(self.settings.jitter):
            raise ValueError(f"jitter needs images of 3 channels, these have {num_channels}: set it to [0, 0, 0, 0].")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, size: int | tuple[int, int], train: bool, **options: Any) -> Self:
        """Build the transform with the fields of `DetectionSettings` as plain values, and the options of the class.

        Raises:
            ValueError: for an unknown name (with the nearest known one) and for values out of range.
        """
        settings = build_settings(DetectionSettings, values, where="the detection augmentation")
        return cls(size, train=train, settings=settings, **options)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        parameters = sample_window(self.settings, rng) if self.train else WindowParameters()
        image, original_size = decode_image(
            example["image"], num_channels=self.num_channels, at_least=parameters.required_size(self.size)
        )
        objects = self._read_objects(example, *original_size)
        if self.train:
            objects = objects.select(objects.iscrowd == 0)
        image, objects = self.render(image, objects, parameters, original_size)
        mask_labels: dict[str, Any] = {}
        if objects.masks is not None and not self.train:
            mask_labels["segmentation"] = objects.masks.encode(original_size)
        if self.letterbox:
            objects = objects.shrink((image.shape[0] / self.size[0], image.shape[1] / self.size[1]))
            image = pad_to(image, self.size, self.normalize.fill)
        if objects.masks is not None and self.train:
            masks = objects.masks.rasterise(self.size)  # (n, H, W)
            are_shown = np.asarray(masks.any(axis=(1, 2)))
            objects, mask_labels["masks"] = objects.select(are_shown), torch.from_numpy(masks[are_shown])
        pixel_values = np.empty((self.num_channels, *self.size), dtype=np.float32)  # (C, H, W)
        self.normalize(image, pixel_values)
        low, high = objects.boxes[:, :2], objects.boxes[:, 2:]
        return {
            "pixel_values": torch.from_numpy(pixel_values),
            "labels": {
                "class_labels": torch.from_numpy(objects.class_labels),
                "boxes": torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1, dtype=np.float32)),
                "image_id": torch.tensor([example["image_id"]], dtype=torch.int64),
                "orig_size": torch.tensor(original_size, dtype=torch.int64),
                "area": torch.from_numpy(objects.area),
                "iscrowd": torch.from_numpy(objects.iscrowd),
                **mask_labels,
            },
        }

    def render(
        self, image: Array, objects: Objects, parameters: WindowParameters, original_size: tuple[int, int]
    ) -> tuple[Array, Objects]:
        """Apply a sampled augmentation: the image (height, width, C) uint8 before it is padded, and its objects.

        Args:
            image: As it was decoded.
            objects: Those of the image.
            parameters: The augmentation.
            original_size: Height and width of the image where it was not decoded smaller.
        """
        if parameters.quarter_turns:
            image = rotate_quarter_turns(image, parameters.quarter_turns)
            objects = objects.turn(parameters.quarter_turns)
            original_size = parameters.turned_size(original_size)
        (rows, columns), objects = self._choose_window(image, objects, parameters, original_size)
        shown = render_window(image, rows, columns, parameters, fill=self.normalize.fill)
        return shown, objects.flip(horizontal=parameters.flip, vertical=parameters.vertical_flip)

    def _choose_window(
        self, image: Array, objects: Objects, parameters: WindowParameters, original_size: tuple[int, int]
    ) -> tuple[tuple[Span, Span], Objects]:
        """The first window that keeps an object; when none does all of the image, or a tile without objects."""
        image_size = (image.shape[0], image.shape[1])
        window, letterbox = parameters.window_of(original_size), original_size if self.letterbox else None
        for position in parameters.positions:
            spans = window_spans(image_size, window, position, size=self.size, letterbox=letterbox)
            kept = objects.crop(*spans, min_visible=self.settings.min_visible)
            if len(kept) or not len(objects):
                return spans, kept
        if parameters.tile is not None:
            return spans, kept
        return window_spans(image_size, (1.0, 1.0), (0.0, 0.0), size=self.size, letterbox=letterbox), objects

    def _read_objects(self, example: dict[str, Any], height: int, width: int) -> Objects:
        objects = example.get("objects")
        if objects is None:
            raise ValueError(
                f"Image {example.get('image_id')} has no column 'objects', only {', '.join(example)}: "
                "detection needs a source with boxes."
            )
        boxes = np.asarray(objects["bbox"], dtype=np.float64).reshape(-1, 4)  # x, y, width, height
        class_labels = np.asarray(objects["category"], dtype=np.int64)
        self._check_classes(class_labels, len(boxes), example["image_id"])
        boxes, keep = clean_boxes(boxes, width=width, height=height)
        self._count_dropped(int((~keep).sum()), example["image_id"])
        area = objects.get("area")
        iscrowd = objects.get("iscrowd")
        read = Objects(
            boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / (width, height, width, height),
            class_labels=class_labels,
            area=boxes[:, 2] * boxes[:, 3] if area is None else np.asarray(area, dtype=np.float32),
            iscrowd=np.zeros(len(boxes), dtype=np.int64) if iscrowd is None else np.asarray(iscrowd, dtype=np.int64),
        )
        read = read.select(keep)
        return self._with_masks(read, example, keep, height, width) if self.masks else read

    def _with_masks(self, objects: Objects, example: dict[str, Any], keep: Array, height: int, width: int) -> Objects:
        """The kept objects with their masks; those without are crowds."""
        segmentations = example["objects"].get("segmentation")
        if segmentations is None or len(segmentations) != len(keep):
            found = "no" if segmentations is None else f"{len(segmentations)} values of"
            raise ValueError(
                f"Image {example['image_id']} has {len(keep)} boxes but {found} 'segmentation': this needs a source "
                "with masks of objects, as polygons or run lengths."
            )
        try:
            masks = Masks.of([read_segmentation(text, height, width) for text in compress(segmentations, keep)])
        except ValueError as error:
            raise ValueError(f"An object of image {example['image_id']} {error}.") from error
        return replace(objects, masks=masks, iscrowd=np.where(masks.are_there, objects.iscrowd, 1))

    def _check_classes(self, class_labels: Array, num_boxes: int, image_id: int) -> None:
        if len(class_labels) != num_boxes:
            raise ValueError(f"Image {image_id} has {num_boxes} boxes but {len(class_labels)} classes.")
        if (
            self.num_classes is not None
            and (unknown := class_labels[(class_labels < 0) | (class_labels >= self.num_classes)]).size
        ):
            raise ValueError(
                f"Image {image_id} has an object of class {unknown[0]}, but there are {self.num_classes} classes, "
                f"0 to {self.num_classes - 1}. Compare the names of the source's classes with the model's."
            )

    def _count_dropped(self, num_dropped: int, image_id: int) -> None:
        if num_dropped and not self.num_dropped_boxes:
            logger.warning(
                "Dropping %d boxes of image %s that are empty or outside of it; further ones are not named.",
                num_dropped,
                image_id,
            )
        self.num_dropped_boxes += num_dropped
