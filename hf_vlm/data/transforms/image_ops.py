"""Operations on decoded uint8 images (H, W, C) that the transforms share; opencv and torch do the work.

Colour follows Pillow's ImageEnhance, whose brightness, contrast and saturation are affine maps of RGB: a run of them
becomes one matrix and one pass. Unlike in Pillow, values are clipped once per run instead of after every step.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "ColorStep",
    "Normalizer",
    "adjust_color",
    "flip",
    "fold_color",
    "gaussian_blur",
    "resize",
    "rotate_quarter_turns",
    "sample_color_jitter",
    "shrink",
    "solarize",
]

Array = np.ndarray[Any, Any]
ColorStep = tuple[
    str, float
]  # "brightness", "contrast", "saturation" with a factor, or "hue" with a fraction of the circle

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow converts to grey
NO_CHANGE = np.eye(3, 6)  # a run of colour steps that changes nothing
ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}
COLOR_STEPS = ("brightness", "contrast", "saturation", "hue")


def resize(image: Array, size: tuple[int, int]) -> Array:
    """Resize to `size` = (height, width) with Pillow's bilinear filter, which does not alias.

    torch computes it as Pillow-SIMD does: the same pixels as `Image.resize`, which the image processor uses, and up to
    six times faster than opencv's area interpolation.
    """
    if image.shape[:2] == size:
        return image
    # The strides of a batch in channels-last order, which torch then resizes and returns as it lies in memory.
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # (1, C, H, W), a view
    resized = F.interpolate(planes, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()  # type: ignore[no-any-return]  # (h, w, C)


def shrink(image: Array, by: int) -> Array:
    """Divide the sides by a whole number: each pixel becomes the mean of `by` x `by`; what is left over is cut off."""
    height, width = (side // by * by for side in image.shape[:2])
    size = width // by, height // by
    return cv2.resize(image[:height, :width], size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], -1)


def flip(image: Array, *, horizontal: bool, vertical: bool) -> Array:
    """Mirror left and right, top and bottom, or both."""
    if not horizontal and not vertical:
        return image
    code = -1 if horizontal and vertical else int(horizontal)
    return cv2.flip(image, code).reshape(image.shape)


def rotate_quarter_turns(image: Array, quarter_turns: int) -> Array:
    """Turn counterclockwise, 1 to 3 times by 90 degrees."""
    turned = cv2.rotate(image, ROTATIONS[quarter_turns])
    return turned.reshape(*turned.shape[:2], image.shape[2])


def sample_color_jitter(strengths: Sequence[float], rng: np.random.Generator) -> tuple[ColorStep, ...]:
    """Sample colour steps, in random order.

    Args:
        strengths: Strengths s of brightness, contrast, saturation (factors of 1 - s to 1 + s) and hue (shifts of
            -s to s of the circle); a step of strength 0 is left out.
        rng: Generator of the random numbers.
    """
    steps = []
    for index in rng.permutation(4).tolist():
        strength = strengths[index]
        if strength > 0:
            middle = 0.0 if COLOR_STEPS[index] == "hue" else 1.0
            steps.append((COLOR_STEPS[index], float(rng.uniform(middle - strength, middle + strength))))
    return tuple(steps)


def adjust_color(image: Array, steps: Sequence[ColorStep]) -> Array:
    """Apply colour steps, in their order, to an RGB image (H, W, 3)."""
    before, shift, after = fold_color(steps)
    image = _mix(image, before)
    return _mix(_shift_hue(image, shift), after) if shift else image


def fold_color(steps: Sequence[ColorStep]) -> tuple[Array, int, Array]:
    """Fold colour steps, of which at most one shifts the hue, into (before, shift, after).

    `shift` is that of the hue, in 256ths of the circle, and 0 for none. `before` and `after`, each (3, 6), are the
    runs of steps around it: a run makes of each colour c, in an image of mean m, `run[:, :3] @ c + run[:, 3:] @ m`.
    """
    names = [name for name, _ in steps]
    position = names.index("hue") if "hue" in names else len(steps)
    shift = round(steps[position][1] * 256) % 256 if position < len(steps) else 0
    if not shift:  # one run
        return _fold_run([step for step in steps if step[0] != "hue"]), 0, NO_CHANGE
    return _fold_run(steps[:position]), shift, _fold_run(steps[position + 1 :])


def _fold_run(steps: Sequence[ColorStep]) -> Array:
    """(3, 6) of steps that each mix the image with black, with its mean grey or with its own grey."""
    run = NO_CHANGE
    for name, factor in steps:
        # The same grey for all three colours.
        grey = (1.0 - factor) * (LUMA @ run)  # (6,)
        if name == "contrast":  # of the mean, on which the run acts as on any colour
            grey = np.concatenate([np.zeros(3), grey[:3] + grey[3:]])
        elif name == "brightness":
            grey = np.zeros(6)
        else:
            assert name == "saturation", name
        run = factor * run + grey
    return run


def _mix(image: Array, run: Array) -> Array:
    if run is NO_CHANGE:
        return image
    offset = run[:, 3:] @ cv2.mean(image)[:3] if run[:, 3:].any() else np.zeros(3)
    return cv2.transform(image, np.column_stack([run[:, :3], offset]))  # rounds, and clips to 0 to 255


def _shift_hue(image: Array, shift: int) -> Array:
    """Turn the hue by 256ths of the circle, in HSV with 256 hues, as precise as Pillow's."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(shift)  # wraps around, as hues do
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image: Array, sigma: float) -> Array:
    """Blur with a Gaussian of `sigma` pixels, cut at three sigma, the border mirrored."""
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel).reshape(image.shape)


