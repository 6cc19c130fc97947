"""What a split shares with the others of its data: images that would be both trained on and evaluated on."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hf_vlm.data.inspection.duplicates import image_digest
from hf_vlm.data.inspection.report import Issue
from hf_vlm.data.io.decode import BadImageError, read_image_bytes
from hf_vlm.data.source import Source

__all__ = ["split_issues"]

NUM_THREADS = 8  # waiting for files


def split_issues(source: Source, name_of_digest: Mapping[int, str], other: Source) -> list[Issue]:
    """Images of a source, by the digest of their bytes, that another split has too; and classes that differ.

    The images of the other split are read, but not decoded.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = dict.fromkeys(name_of_digest.get(digest) for digest in pool.map(_digest, _images(other)))
    shared = [name for name in found if name is not None]
    issues = [Issue(f"images that split {other.split!r} holds too, byte for byte", len(shared), shared)]
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
    return [issue for issue in issues if issue.count]


def _images(source: Source) -> Iterator[Any]:
    return (example["image"] for example in source)


def _digest(image: Any) -> int:
    try:
        return image_digest(read_image_bytes(image))
    except BadImageError:
        return -1  # the digest of none
