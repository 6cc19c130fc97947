"""Backgrounds: pieces of photographs, and of terrain that is coloured by height and lit from the side."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.scenes.splits import check_split

__all__ = ["BACKGROUNDS", "STRIP_WIDTH", "Strips", "reflect", "sample_background"]

Array = np.ndarray[Any, Any]
Strips = tuple[Array, ...]  # each (height, STRIP_WIDTH, 3) uint8 RGB

STRIP_WIDTH = 128  # pixels
# Each picture is cut into five strips; those that a split has of each photograph and of each terrain.
SPLIT_STRIPS = {
    "train": ((0, 1, 3), (0, 2, 4)),
    "validation": ((2,), (1,)),
    "test": ((4,), (3,)),
}
MIN_DEVIATION = 50  # of a photograph's strip in landscapes: of others most is one dark colour
# Colours by height: 0 is the lowest land, 1 the highest, -1 the deepest sea, the same for every palette.
SEA = ((-1.0, (16, 44, 92)), (-0.4, (28, 92, 146)), (-0.04, (96, 186, 194)))
PALETTES = (
    ((0.0, (104, 148, 78)), (0.4, (152, 168, 92)), (0.7, (166, 138, 98)), (1.0, (236, 234, 226))),  # meadows
    ((0.0, (222, 188, 132)), (0.4, (212, 142, 88)), (0.7, (170, 88, 62)), (1.0, (244, 224, 190))),  # desert
    ((0.0, (62, 84, 54)), (0.4, (138, 120, 52)), (0.7, (188, 104, 48)), (1.0, (232, 204, 148))),  # autumn
    ((0.0, (74, 104, 138)), (0.4, (138, 168, 196)), (0.7, (196, 212, 226)), (1.0, (248, 250, 252))),  # winter
)


@functools.cache
def photographs(split: str) -> Strips:
    """The strips that a split has of the two photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images  # slow to import: only where scenes are rendered

    return tuple(
        np.ascontiguousarray(photo[:, number * STRIP_WIDTH : (number + 1) * STRIP_WIDTH])
        for photo, numbers in zip(load_sample_images().images, SPLIT_STRIPS[check_split(split)], strict=True)
        for number in numbers
    )


@functools.cache
def landscapes(split: str) -> Strips:
    """Photographs and terrain in all palettes, also upside down: strips of matplotlib's two elevation models."""
    photos = [strip for strip in photographs(split) if strip.std() >= MIN_DEVIATION]
    terrain = [_light(heights, palette) for heights in _terrain(split) for palette in PALETTES]
    strips = (*3 * photos, *terrain)  # thrice: in a third of the scenes
    return (*strips, *(np.ascontiguousarray(strip[::-1]) for strip in strips))


@dataclass(frozen=True)
class Backgrounds:
    load: Callable[[str], Strips]  # of a split
    origin: str


BACKGROUNDS = {
    "photographs": Backgrounds(photographs, "photographs that scikit-learn ships"),
    "landscapes": Backgrounds(landscapes, "photographs that scikit-learn and elevation models that matplotlib ships"),
}


def _terrain(split: str) -> list[Array]:
    """The strips that a split has of the elevation models, heights in -1..1 with the sea below 0."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "sample_data")
    land = np.load(folder / "jacksboro_fault_dem.npz")["elevation"].astype(np.float32)
    coast = np.load(folder / "topobathy.npz")["topo"]
    low, high = np.quantile(land, (0.01, 0.99))
    sea, peak = -np.quantile(coast[coast < 0], 0.01), np.quantile(coast[coast > 0], 0.99)
    models = (np.maximum(land - low, 0) / (high - low), np.where(coast < 0, coast / sea, coast / peak))
    strips = []
    for model, numbers in zip(models, SPLIT_STRIPS[check_split(split)], strict=True):
        width = model.shape[1] // 5
        for number in numbers:  # cut before it is enlarged, which would mix what lies on both sides of a cut
            piece = model[:, number * width : (number + 1) * width].astype(np.float32)
            size = (STRIP_WIDTH, round(model.shape[0] * STRIP_WIDTH / width))
            strips.append(np.clip(cv2.resize(piece, size, interpolation=cv2.INTER_CUBIC), -1, 1))
    return strips


def _light(heights: Array, palette: tuple[Any, ...]) -> Array:
    """A strip of terrain (height, width) as a picture: its palette, bright on the slopes towards the light."""
    stops, colors = zip(*SEA, *palette, strict=True)
    color = np.stack([np.interp(heights, stops, channel) for channel in zip(*colors, strict=True)], axis=-1)
    down, right = np.gradient(cv2.GaussianBlur(heights, (0, 0), 0.8))
    slope = -(down + right)
    shade = np.clip(0.95 + 0.3 * slope / slope.std(), 0.45, 1.35)  # as strong however steep the terrain is
    return np.clip(color * shade[:, :, None], 0, 255).astype(np.uint8)


def reflect(position: Array, length: Array | float) -> Array:
    """Fold positions into 0..length as if they were reflected at both ends."""
    return length - np.abs(position % (2 * length) - length)


def sample_background(
    rng: np.random.Generator, strips: Strips, *, size: int, min_crop: float
) -> Callable[[Array | float], Array]:
    """Sample a piece of a strip, at least `min_crop` pixels wide, and its light.

    Returns:
        A function that maps an offset (2,), as a fraction of the way across the strip, to the background there
        (size, size, 3), float32 in 0..255.
    """
    strip = strips[rng.integers(len(strips))]
    side = rng.uniform(min_crop, STRIP_WIDTH)
    corner = rng.random(2)
    gain = np.diag(rng.uniform(0.9, 1.1, 3) * rng.uniform(0.8, 1.1))
    mirror = rng.random() < 0.5
    free = np.array([STRIP_WIDTH - side, strip.shape[0] - side])

    def view(offset: Array | float) -> Array:
        x, y = reflect(corner + offset, 1.0) * free
        step = side / size
        first = 0.5 * step - 0.5  # pixel centres lie on halves
        across = [-step, 0, x + side - 1 - first] if mirror else [step, 0, x + first]
        matrix = np.array([across, [0, step, y + first]])
        crop = cv2.warpAffine(
            strip, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        return cv2.transform(crop, gain).astype(np.float32)

    return view