def solarize(image: Array) -> Array:
    """Invert all values from 128 on."""
    values = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(values < 128, values, 255 - values)).reshape(image.shape)


class Normalizer:
    """uint8 (H, W, C) to float32 (C, H, W): `(value / 255 - mean) / std` for each channel.

    Args:
        image_mean: One number, or one per channel.
        image_std: One number, or one per channel.
        num_channels: Channels of the images.

    Raises:
        ValueError: when the numbers do not fit the channels, or a deviation is not positive.
    """

    def __init__(
        self, image_mean: float | Sequence[float], image_std: float | Sequence[float], *, num_channels: int
    ) -> None:
        mean = np.asarray(image_mean, dtype=np.float64)
        std = np.asarray(image_std, dtype=np.float64)
        for name, values in (("image_mean", mean), ("image_std", std)):
            if values.shape not in ((), (1,), (num_channels,)):
                raise ValueError(
                    f"{name} must be one number or one per channel ({num_channels}), got {values.tolist()}."
                )
        if (std <= 0).any():
            raise ValueError(f"image_std must be positive, got {std.tolist()}.")
        self.num_channels = num_channels
        self.scale: list[float] = np.broadcast_to(1 / (255 * std), num_channels).tolist()
        self.shift: list[float] = np.broadcast_to(-mean / std, num_channels).tolist()
        # The mean as a pixel: a padding that becomes (nearly) zero.
        self.fill: Array = np.broadcast_to(np.clip(np.rint(255 * mean), 0, 255), num_channels).astype(np.uint8)

    def __call__(self, image: Array, out: Array) -> None:
        """Normalise the image (H, W, C) uint8 into `out` (C, H, W) float32."""
        for channel, plane in enumerate(cv2.split(image)):
            # One pass that converts, scales and shifts; numpy needs two.
            cv2.addWeighted(
                plane, self.scale[channel], plane, 0.0, self.shift[channel], dst=out[channel], dtype=cv2.CV_32F
            )

    def invert(self, pixel_values: Array) -> Array:
        """Normalised (C, H, W) back to uint8 (H, W, C)."""
        values = (pixel_values.transpose(1, 2, 0) - self.shift) / self.scale  # (H, W, C)
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)
