"""Images that occur more than once: equal bytes, and near-duplicates by perceptual hash."""

import hashlib
import itertools
from typing import Any

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

__all__ = ["FINGERPRINT", "THUMBNAIL_SIZE", "exact_duplicates", "fingerprint", "image_digest", "near_duplicates"]

Array = np.ndarray[Any, Any]

# Pixels, height and width, that suffice: JPEGs are decoded at an eighth of their size where that leaves as many.
THUMBNAIL_SIZE = (64, 64)
# Fields of an array of images by which those that occur more than once are found.
FINGERPRINT = [
    ("digest", "u8"),  # of the encoded bytes
    ("hash", "u8"),
    ("colors", "u1", (2, 2, 3)),
    ("has_structure", "?"),
]
MAX_DISTANCE = 2  # bits of 64 by which the hashes of one picture, stored twice, may differ
MAX_COLOR_DIFFERENCE = 12  # levels of 255, in any quarter; small smooth pictures share hashes by chance
MIN_STEPS = 16  # neighbouring cells of 64 that must differ, or a hash is meaningless
NUM_BANDS = 4  # one more than two flipped bits can touch, and one to spare: see `_close_pairs`
MAX_NEIGHBORS = 256


def image_digest(data: bytes) -> int:
    """64 bits that are the same for equal bytes alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def fingerprint(data: bytes, image: Array) -> tuple[int, int, Array, bool]:
    """One row of `FINGERPRINT`.

    Args:
        data: Encoded image.
        image: The same decoded, (height, width, 3) uint8, each side of `THUMBNAIL_SIZE` or more where it has as many.
    """
    return image_digest(data), *_perceptual_hash(image)


def _perceptual_hash(image: Array) -> tuple[int, Array, bool]:
    """What near-duplicates are compared by.

    Args:
        image: (height, width, 3) uint8.

    Returns:
        The difference hash, 64 bits that are set where a picture of 8 x 9 grey cells gets brighter to the right; the
        colours of its quarters, (2, 2, 3) uint8; and whether there is enough in it for the hash to be meaningful.
    """
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = np.diff(gray, axis=1)  # (8, 8)
    bits = int.from_bytes(np.packbits(steps > 0).tobytes(), "big")
    colors = cv2.resize(image, (2, 2), interpolation=cv2.INTER_AREA)
    return bits, colors, bool(np.count_nonzero(steps) >= MIN_STEPS)


def exact_duplicates(values: Array) -> list[list[int]]:
    """Indices of the values (n,) that occur more than once, one list per value."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    return sorted(group.tolist() for group in np.split(order, starts) if len(group) > 1)


def near_duplicates(hashes: Array, colors: Array) -> list[list[int]]:
    """Indices of near-duplicates, one list per connected group.

    Args:
        hashes: (n,) uint64, the field `hash` of `FINGERPRINT`.
        colors: (n, 2, 2, 3) uint8, its field `colors`.
    """
    # The frames of a still scene, of one hash and nearly one colour, are one entry to the search.
    entries = np.zeros(len(hashes), dtype=[("hash", "u8"), ("colors", "u1", 12)])
    entries["hash"], entries["colors"] = hashes, colors.reshape(-1, 12) // MAX_COLOR_DIFFERENCE
    _, first, scene = np.unique(entries.view("V20"), return_index=True, return_inverse=True)
    pairs = _close_pairs(hashes[first])  # (p, 2)
    difference = np.abs(colors[first[pairs[:, 0]]].astype(np.int16) - colors[first[pairs[:, 1]]])
    pairs = pairs[difference.max(axis=(1, 2, 3), initial=0) <= MAX_COLOR_DIFFERENCE]
    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(first), len(first)))
    return exact_duplicates(connected_components(links, directed=False)[1][scene])


def _close_pairs(hashes: Array) -> Array:
    """Pairs (p, 2) of hashes that differ in up to MAX_DISTANCE bits.

    Two flipped bits leave at least two of four bands as they were, so that only hashes which share two bands are
    compared; each with its next MAX_NEIGHBORS in order, for where thousands share them, neighbours link them all.
    """
    bands = hashes.astype(np.uint64).view(np.uint16).reshape(-1, NUM_BANDS).astype(np.uint32)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for first, second in itertools.combinations(range(NUM_BANDS), NUM_BANDS - MAX_DISTANCE):
        keys = bands[:, first] << 16 | bands[:, second]
        order = np.lexsort([hashes, keys])
        keys, left = keys[order], np.arange(len(hashes))
        for offset in range(1, MAX_NEIGHBORS + 1):
            left = left[left + offset < len(keys)]
            left = left[keys[left] == keys[left + offset]]
            if not len(left):
                break
            pairs = np.stack([order[left], order[left + offset]], axis=1)
            found.append(pairs[np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= MAX_DISTANCE])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
