"""Augmented views of an image for self-supervised pretraining, and the plain view for features.

The parameters of a view are sampled first (`sample_view`: numbers only, before the image is decoded, so that a JPEG is
decoded no larger than its crops need); then the view is rendered (`render_view`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.transforms.image_ops import (
    ColorStep,
    Normalizer,
    adjust_color,
    flip,
    gaussian_blur,
    resize,
    sample_color_jitter,
    solarize,
)
from hf_vlm.data.transforms.options import as_jitter, as_probability, as_range, as_size, build_settings, check_keys

__all__ = [
    "EvalTransform",
    "ViewParameters",
    "ViewSettings",
    "ViewTransform",
    "crop_box",
    "render_view",
    "required_size",
    "sample_view",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """The distribution that views are sampled from. The defaults only crop and flip, as MAE does.

    Args:
        size: Size of the view in pixels, one number or (height, width).
        crop_scale: Range of the crop's area as a fraction of the image's; sampled from the part of it that fits.
        crop_ratio: Range of the crop's width / height relative to the view's: how much the content is distorted.
        flip_probability: Probability of a horizontal flip.
        vertical_flip_probability: Probability of a vertical flip.
        jitter: Strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter, in random order
            (`image_ops.sample_color_jitter`).
        jitter_probability: Probability of applying the four together.
        grayscale_probability: Probability of losing the colours.
        blur_probability: Probability of a Gaussian blur.
        blur_sigma: Range of its standard deviation, in pixels of the view.
        solarize_probability: Probability of inverting all values from 128 on.

    Raises:
        ValueError: for a value out of its range.
    """

    size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 1.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "size": as_size("size", self.size),
            "crop_scale": as_range("crop_scale", self.crop_scale, low=0.0, high=1.0),
            "crop_ratio": as_range("crop_ratio", self.crop_ratio, low=0.0, high=math.inf),
            "jitter": as_jitter("jitter", self.jitter),
            "blur_sigma": as_range("blur_sigma", self.blur_sigma, low=0.0, high=math.inf),
        }
        for name in (
            "flip_probability",
            "vertical_flip_probability",
            "jitter_probability",
            "grayscale_probability",
            "blur_probability",
            "solarize_probability",
        ):
            checked[name] = as_probability(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def needs_colors(self) -> bool:
        return any(self.jitter) or self.grayscale_probability > 0


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """The sampled parameters of one view, which do not depend on the image's size.

    Args:
        area: Position in the range of areas that fit, 0 to 1.
        ratio: Width / height of the crop relative to the view's.
        y: Free space above the crop, as a fraction of all above and below it.
        x: Free space left of the crop, as a fraction of all left and right of it.
        flip: Mirror left and right.
        vertical_flip: Mirror top and bottom.
        color: Steps of `adjust_color`.
        sigma: Standard deviation of the blur in pixels of the view; 0 for none.
        solarize: Invert the bright values.
    """

    area: float
    ratio: float
    y: float
    x: float
    flip: bool = False
    vertical_flip: bool = False
    color: tuple[ColorStep, ...] = ()
    sigma: float = 0.0
    solarize: bool = False


def sample_view(settings: ViewSettings, rng: np.random.Generator) -> ViewParameters:
    """Sample the parameters of one view."""
    low, high = settings.crop_ratio
    color = sample_color_jitter(settings.jitter, rng) if rng.random() < settings.jitter_probability else ()
    if rng.random() < settings.grayscale_probability:
        color = (*color, ("saturation", 0.0))
    return ViewParameters(
        area=rng.random(),
        ratio=math.exp(rng.uniform(math.log(low), math.log(high))),
        y=rng.random(),
        x=rng.random(),
        flip=rng.random() < settings.flip_probability,
        vertical_flip=rng.random() < settings.vertical_flip_probability,
        color=color,
        sigma=rng.uniform(*settings.blur_sigma) if rng.random() < settings.blur_probability else 0.0,
        solarize=rng.random() < settings.solarize_probability,
    )


def crop_box(settings: ViewSettings, parameters: ViewParameters, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop in an image of that size, pixels."""
    ratio = parameters.ratio * settings.size[1] / settings.size[0]
    image_ratio = width / height
    largest = min(image_ratio / ratio, ratio / image_ratio)  # fraction of the area beyond which a side sticks out
    low, high = (min(scale, largest) for scale in settings.crop_scale)
    area = (low + parameters.area * (high - low)) * height * width
    crop_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    crop_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    top = round(parameters.y * (height - crop_height))
    left = round(parameters.x * (width - crop_width))
    return top, left, crop_height, crop_width


