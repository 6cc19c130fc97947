"""The views of a `ViewTransform` made in batches on the device of the model, from the same sampled parameters.

The workers decode, sample and send uint8 images with their parameters; the device renders whole batches by matrices. A
crop, its resize, and its flips are one small matrix along each side of an image, and a blur is another pair:

    view = rows @ image @ columns^T        rows (h, H), columns (w, W)

which an accelerator multiplies at the speed of its matrix units. Nothing is sampled here and nothing waits for the
device: which views are blurred is known before.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vlm.data.transforms.collate import empty_batch, stack
from hf_vlm.data.transforms.image_ops import fold_color, shrink
from hf_vlm.data.transforms.views import ViewParameters, ViewSettings, ViewTransform, crop_box

__all__ = ["DeviceViews"]

Array = np.ndarray[Any, Any]

# The parameters of a view that are sent, and how many numbers each has. `box` is (top, left, height, width) of the
# crop, `flip` (vertical, horizontal), `color` the runs before and after the shift of the hue (see `fold_color`).
FIELDS = {"box": 4, "flip": 2, "color": 36, "hue": 1, "sigma": 1, "solarize": 1}

SENT = ("images", "parameters", "blurred")  # of a batch, what the views are made of

# Longest side that is sent, relative to what the views of the image need: a batch is as large as its largest image.
MAX_LENGTH = 4


class DeviceViews:
    """One transform in three parts: `sample` in the workers, `collate` in the loader, `render` on the device.

    Gives what `ViewTransform` and `collate_views` give, within a grey level or two: colours are not rounded to 8 bits
    in between and hues not to 256.

    Args:
        transform: The transform whose views are made.
        dtype: Type in which images are resized and blurred; by default float16 on an accelerator, whose matrix units
            sum in float32, and float32 on a CPU. Colours are changed in float32.
    """

    def __init__(self, transform: ViewTransform, dtype: torch.dtype | None = None) -> None:
        self.transform = transform
        self.dtype = dtype
        groups = {"pixel_values": transform.views, "local_pixel_values": transform.local_views}
        self.groups = {name: views for name, views in groups.items() if views}

    def sample(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The image (H, W, C) uint8 and the parameters of each group of views, sampled as `ViewTransform` does."""
        image, sampled = self.transform.sample(example, rng)
        image = _bounded(image, self.transform.required_size(sampled))
        remaining = iter(sampled)
        packed = {
            name: torch.stack([_pack(view, next(remaining), image.shape[:2]) for view in views])  # (V, 45)
            for name, views in self.groups.items()
        }
        return {"image": torch.from_numpy(image), "parameters": packed}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad the images to one size and stack the parameters.

        Returns:
            `images` (B, H, W, C) uint8, `parameters` and `blurred`, each a dict by group: (B, V, 45) float32, and the
            positions among the B * V views of those that are blurred.
        """
        images = [example["image"] for example in examples]
        height, width = (max(image.shape[side] for image in images) for side in (0, 1))
        padded = empty_batch(len(images), (height, width, images[0].shape[2]), torch.uint8)  # (B, H, W, C)
        for image, target in zip(images, padded):
            target[: image.shape[0], : image.shape[1]] = image  # what lies beyond has no weight in any view
        parameters = {name: stack([example["parameters"][name] for example in examples]) for name in self.groups}
        blurred = {name: _unpack(packed)["sigma"].flatten().nonzero()[:, 0] for name, packed in parameters.items()}
        return {"images": padded, "parameters": parameters, "blurred": blurred}

    @torch.no_grad()
    def render(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`pixel_values` (B, V, C, h, w) float32 and, where there are any, `local_pixel_values`, on the device.

        What else the batch holds stays as it is.
        """
        images = batch["images"]
        dtype = self.dtype or (torch.float32 if images.device.type == "cpu" else torch.float16)
        rows = images.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format)  # (B, H, C, W)
        views = {
            name: self._render(rows, views, _unpack(batch["parameters"][name]), batch["blurred"][name])
            for name, views in self.groups.items()
        }
        return {**{name: value for name, value in batch.items() if name not in SENT}, **views}

    def _render(
        self, images: Tensor, settings: Sequence[ViewSettings], parameters: dict[str, Tensor], blurred: Tensor
    ) -> Tensor:
        height, width = settings[0].size
        num_images, num_views = parameters["hue"].shape[:2]
        down, across = (
            resize_matrix(size, images.shape[side], parameters["box"][..., [i, i + 2]], parameters["flip"][..., i])
            for i, (side, size) in enumerate(((1, height), (3, width)))
        )  # (B, V, h, H) and (B, V, w, W)
        views = _multiply(images, down.to(images.dtype), across.to(images.dtype)).flatten(0, 1)  # (B * V, C, h, w)
        parameters = {name: values.flatten(0, 1) for name, values in parameters.items()}
        if any(view.needs_colors for view in settings):
            views = self._recolor(views, parameters, has_hue=any(view.jitter[3] > 0 for view in settings))
        if any(view.blur_probability > 0 for view in settings):
            max_sigma = max(view.blur_sigma[1] for view in settings)
            views = _blur(views, blurred, parameters["sigma"], max_sigma, images.dtype)
        if any(view.solarize_probability > 0 for view in settings):
            inverted = (parameters["solarize"] > 0)[:, :, None, None] & (views >= 127.5)  # 128 when rounded
            views = torch.where(inverted, 255 - views, views)
        normalize = self.transform.normalize
        for plane, scale, shift in zip(views.unbind(1), normalize.scale, normalize.shift):
            plane.mul_(scale).add_(shift)
        return views.unflatten(0, (num_images, num_views))  # (B, V, C, h, w)

    @staticmethod
    def _recolor(views: Tensor, parameters: dict[str, Tensor], *, has_hue: bool) -> Tensor:
        before, after = parameters["color"].unflatten(1, (2, 3, 6)).unbind(1)  # (N, 3, 6) each
        views = _mix(views, before)
        return _mix(shift_hue(views, parameters["hue"]), after) if has_hue else views


