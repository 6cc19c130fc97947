"""Decodes an example with objects, augments it and gives what a detector is trained and evaluated on."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from hf_vlm.data.boxes import clean_boxes
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.transforms.image_ops import (
    ColorStep,
    Normalizer,
    adjust_color,
    flip,
    resize,
    rotate_quarter_turns,
    sample_color_jitter,
)
from hf_vlm.data.transforms.objects import Objects, Span
from hf_vlm.data.transforms.options import as_jitter, as_probability, as_range, as_size, build_settings

__all__ = ["DetectionParameters", "DetectionSettings", "DetectionTransform", "sample_detection"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

NUM_POSITIONS = 8  # tried for a window that keeps an object


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """How training images are augmented.

    Args:
        flip_probability: Probability of a horizontal flip; 0 where left and right matter, as for digits.
        vertical_flip_probability: Probability of a vertical flip.
        quarter_turn_probability: Probability of a turn by 90, 180 or 270 degrees, for images without an up and down.
        crop_probability: Probability of showing a window of the image instead of all of it.
        crop_scale: Range of the window's area as a fraction of the image's; above 1 the image is pasted into a larger
            canvas of the mean colour, which makes its objects small.
        crop_ratio: Range of the window's width / height relative to the image's.
        min_visible: Fraction of its area that an object must show in the window to be kept.
        jitter: Strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        jitter_probability: Probability of applying the four together.

    Raises:
        ValueError: for a value out of its range.
    """

    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    quarter_turn_probability: float = 0.0
    crop_probability: float = 0.5
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    min_visible: float = 0.3
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.8

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "crop_scale": as_range("crop_scale", self.crop_scale, low=0.0, high=16.0),
            "crop_ratio": as_range("crop_ratio", self.crop_ratio, low=0.0, high=math.inf),
            "jitter": as_jitter("jitter", self.jitter),
        }
        names = (
            "flip_probability",
            "vertical_flip_probability",
            "quarter_turn_probability",
            "crop_probability",
            "min_visible",
            "jitter_probability",
        )
        for name in names:
            checked[name] = as_probability(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class DetectionParameters:
    """The sampled parameters of one augmentation; the default changes nothing.

    Args:
        quarter_turns: Number of counterclockwise turns by 90 degrees, 0 to 3, done first.
        window: (height, width) of the window relative to the image's; None for the whole image.
        positions: (n, 2), y and x of the window, 0 to 1 in its free range; the first that keeps an object is taken.
        flip: Mirror left and right.
        vertical_flip: Mirror top and bottom.
        color: Steps of `adjust_color`.
    """

    quarter_turns: int = 0
    window: tuple[float, float] | None = None
    positions: tuple[tuple[float, float], ...] = ()
    flip: bool = False
    vertical_flip: bool = False
    color: tuple[ColorStep, ...] = ()


def sample_detection(settings: DetectionSettings, rng: np.random.Generator) -> DetectionParameters:
    """Sample the parameters of one augmentation."""
    window = None
    positions: tuple[tuple[float, float], ...] = ()
    if rng.random() < settings.crop_probability:
        area = rng.uniform(*settings.crop_scale)
        low, high = settings.crop_ratio
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        window = math.sqrt(area / ratio), math.sqrt(area * ratio)
        if area <= 1:  # a crop does not stick out
            window = min(window[0], 1.0), min(window[1], 1.0)
        positions = tuple((y, x) for y, x in rng.random((NUM_POSITIONS, 2)).tolist())
    return DetectionParameters(
        quarter_turns=int(rng.integers(1, 4)) if rng.random() < settings.quarter_turn_probability else 0,
        window=window,
        positions=positions,
        flip=rng.random() < settings.flip_probability,
        vertical_flip=rng.random() < settings.vertical_flip_probability,
        color=sample_color_jitter(settings.jitter, rng) if rng.random() < settings.jitter_probability else (),
    )


class DetectionTransform:
    """Turns an example with `objects` into a detector's input and labels, for `ExampleStream`.

    Gives `pixel_values` (C, H, W) float32, normalised, the image resized to `size` whatever its shape, and `labels`:

    - `class_labels` (n,) int64;
    - `boxes` (n, 4) float32, centre x, centre y, width, height relative to the output;
    - `image_id` (1,) int64; `orig_size` (2,) int64, height and width of the original as it is displayed;
    - `area` (n,) float32, pixels of the original; `iscrowd` (n,) int64.

    Boxes are clipped to the image, and degenerate ones dropped with all that belongs to them. In training crowds are
    dropped too, as they name no single object.

    Args:
        size: Size of the output in pixels, one number or (height, width).
        train: Whether to augment.
        image_mean: Mean of the values in 0 to 1; one number, or one per channel.
        image_std: Standard deviation of the values in 0 to 1; one number, or one per channel.
        num_channels: Channels of the images; colour jitter needs 3.
        num_classes: Number of classes, below which class ids are checked to lie; None for no check.
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
        settings: DetectionSettings | None = None,
    ) -> None:
        self.size = as_size("size", size)
        self.train = train
        self.num_channels = num_channels
        self.num_classes = num_classes
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
        parameters = sample_detection(self.settings, rng) if self.train else DetectionParameters()
        image, original_size = decode_image(
            example["image"], num_channels=self.num_channels, at_least=self._required_size(parameters)
        )
        objects = self._read_objects(example, *original_size)
        if self.train:
            objects = objects.select(objects.iscrowd == 0)
        image, objects = self.render(image, objects, parameters)
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
            },
        }

    def render(self, image: Array, objects: Objects, parameters: DetectionParameters) -> tuple[Array, Objects]:
        """Apply a sampled augmentation: the image (height, width, C) uint8 of the output size, and its objects."""
        if parameters.quarter_turns:
            image = rotate_quarter_turns(image, parameters.quarter_turns)
            objects = objects.turn(parameters.quarter_turns)
        (rows, columns), objects = self._choose_window(image, objects, parameters)
        shown = resize(
            image[slice(*rows.source), slice(*columns.source)],
            (rows.target[1] - rows.target[0], columns.target[1] - columns.target[0]),
        )
        if parameters.color:
            shown = adjust_color(shown, parameters.color)
        if shown.shape[:2] != self.size:
            canvas = np.empty((*self.size, self.num_channels), dtype=np.uint8)
            canvas[:] = self.normalize.fill
            canvas[slice(*rows.target), slice(*columns.target)] = shown
            shown = canvas
        shown = flip(shown, horizontal=parameters.flip, vertical=parameters.vertical_flip)
        return shown, objects.flip(horizontal=parameters.flip, vertical=parameters.vertical_flip)

    def _choose_window(
        self, image: Array, objects: Objects, parameters: DetectionParameters
    ) -> tuple[tuple[Span, Span], Objects]:
        """The first window that keeps an object; all of the image when none does."""
        height, width = image.shape[:2]
        if parameters.window is not None:
            for y, x in parameters.positions:
                rows = Span.of_window(height, self.size[0], parameters.window[0], y)
                columns = Span.of_window(width, self.size[1], parameters.window[1], x)
                kept = objects.crop(rows, columns, min_visible=self.settings.min_visible)
                if len(kept) or not len(objects):
                    return (rows, columns), kept
        rows, columns = Span.of_window(height, self.size[0], 1.0, 0.0), Span.of_window(width, self.size[1], 1.0, 0.0)
        return (rows, columns), objects

    def _required_size(self, parameters: DetectionParameters) -> tuple[int, int]:
        """(height, width) of a decoded image of which the window need not be enlarged."""
        window = parameters.window or (1.0, 1.0)
        height, width = (math.ceil(side / fraction) for side, fraction in zip(self.size, window))
        return (width, height) if parameters.quarter_turns % 2 else (height, width)

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
        return read.select(keep)

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