def required_size(settings: ViewSettings, parameters: ViewParameters) -> tuple[int, int]:
    """(height, width) of an image in which the crop is at least as large as the view, whatever the image's shape.

    Take the view as the unit square and an image of sides s and a * s, a >= 1. The crop's smaller side is
    s * sqrt(area * a * r) with r = min(ratio, 1 / ratio), and area * a is smallest for a = 1, where areas up to r fit.
    """
    distortion = min(parameters.ratio, 1 / parameters.ratio)
    low, high = (min(fraction, distortion) for fraction in settings.crop_scale)
    scale = math.sqrt((low + parameters.area * (high - low)) * distortion)
    return math.ceil(settings.size[0] / scale), math.ceil(settings.size[1] / scale)


def render_view(image: Array, settings: ViewSettings, parameters: ViewParameters) -> Array:
    """Render a sampled view of an image (H, W, C) uint8; returns (height, width, C) uint8."""
    top, left, height, width = crop_box(settings, parameters, *image.shape[:2])
    view = resize(image[top : top + height, left : left + width], settings.size)  # (h, w, C)
    view = flip(view, horizontal=parameters.flip, vertical=parameters.vertical_flip)
    if parameters.color:
        view = adjust_color(view, parameters.color)
    if parameters.sigma > 0:
        view = gaussian_blur(view, parameters.sigma)
    if parameters.solarize:
        view = solarize(view)
    return view