def _bounded(image: Array, at_least: tuple[int, int]) -> Array:
    """Shrink an image by a whole number where it stays as large as needed, as a JPEG is decoded smaller."""
    ratios = [side / needed for side, needed in zip(image.shape, at_least)]
    by = max(int(min(ratios)), math.ceil(max(ratios) / MAX_LENGTH))
    by = min(by, *image.shape[:2])
    return shrink(image, by) if by > 1 else image


def _pack(settings: ViewSettings, parameters: ViewParameters, size: tuple[int, int]) -> Tensor:
    """(45,) float32: the `FIELDS` of a view of an image of `size`."""
    before, shift, after = fold_color(parameters.color)
    box = crop_box(settings, parameters, *size)
    flips = parameters.vertical_flip, parameters.flip
    numbers = (*box, *flips, *before.flat, *after.flat, shift / 256, parameters.sigma, parameters.solarize)
    return torch.tensor(numbers, dtype=torch.float32)


def _unpack(parameters: Tensor) -> dict[str, Tensor]:
    """Each field (..., numbers) of the packed parameters (..., 45)."""
    return dict(zip(FIELDS, parameters.split(list(FIELDS.values()), dim=-1)))


def _multiply(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`down @ image @ across^T` of each channel: images (B, H, C, W), down (B, V, h, H), across (B, V, w, W).

    Returns (B, V, C, h, w) float32. Two batched multiplications without a copy, as an image's rows of all channels lie
    side by side.
    """
    num_channels, (num_views, height) = images.shape[2], down.shape[1:3]
    views = down.flatten(1, 2) @ images.flatten(2)  # (B, V * h, C * W)
    views = views.view(-1, height * num_channels, images.shape[3]) @ across.flatten(0, 1).mT  # (B * V, h * C, w)
    views = views.view(-1, num_views, height, num_channels, across.shape[2]).transpose(2, 3)  # (B, V, C, h, w)
    return views.to(torch.float32, memory_format=torch.contiguous_format)


def resize_matrix(size: int, length: int, box: Tensor, flipped: Tensor) -> Tensor:
    """Along one side: cut out a box, resize it to `size` with Pillow's bilinear filter and perhaps mirror it.

    Args:
        size: Length of this side of the view in pixels.
        length: Length of this side of the images in pixels.
        box: (..., 2), where each box begins and its length.
        flipped: (...), other than 0 to mirror.

    Returns:
        (..., size, length) float32, each row of sum 1.
    """
    start, extent = box.unsqueeze(-2).split(1, dim=-1)  # (..., 1, 1)
    scale = extent / size
    position = torch.arange(size, device=box.device)[:, None] + 0.5  # (size, 1)
    position = torch.where(flipped[..., None, None] > 0, size - position, position)
    source = torch.arange(length, device=box.device) + 0.5  # (length,)
    distance = (source - (start + position * scale)).abs()  # (..., size, length)
    weights = (1 - distance / scale.clamp(min=1)).clamp_(min=0)  # a triangle, wider where the image shrinks
    weights *= (source > start) & (source < start + extent)
    return weights / weights.sum(-1, keepdim=True)


def blur_matrix(size: int, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur along one side with Gaussians of sigma (n,), cut at three sigma, the border mirrored: (n, size, size)."""
    position = torch.arange(size, device=sigma.device)
    sigma = sigma[:, None, None]
    weights = torch.zeros(len(sigma), size, size, device=sigma.device)
    period = max(2 * (size - 1), 1)  # after which a side and its mirror image come again
    reach = math.ceil((math.ceil(3 * max_sigma) + size) / period)
    for turn in range(-reach, reach + 1):
        mirrored = -position
        for column in (position, mirrored) if size > 1 else (position,):
            distance = column + turn * period - position[:, None]  # (size, size)
            gaussian = torch.exp(-0.5 * (distance / sigma).square()) * (distance.abs() <= torch.ceil(3 * sigma))
            if column is mirrored:  # the first and the last pixel are their own mirror images
                gaussian = gaussian * ((position > 0) & (position < size - 1))
            weights += gaussian
    return weights / weights.sum(-1, keepdim=True)


def _blur(views: Tensor, chosen: Tensor, sigma: Tensor, max_sigma: float, dtype: torch.dtype) -> Tensor:
    """Blur the chosen ones of the views (N, C, h, w), in place."""
    images = views[chosen].transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)  # (n, h, C, w)
    down, across = (
        blur_matrix(size, sigma[chosen, 0], max_sigma)[:, None].to(dtype) for size in views.shape[2:]
    )  # (n, 1, h, h) and (n, 1, w, w)
    return views.index_copy_(0, chosen, _multiply(images, down, across)[:, 0])


def _mix(views: Tensor, runs: Tensor) -> Tensor:
    """Apply runs of colour steps (N, 3, 6) to views (N, 3, h, w)."""
    offsets = runs[..., 3:] @ views.mean((2, 3))[..., None]  # (N, 3, 1)
    mixed = torch.baddbmm(offsets, runs[..., :3], views.flatten(2))  # (N, 3, h * w)
    return mixed.clamp_(0, 255).view_as(views)


def shift_hue(views: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of views (N, 3, h, w) by fractions of the circle (N, 1), in HSV."""
    red, green, blue = views.unbind(1)  # (N, h, w)
    value, lowest = views.amax(1), views.amin(1)
    chroma = value - lowest
    sixth = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    sixth /= chroma.clamp(min=1e-3)
    sixth += torch.where(value == red, 0, torch.where(value == green, 2, 4)) + 6 * shift[..., None]
    # A colour is the value less the chroma times a trapezoid of the hue, another third of a turn on for each.
    turned = [value - chroma * (2 - ((sixth + offset).remainder(6) - 2).abs()).clamp(0, 1) for offset in (5, 3, 1)]
    return torch.stack(turned, dim=1)
