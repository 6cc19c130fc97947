"""What a split shares with the others of its data: images that would be both trained on and evaluated on."""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hf_vlm.data.inspection.duplicates import FINGERPRINT, THUMBNAIL_SIZE, fingerprint, near_duplicates
from hf_vlm.data.inspection.report import Issue
from hf_vlm.data.io.decode import BadImageError, decode_image, read_image_bytes
from hf_vlm.data.source import Source

__all__ = ["split_issues"]

Array = np.ndarray[Any, Any]

NUM_THREADS = 8  # waiting for files, and decoders outside Python's lock
BATCH_SIZE = 32  # encoded images that a thread holds at a time


def split_issues(source: Source, images: Array, names: Sequence[str], other: Source) -> list[Issue]:
    """Images of a source that another split has too, as they are or stored otherwise; and classes that differ.

    Args:
        images: (n,) array with the fields of `FINGERPRINT`, the images of the source.
        names: Their n names.
        other: The other split. Its images are read once and decoded small, and some 30 bytes are kept of each.
    """
    others = _fingerprints(other)
    is_equal = np.isin(images["digest"], others["digest"])
    found = {
        f"images that split {other.split!r} holds too, byte for byte": is_equal,
        f"images that look the same as images of split {other.split!r}": _look_the_same(images, others) & ~is_equal,
    }
    issues = []
    for what, mask in found.items():
        where = [names[index] for index in np.flatnonzero(mask).tolist()]
        issues.append(Issue(what, len(where), where))
    return [issue for issue in issues if issue.count] + _class_issues(source, other)


def _class_issues(source: Source, other: Source) -> list[Issue]:
    issues = []
    for what, own, others in (
        ("labels", source.label_names, other.label_names),
        ("boxes", source.object_names, other.object_names),
    ):
        if own is not None and others is not None and own != others:
            differing = sorted({*own} ^ {*others}) or list(others)
            order = "in another order" if {*own} == {*others} else "not the same"
            issues.append(
                Issue(f"classes of {what} that are {order} in split {other.split!r}", len(differing), differing)
            )
    return issues


def _fingerprints(source: Source) -> Array:
    """An array with the fields of `FINGERPRINT`, the readable images of a source in any order."""
    images = (example["image"] for example in source)
    found: list[list[Any]] = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while batch := list(itertools.islice(images, NUM_THREADS * BATCH_SIZE)):
            found += pool.map(_rows, (batch[start::NUM_THREADS] for start in range(NUM_THREADS)))
    return np.array(list(itertools.chain(*found)), dtype=FINGERPRINT)


def _rows(images: Iterable[Any]) -> list[tuple[Any, ...]]:
    rows = []
    for image in images:
        try:
            data = read_image_bytes(image)
            rows.append(fingerprint(data, decode_image(data, at_least=THUMBNAIL_SIZE)[0]))
        except BadImageError:  # which the report on its own split names
            continue
    return rows


def _look_the_same(images: Array, others: Array) -> Array:
    """(n,) bool, which of n images are near-duplicates of others."""
    hashes, colors, has_structure = (
        np.concatenate([images[name], others[name]]) for name in ("hash", "colors", "has_structure")
    )
    compared = np.flatnonzero(has_structure)
    is_found = np.zeros(len(hashes), dtype=bool)
    for group in near_duplicates(hashes[compared], colors[compared]):
        members = compared[group]
        is_found[members] = members.max() >= len(images) > members.min()
    return is_found[: len(images)]