class ViewTransform:
    """Turns an example into normalised random views, for `ExampleStream`.

    Gives `pixel_values` (views, C, H, W) and, where local views are asked for, `local_pixel_values` (views, C, h, w),
    float32.

    Args:
        views: Settings of each view; all of one size.
        local_views: Settings of each local (small) view; all of one size.
        image_mean: Mean of the values in 0 to 1; one number, or one per channel.
        image_std: Standard deviation of the values in 0 to 1; one number, or one per channel.
        num_channels: Channels of the images; colour jitter and grayscale need 3.

    Raises:
        ValueError: for no view, views of different sizes, or colour operations on images without three channels.
    """

    def __init__(
        self,
        views: Sequence[ViewSettings],
        *,
        local_views: Sequence[ViewSettings] = (),
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
    ) -> None:
        if not views:
            raise ValueError("At least one view is needed.")
        for group in (views, local_views):
            if len(sizes := {settings.size for settings in group}) > 1:
                raise ValueError(f"Views of one batch must have one size, got {sorted(sizes)}.")
        if num_channels != 3 and any(settings.needs_colors for settings in (*views, *local_views)):
            raise ValueError(
                f"jitter and grayscale_probability need images of 3 channels, these have {num_channels}: "
                "set jitter to [0, 0, 0, 0] and grayscale_probability to 0."
            )
        self.views = tuple(views)
        self.local_views = tuple(local_views)
        self.num_channels = num_channels
        self.normalize = Normalizer(image_mean, image_std, num_channels=num_channels)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
    ) -> Self:
        """Build the transform from plain values: the fields of `ViewSettings` and

        - `num_views`: number of views (1);
        - `views`: a list with what is different in each view, instead of `num_views`;
        - `local`: what is different in local views, with their own `num_views`.

        For example `{"num_views": 2, "size": 224, "crop_scale": [0.4, 1.0], "blur_probability": 0.5,
        "local": {"num_views": 6, "size": 96, "crop_scale": [0.05, 0.4]}}`.

        Raises:
            ValueError: for an unknown name (with the nearest known one) and for values out of range.
        """
        known = [field.name for field in dataclasses.fields(ViewSettings)]
        check_keys(values, [*known, "num_views", "views", "local"], where="views")
        shared = {name: value for name, value in values.items() if name in known}
        local = {"num_views": 1, **values["local"]} if "local" in values else {"num_views": 0}
        num_local = local.pop("num_views")
        check_keys(local, known, where="views.local")
        return cls(
            [
                build_settings(ViewSettings, {**shared, **changes}, where=f"views.views[{index}]")
                for index, changes in enumerate(_changes(values))
            ],
            local_views=[build_settings(ViewSettings, {**shared, **local}, where="views.local")] * num_local,
            image_mean=image_mean,
            image_std=image_std,
            num_channels=num_channels,
        )

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, parameters = self.sample(example, rng)
        num_views = len(self.views)
        views = {"pixel_values": self._render(image, self.views, parameters[:num_views])}
        if self.local_views:
            views["local_pixel_values"] = self._render(image, self.local_views, parameters[num_views:])
        return views

    def sample(self, example: dict[str, Any], rng: np.random.Generator) -> tuple[Array, list[ViewParameters]]:
        """Sample all views, local ones last, and decode the image (H, W, C) uint8 as large as they need."""
        settings = (*self.views, *self.local_views)
        parameters = [sample_view(view, rng) for view in settings]
        at_least = self.required_size(parameters)
        image, _ = decode_image(example["image"], num_channels=self.num_channels, at_least=at_least)
        return image, parameters

    def required_size(self, parameters: Sequence[ViewParameters]) -> tuple[int, int]:
        """(height, width) of an image from which no sampled view is enlarged."""
        sizes = [required_size(*pair) for pair in zip((*self.views, *self.local_views), parameters)]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _render(
        self, image: Array, views: Sequence[ViewSettings], parameters: Sequence[ViewParameters]
    ) -> torch.Tensor:
        pixel_values = np.empty((len(views), self.num_channels, *views[0].size), dtype=np.float32)  # (V, C, H, W)
        for settings, sampled, out in zip(views, parameters, pixel_values):
            self.normalize(render_view(image, settings, sampled), out)
        return torch.from_numpy(pixel_values)


def _changes(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is different in each view."""
    changes = values.get("views", [{}] * values.get("num_views", 1))
    if len(changes) != values.get("num_views", len(changes)):
        raise ValueError(f"views lists {len(changes)} views but num_views is {values['num_views']}.")
    return list(changes)


class EvalTransform:
    """The plain view of an example, for features and evaluation.

    Gives `pixel_values` (C, H, W) float32, and `label` where the example has one.

    Args:
        size: Size of the view in pixels, one number or (height, width).
        center: Cut out the largest box of the view's shape around the centre; otherwise the whole image is resized,
            as the image processor does.
        image_mean: Mean of the values in 0 to 1; one number, or one per channel.
        image_std: Standard deviation of the values in 0 to 1; one number, or one per channel.
        num_channels: Channels of the images.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        center: bool = False,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
    ) -> None:
        self.size = as_size("size", size)
        self.center = center
        self.num_channels = num_channels
        self.normalize = Normalizer(image_mean, image_std, num_channels=num_channels)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, _ = decode_image(example["image"], num_channels=self.num_channels, at_least=self.size)
        if self.center:
            image = self._center(image)
        pixel_values = np.empty((self.num_channels, *self.size), dtype=np.float32)  # (C, H, W)
        self.normalize(resize(image, self.size), pixel_values)
        transformed = {"pixel_values": torch.from_numpy(pixel_values)}
        return {**transformed, "label": example["label"]} if "label" in example else transformed

    def _center(self, image: Array) -> Array:
        height, width = image.shape[:2]
        scale = min(height / self.size[0], width / self.size[1])
        box_height, box_width = max(round(self.size[0] * scale), 1), max(round(self.size[1] * scale), 1)
        top, left = (height - box_height) // 2, (width - box_width) // 2
        return image[top : top + box_height, left : left + box_width]
