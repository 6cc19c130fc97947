"""The picture of neighbours shows each image at its rank, with similarity, index and label."""

import numpy as np
import pytest

from hf_vlm.features.neighbors import Neighbors
from hf_vlm.viz.neighbor_sheet import FRAME, GAP, SIDE, neighbor_sheet
from hf_vlm.viz.sheets import captioned, class_color

NEIGHBORS = Neighbors(queries=[3, 70], indices=[[12, 5], [3, 12]], similarities=[[0.98765, 0.5], [0.25, -0.125]])
SHAPES = {3: (64, 64, 3), 70: (20, 40, 3), 12: (300, 100, 3), 5: (64, 64, 1)}  # wide, high, grey
IMAGES = {index: np.full(shape, 10 + index, dtype=np.uint8) for index, shape in SHAPES.items()}
CELL = SIDE + 2 * FRAME


@pytest.fixture
def captions(monkeypatch):
    texts = []

    def noted(picture, text, **options):
        texts.append(text)
        return captioned(picture, text, **options)

    monkeypatch.setattr("hf_vlm.viz.neighbor_sheet.captioned", noted)
    return texts


def cells(sheet, lines):
    """Pixels of each cell, by row and column, without its lines of text."""
    height = CELL + lines * 20
    top = sheet.height - 2 * (height + GAP)
    lefts = [GAP, GAP + CELL + 3 * GAP, GAP + 2 * CELL + 4 * GAP]
    pixels = np.asarray(sheet)
    return [[pixels[y : y + CELL, x : x + CELL] for x in lefts] for y in (top, top + height + GAP)]


def test_each_image_is_at_its_rank_in_the_color_of_its_class(captions):
    labels = {3: 0, 70: 1, 12: 1, 5: -1}
    sheet = neighbor_sheet(NEIGHBORS, IMAGES, labels=labels, class_names=["cat", "dog"])
    shown = cells(sheet, lines=2)
    for row, (query, indices) in zip(shown, zip(NEIGHBORS.queries, NEIGHBORS.indices)):
        for cell, index in zip(row, [query, *indices], strict=True):
            assert (cell[CELL // 2, CELL // 2] == 10 + index).all()
            colors = {tuple(color) for color in cell.reshape(-1, 3).tolist()}
            frame = {class_color(labels[index])} if labels[index] >= 0 else set()
            assert colors - {(255, 255, 255)} == frame | {(10 + index,) * 3}
    first = shown[0][0]
    assert (first[:FRAME] == class_color(0)).all()
    assert (first[FRAME:-FRAME, FRAME:-FRAME] == 13).all()
    assert captions == [
        *("#3", "cat", "0.9877   #12", "dog", "0.5000   #5", "no label"),
        *("#70", "dog", "0.2500   #3", "cat", "-0.1250   #12", "dog"),
    ]


def test_images_keep_their_shape(captions):
    shown = cells(neighbor_sheet(NEIGHBORS, IMAGES), lines=1)
    wide, high = (shown[row][column] != 255 for row, column in ((1, 0), (0, 1)))
    assert wide.any(axis=(1, 2)).sum() == SIDE // 2
    assert wide.any(axis=(0, 2)).sum() == SIDE
    assert high.any(axis=(1, 2)).sum() == SIDE
    assert abs(high.any(axis=(0, 2)).sum() - SIDE / 3) <= 1
    assert "cat" not in captions
