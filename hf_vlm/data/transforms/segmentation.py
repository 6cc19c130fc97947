"""Decodes an example with a mask, augments both together and gives what a segmenter is trained and evaluated on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.masks import IGNORED, read_classes
from hf_vlm.data.transforms.collate import stack
from hf_vlm.data.transforms.image_ops import Normalizer, rotate_quarter_turns
from hf_vlm.data.transforms.objects import Span
from hf_vlm.data.transforms.options import as_probability, as_size, build_settings
from hf_vlm.data.transforms.windows import (
    WindowParameters,
    WindowSettings,
    pad_to,
    render_window,
    sample_window,
    window_spans,
)

__all__ = ["SegmentationEvalTransform", "SegmentationSettings", "SegmentationTransform", "collate_segmentation"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(WindowSettings):
    """How training images and their masks are augmented: as `WindowSettings` says, colours in the image alone.

    Args:
        max_class_fraction: Largest fraction of a window's labelled pixels that may be of one class: the first of eight
            sampled positions that keeps to it is taken, or the last of them. 1 takes the first.

    Raises:
        ValueError: for a value out of its range.
    """

    max_class_fraction: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "max_class_fraction", as_probability("max_class_fraction", self.max_class_fraction))


class SegmentationTransform:
    """Turns an example with a `mask` into a segmenter's input and labels, for `ExampleStream`.

    Gives `pixel_values` (C, H, W) float32, normalised, the image resized to `size` whatever its shape or, with
    `letterbox`, to fit into it, with padding of the mean colour at the right or the bottom; and `labels` (H, W) uint8:
    the class of each pixel, 255 for those without one and for what is beside the image. Masks are resized to the
    nearest value.

    Args:
        size: Size of the output in pixels, one number or (height, width).
        num_classes: Number of classes, below which the mask's values are checked to lie.
        image_mean: Mean of the values in 0 to 1; one number, or one per channel.
        image_std: Standard deviation of the values in 0 to 1; one number, or one per channel.
        num_channels: Channels of the images; colour jitter needs 3.
        letterbox: Whether to keep the aspect ratio.
        settings: Settings of the augmentation; None for the defaults.

    Raises:
        ValueError: for options that do not fit each other; on a call, for a mask that is missing, of another size than
            its image, or has values that are no class. `BadImageError` for an image or a mask that cannot be decoded.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        num_classes: int,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
        letterbox: bool = False,
        settings: SegmentationSettings | None = None,
    ) -> None:
        self.size = as_size("size", size)
        self.num_classes = num_classes
        self.num_channels = num_channels
        self.letterbox = letterbox
        self.settings = settings or SegmentationSettings()
        self.normalize = Normalizer(image_mean, image_std, num_channels=num_channels)
        if num_channels != 3 and any(self.settings.jitter):
            raise ValueError(f"jitter needs images of 3 channels, these have {num_channels}: set it to [0, 0, 0, 0].")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, size: int | tuple[int, int], **options: Any) -> Self:
        """Build the transform with the fields of `SegmentationSettings` as plain values, and the options of the class.

        Raises:
            ValueError: for an unknown name (with the nearest known one) and for values out of range.
        """
        settings = build_settings(SegmentationSettings, values, where="the segmentation augmentation")
        return cls(size, settings=settings, **options)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        parameters = sample_window(self.settings, rng)
        image, original_size = decode_image(
            example["image"], num_channels=self.num_channels, at_least=parameters.required_size(self.size)
        )
        mask = read_labels(example, self.num_classes, original_size)
        image, mask = self.render(image, mask, parameters)
        image, mask = pad_to(image, self.size, self.normalize.fill), pad_to(mask, self.size, IGNORED)[:, :, 0]
        pixel_values = np.empty((self.num_channels, *self.size), dtype=np.float32)  # (C, H, W)
        self.normalize(image, pixel_values)
        return {"pixel_values": torch.from_numpy(pixel_values), "labels": torch.from_numpy(np.ascontiguousarray(mask))}

    def render(self, image: Array, mask: Array, parameters: WindowParameters) -> tuple[Array, Array]:
        """Apply a sampled augmentation: the image (h, w, C) and the mask (h, w, 1) uint8 before they are padded."""
        original_size = mask.shape[:2]
        mask = resize_nearest(mask[:, :, None], image.shape[:2])  # (height, width, 1), of an image decoded smaller
        if parameters.quarter_turns:
            image = rotate_quarter_turns(image, parameters.quarter_turns)
            mask = rotate_quarter_turns(mask, parameters.quarter_turns)
            original_size = parameters.turned_size(original_size)
        rows, columns = self._choose_window(mask, parameters, original_size)
        image = render_window(image, rows, columns, parameters, fill=self.normalize.fill)
        mask = render_window(mask, rows, columns, replace(parameters, color=()), fill=IGNORED, resize=resize_nearest)
        return image, mask

    def _choose_window(
        self, mask: Array, parameters: WindowParameters, original_size: tuple[int, int]
    ) -> tuple[Span, Span]:
        image_size = (mask.shape[0], mask.shape[1])
        window, letterbox = parameters.window_of(original_size), original_size if self.letterbox else None
        for position in parameters.positions or ((0.0, 0.0),):
            rows, columns = window_spans(image_size, window, position, size=self.size, letterbox=letterbox)
            counts = np.bincount(mask[slice(*rows.source), slice(*columns.source)].ravel(), minlength=IGNORED + 1)
            counts = counts[:IGNORED]
            if 0 < counts.max() <= self.settings.max_class_fraction * counts.sum():
                break
        return rows, columns


@dataclass(frozen=True)
class SegmentationEvalTransform:
    """Prepares an image as the image processor does, and its mask as it is, for `ExampleStream`.

    Gives `pixel_values` (1 or windows, C, H, W) float32, normalised, and `labels` (height, width) uint8 of the
    image's own size: the class of each pixel, 255 for those without one.

    Args:
        processor: Image processor of a segmenter.
        num_classes: Number of classes.

    Raises:
        ValueError: on a call, as for `SegmentationTransform`.
    """

    processor: Any
    num_classes: int

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        image, size = decode_image(example["image"], num_channels=self.processor.num_channels)
        labels = read_labels(example, self.num_classes, size)
        inputs = self.processor(image, return_tensors="pt", input_data_format="channels_last")
        return {"pixel_values": inputs["pixel_values"], "labels": torch.from_numpy(labels)}


def read_labels(example: dict[str, Any], num_classes: int, image_size: tuple[int, int]) -> Array:
    """The classes of an image's pixels (height, width) uint8, 255 for those without one.

    Raises:
        ValueError: The mask is missing, of another size than its image, or has values that are no class.
    """
    mask = read_classes(example, num_classes)
    if mask.shape != image_size:
        sizes = " but ".join(f"{width} x {height}" for height, width in (mask.shape, image_size))
        raise ValueError(
            f"The mask of image {example.get('image_id')} is {sizes} is its image: masks must be of the size that "
            "their image is shown at."
        )
    return mask


def resize_nearest(mask: Array, size: tuple[int, int]) -> Array:
    """Resize a mask (height, width, 1) uint8 to the values that are nearest to the centres of the new pixels."""
    if mask.shape[:2] == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).reshape(*size, 1)


def collate_segmentation(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack `pixel_values` to (B, C, H, W) and `labels` to (B, H, W)."""
    return {name: stack([example[name] for example in examples]) for name in ("pixel_values", "labels")}
