"""Queries, each above the images that were found for it."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from PIL import Image

from hf_vlm.features.search import Found
from hf_vlm.viz.neighbor_sheet import GAP, image_tile
from hf_vlm.viz.sheets import captioned, stacked, titled_rows

__all__ = ["search_sheet"]

QUERY_SIZE = 18  # of the font


def search_sheet(
    queries: Sequence[str], found: Sequence[Sequence[Found]], images: Mapping[int, np.ndarray[Any, Any]]
) -> Image.Image:
    """One row per query, its words below the images, the most similar first.

    Each image has its rank above it, the similarity and the index below it.

    Args:
        queries: Words, or paths of images.
        found: Results of `FeatureIndex.search`.
        images: Images by index, (height, width, channels) uint8, of any size.
    """
    rows = []
    for query, results in zip(queries, found):
        tiles = [image_tile(images[result.index], f"{result.similarity:.4f}   #{result.index}") for result in results]
        row = titled_rows([[(str(rank), tile) for rank, tile in enumerate(tiles, start=1)]], gap=GAP)
        rows.append(captioned(row, query, font_size=QUERY_SIZE))
    return reduce(stacked, rows)
