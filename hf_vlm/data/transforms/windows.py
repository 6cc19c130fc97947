"""Windows of images: the geometric augmentation of whatever is annotated in places, and colours beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vlm.data.tiles import Tiling
from hf_vlm.data.transforms.image_ops import ColorStep, adjust_color, flip, resize, sample_color_jitter
from hf_vlm.data.transforms.objects import Span
from hf_vlm.data.transforms.options import as_jitter, as_probability, as_range
from hf_vlm.models.image_processing_vlm_vit import fitted_size

__all__ = ["WindowParameters", "WindowSettings", "pad_to", "render_window", "sample_window", "window_spans"]

Array = np.ndarray[Any, Any]

NUM_POSITIONS = 8  # tried for a window that shows what it should


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How windows are sampled.

    Args:
        flip_probability: Probability of a horizontal flip; 0 where left and right matter, as for digits.
        vertical_flip_probability: Probability of a vertical flip.
        quarter_turn_probability: Probability of a turn by 90, 180 or 270 degrees, for images without an up and down.
        crop_probability: Probability of showing a window of the image instead of all of it.
        crop_scale: Range of the window's area as a fraction of the image's; above 1 the image is pasted into a larger
            canvas of the mean colour, which makes its objects small.
        crop_ratio: Range of the window's width / height relative to the image's.
        tile: Side in pixels of square tiles, of which each image shows one at a random position, as `predict` and
            `evaluate` look at them; crops are then relative to the tile, and images that fit into it are shown whole.
            None for windows of the whole image.
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
    tile: int | None = None
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.8

    def __post_init__(self) -> None:
        if self.tile is not None:
            Tiling(self.tile)  # says what it must be
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
            "jitter_probability",
        )
        for name in names:
            checked[name] = as_probability(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class WindowParameters:
    """The sampled parameters of one augmentation; the default changes nothing.

    Args:
        quarter_turns: Number of counterclockwise turns by 90 degrees, 0 to 3, done first.
        window: (height, width) of the window relative to the image's, or to the tile's; None for all of it.
        positions: (n, 2), y and x of the window, 0 to 1 in its free range; the first that shows what it should is
            taken.
        tile: Side of the tile in pixels of the original image; None where windows are of the whole image.
        flip: Mirror left and right.
        vertical_flip: Mirror top and bottom.
        color: Steps of `adjust_color`.
    """

    quarter_turns: int = 0
    window: tuple[float, float] | None = None
    positions: tuple[tuple[float, float], ...] = ()
    tile: int | None = None
    flip: bool = False
    vertical_flip: bool = False
    color: tuple[ColorStep, ...] = ()

    def window_of(self, image_hw: tuple[int, int]) -> tuple[float, float]:
        """(height, width) of the window relative to those of an original image, which is turned already."""
        height, width = self.window or (1.0, 1.0)
        if self.tile is None:
            return height, width
        return height * min(self.tile / image_hw[0], 1.0), width * min(self.tile / image_hw[1], 1.0)

    def required_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(height, width) of a decoded image of which the window need not be enlarged to `size`; None where that
        depends on the image."""
        if self.tile is not None:
            return None
        window = self.window or (1.0, 1.0)
        height, width = (math.ceil(side / fraction) for side, fraction in zip(size, window))
        return self.turned_size((height, width))

    def turned_size(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of an image after, or before, its turns."""
        height, width = image_hw
        return (width, height) if self.quarter_turns % 2 else (height, width)


def sample_window(settings: WindowSettings, rng: np.random.Generator) -> WindowParameters:
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
    if window is not None or settings.tile is not None:
        positions = tuple((y, x) for y, x in rng.random((NUM_POSITIONS, 2)).tolist())
    return WindowParameters(
        quarter_turns=int(rng.integers(1, 4)) if rng.random() < settings.quarter_turn_probability else 0,
        window=window,
        positions=positions,
        tile=settings.tile,
        flip=rng.random() < settings.flip_probability,
        vertical_flip=rng.random() < settings.vertical_flip_probability,
        color=sample_color_jitter(settings.jitter, rng) if rng.random() < settings.jitter_probability else (),
    )


def window_spans(
    image_hw: tuple[int, int],
    window: tuple[float, float],
    position: tuple[float, float],
    *,
    size: tuple[int, int],
    letterbox: tuple[int, int] | None,
) -> tuple[Span, Span]:
    """The rows and columns of a window.

    Args:
        image_hw: Height and width of the image as it was decoded and turned.
        window: Height and width of the window, relative to the image's.
        position: Its y and x, 0 to 1 in its free range.
        size: Height and width of the output.
        letterbox: Height and width of the original image, where the window keeps its aspect ratio and fills a part of
            `size` alone; None where it fills all of it.
    """
    if letterbox is not None:
        size = fitted_size((letterbox[0] * window[0], letterbox[1] * window[1]), size)
    rows, columns = (Span.of_window(*axis) for axis in zip(image_hw, size, window, position, strict=True))
    return rows, columns


def pad_to(image: Array, size: tuple[int, int], fill: Any) -> Array:
    """The image (height, width, C) at the upper left of one of `size`, of the values `fill` (C,)."""
    if image.shape[:2] == size:
        return image
    padded = np.empty((*size, image.shape[2]), dtype=image.dtype)
    padded[:] = fill
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def render_window(
    image: Array,
    rows: Span,
    columns: Span,
    parameters: WindowParameters,
    *,
    fill: Any,
    resize: Callable[[Array, tuple[int, int]], Array] = resize,
) -> Array:
    """The window of an image, coloured and mirrored by the parameters.

    Args:
        image: (height, width, C), turned already.
        rows: What is shown of the rows, and where.
        columns: What is shown of the columns, and where.
        parameters: Colours and flips.
        fill: Values (C,) of the output where it does not show the image.
        resize: Function `(image, (height, width))`.

    Returns:
        (rows.output, columns.output, C), of the type of the image.
    """
    shown = resize(
        image[slice(*rows.source), slice(*columns.source)],
        (rows.target[1] - rows.target[0], columns.target[1] - columns.target[0]),
    )
    if parameters.color:
        shown = adjust_color(shown, parameters.color)
    if shown.shape[:2] != (rows.output, columns.output):
        canvas = np.empty((rows.output, columns.output, image.shape[2]), dtype=image.dtype)
        canvas[:] = fill
        canvas[slice(*rows.target), slice(*columns.target)] = shown
        shown = canvas
    return flip(shown, horizontal=parameters.flip, vertical=parameters.vertical_flip)
