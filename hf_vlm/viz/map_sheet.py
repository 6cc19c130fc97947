"""Images and feature maps of their patches on one picture."""

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from hf_vlm.data.images import ImageLike, expand_images, load_image
from hf_vlm.features.embedding import prepare_images
from hf_vlm.features.maps import FeatureMaps, feature_maps
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.sheets import captioned, contact_sheet, in_colors, titled_rows

__all__ = ["HEIGHT", "map_sheet", "plot_feature_maps"]

Array = np.ndarray[Any, Any]

HEIGHT, MAX_WIDTH = 224, 448  # pixels of an image and of its maps
GAP = 8
FONT_SIZE = 13


def map_sheet(images: Sequence[Array], maps: FeatureMaps) -> Image.Image:
    """One row per image: the image, the components of its patches as colours, and attention or similarity as heat.

    Attention is shown as the mean over the heads and, smaller, for each head. Colours range from the minimum to
    the maximum of each map, which are printed below it; for attention as multiples of a uniform distribution.

    Args:
        images: n images (height, width, channels) uint8, of any size: maps are stretched to their shapes.
        maps: Maps of these images.

    Raises:
        ValueError: There is no image.
    """
    if not len(images):
        raise ValueError("There is no image to plot maps of.")
    return titled_rows([_row(image, maps, index) for index, image in enumerate(images)], gap=GAP)


def _row(image: Array, maps: FeatureMaps, index: int) -> list[tuple[str, Image.Image]]:
    picture = ImageOps.contain(Image.fromarray(in_colors(image)), (MAX_WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    size = picture.size
    colors = np.round(255 * maps.colors[index]).astype(np.uint8)
    row = [("image", picture), ("principal components", _enlarged(colors, size))]
    if maps.attention is not None:
        heads = maps.attention[index]  # (heads, rows, columns)
        mean = heads.mean(axis=0)
        row.append(("attention", _with_range(_heat(mean, size), mean * mean.size, " x even")))
        row.append((f"of {len(heads)} heads", _heads(heads, size)))
    if maps.similarity is not None:
        what = "mean" if maps.patch is None else f"patch {maps.patch[0]}, {maps.patch[1]}"
        values = maps.similarity[index]
        row.append((f"similarity to {what}", _with_range(_heat(values, size), values)))
    if maps.patch is not None:
        row[0] = ("image", _marked(picture, maps.patch, maps.colors.shape[1:3]))
    return row


def _enlarged(values: Array, size: tuple[int, int]) -> Image.Image:
    """Each patch as a rectangle: nothing is interpolated."""
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def _heat(values: Array, size: tuple[int, int]) -> Image.Image:
    """Values (rows, columns) as colours, the lowest dark, the highest bright; all dark where they are equal."""
    fractions = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    colors = cv2.applyColorMap(np.round(255 * fractions).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return _enlarged(colors[:, :, ::-1], size)


def _with_range(tile: Image.Image, values: Array, unit: str = "") -> Image.Image:
    return captioned(tile, f"{values.min():.2f} to {values.max():.2f}{unit}", font_size=FONT_SIZE)


def _heads(heads: Array, size: tuple[int, int]) -> Image.Image:
    """The heads at half the size, in two lines."""
    half = max((size[0] - GAP) // 2, 1), (size[1] - GAP) // 2
    sheet = contact_sheet([_heat(head, half) for head in heads], columns=-(-len(heads) // 2), gap=GAP)
    return sheet.crop((GAP, GAP, sheet.width - GAP, sheet.height - GAP))


def _marked(tile: Image.Image, patch: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """The tile with a box around a patch."""
    height, width = tile.height / grid[0], tile.width / grid[1]
    box = [patch[1] * width, patch[0] * height, (patch[1] + 1) * width, (patch[0] + 1) * height]
    return render_detections(tile, [box], [""], class_ids=[0], scale=1)


def plot_feature_maps(
    encoder: VLMViTModel,
    images: ImageLike | Iterable[ImageLike],
    processor: VLMViTImageProcessor,
    *,
    patch: tuple[int, int] | None = None,
    foreground: bool = False,
) -> Image.Image:
    """A picture of images with maps of their patches: principal components as colours, and attention.

    Args:
        patch: Row and column of a patch; see `feature_maps`.
        foreground: Whether to leave the background black; see `feature_maps`.

    Raises:
        ValueError: There is no image, one cannot be read, or there is no such patch.
    """
    arrays = [load_image(image, num_channels=encoder.config.num_channels) for image in expand_images(images)]
    if not arrays:
        raise ValueError("There is no image to plot maps of.")
    pixel_values = prepare_images(encoder, arrays, processor)
    return map_sheet(arrays, feature_maps(encoder, pixel_values, patch=patch, foreground=foreground))
