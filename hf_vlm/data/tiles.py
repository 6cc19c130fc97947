"""Large images tile by tile, and the detections of all tiles as those of the image."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_vlm.metrics.detection_matches import box_ious

__all__ = ["OVERLAP", "Tile", "Tiling", "merge_tiles"]

Array = NDArray[Any]

OVERLAP = 0.2  # where no other is asked for
MIN_AGREEMENT = 0.5  # IoU of two boxes within the overlap of their tiles, from which they show one object
EDGE = 2.0  # pixels from a tile's edge within which a box counts as cut by it


class Tile(NamedTuple):
    """A window of an image, in pixels; `right` and `bottom` are the far edges."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Attributes:
        side: Side of the tiles in pixels.
        overlap: Fraction of a tile's side that the next one repeats, at least: objects up to that size are seen whole
            by one of them.

    Raises:
        ValueError: for a value out of its range.
    """

    side: int
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if not isinstance(self.side, int) or self.side < 16:
            raise ValueError(f"tile is {self.side!r}; give the side of the tiles in pixels, 16 or more.")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(
                f"overlap is {self.overlap}; it is the fraction of a tile that the next one repeats, 0 to 0.9."
            )

    def tiles(self, size: tuple[int, int]) -> list[Tile]:
        """Tiles that cover an image of a height and width, evenly spaced, row by row; one where it fits into it."""
        rows, columns = (_starts(length, self.side, self.overlap) for length in size)
        height, width = size
        return [Tile(x, y, min(x + self.side, width), min(y + self.side, height)) for y in rows for x in columns]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    free = length - tile
    if free <= 0:
        return [0]
    step = max(1.0, tile * (1 - overlap))
    return [round(start) for start in np.linspace(0, free, math.ceil(free / step) + 1)]


def merge_tiles(
    found: Sequence[Mapping[str, Array]], tiles: Sequence[Tile], *, image_size: tuple[int, int]
) -> dict[str, Array]:
    """The detections of an image from those of its tiles.

    Two detections of one class in two tiles are of the same object where their boxes agree within the overlap of the
    tiles, which both have seen. An object that no tile shows whole gets the box around its parts; else the best of
    the boxes that no edge cuts is taken. The score is the best one. Within a tile nothing is suppressed.

    Args:
        found: The detections in each tile: `scores` (n,), `labels` (n,) and `boxes` (n, 4) x1, y1, x2, y2 in pixels
            of the tile.
        tiles: Where the tiles are.
        image_size: Height and width of the image in pixels.

    Returns:
        `scores`, falling, `labels` and `boxes`, in pixels of the image.
    """
    offsets = [np.tile([tile.left, tile.top], 2) for tile in tiles]
    boxes = np.concatenate([one["boxes"] + offset for one, offset in zip(found, offsets, strict=True)]).astype(
        np.float32
    )
    tile_of = np.repeat(np.arange(len(tiles)), [len(one["boxes"]) for one in found])
    scores, labels = (np.concatenate([one[name] for one in found]) for name in ("scores", "labels"))
    cut = _is_cut(boxes, np.array(tiles)[tile_of].reshape(-1, 4), image_size)
    groups = _groups(boxes, labels, tile_of, tiles)
    merged = [_merge(boxes[group], scores[group], cut[group]) for group in groups]
    best = np.array([group[scores[group].argmax()] for group in groups], dtype=np.int64)
    order = np.argsort(-scores[best], kind="stable")
    return {
        "scores": scores[best][order],
        "labels": labels[best][order],
        "boxes": np.array(merged, dtype=np.float32).reshape(-1, 4)[order],
    }


def _is_cut(boxes: Array, tiles: Array, size: tuple[int, int]) -> Array:
    """(n,): whether a box ends at an edge of its tile that is no edge of the image."""
    height, width = size
    low = (boxes[:, :2] - tiles[:, :2] < EDGE) & (tiles[:, :2] > 0)
    high = (tiles[:, 2:] - boxes[:, 2:] < EDGE) & (tiles[:, 2:] < [width, height])
    return np.asarray((low | high).any(axis=1))


def _merge(boxes: Array, scores: Array, cut: Array) -> Array:
    """The box (4,) of an object from those of its detections (n, 4)."""
    if cut.all():
        return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return boxes[np.where(cut, -1.0, scores).argmax()]


def _groups(boxes: Array, labels: Array, tile_of: Array, tiles: Sequence[Tile]) -> list[Array]:
    """The rows of each object's detections, which are of different tiles; the pairs that agree best join first."""
    group_of = [{row} for row in range(len(boxes))]
    for first, second in _agreeing_pairs(boxes, labels, tile_of, tiles):
        one, other = group_of[first], group_of[second]
        if one is not other and not {tile_of[row] for row in one} & {tile_of[row] for row in other}:
            one |= other
            for row in other:
                group_of[row] = one
    return [np.array(sorted(group)) for row, group in enumerate(group_of) if row == min(group)]


def _agreeing_pairs(boxes: Array, labels: Array, tile_of: Array, tiles: Sequence[Tile]) -> Iterator[tuple[int, int]]:
    """Pairs of rows of one class whose boxes agree within the overlap of their tiles, the best first."""
    pairs, agreements = [], []
    rows_of = [np.flatnonzero(tile_of == number) for number in range(len(tiles))]
    for second in range(len(tiles)):
        for first in range(second):
            overlap = _intersection(np.array(tiles[first]), np.array(tiles[second]))
            if (overlap[2:] <= overlap[:2]).any():
                continue
            agreement = box_ious(*(_intersection(boxes[rows_of[number]], overlap) for number in (first, second)))
            agreement *= labels[rows_of[first]][:, None] == labels[rows_of[second]]
            for i, j in np.argwhere(agreement >= MIN_AGREEMENT):
                pairs.append((int(rows_of[first][i]), int(rows_of[second][j])))
                agreements.append(agreement[i, j])
    return (pairs[i] for i in np.argsort(-np.array(agreements), kind="stable"))


def _intersection(boxes: Array, window: Array) -> Array:
    return np.concatenate(
        [np.maximum(boxes[..., :2], window[..., :2]), np.minimum(boxes[..., 2:], window[..., 2:])], axis=-1
    )
