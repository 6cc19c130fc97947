"""The folder of a curation: its options, its shards, and the tables that its stages write, each whole or absent."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hf_vlm.curation.shards import find_shards
from hf_vlm.data.formats.splits import canonical_split
from hf_vlm.data.io.durable import replace_text, replaced_file
from hf_vlm.data.io.files import is_remote
from hf_vlm.data.io.messages import redact_url

__all__ = ["WORK_FOLDER", "CurationOptions", "Work", "concatenate", "open_work"]

Array = np.ndarray[Any, Any]

WORK_FOLDER = ".curate"  # hidden, so that what opens the folder of the shards does not read it
OPTIONS_FILE = "options.json"
PIXEL_SIMILARITY, ENCODER_SIMILARITY = 0.9, 0.96  # defaults, by what the features are made from


@dataclass(frozen=True, kw_only=True)
class CurationOptions:
    """Which images are kept.

    Attributes:
        num_images: Number of images to keep, balanced over clusters; None for all that are left.
        min_side: Pixels of the shorter side, below which an image is dropped.
        max_aspect: Longer side over shorter side, above which it is.
        min_entropy: Bits of the histogram of its grey levels (0 to 8), below which it is.
        min_sharpness: Variance of its Laplacian in levels of 255, its longer side at most 256 pixels, below which it
            is; 0 keeps all, as how sharp images are depends on the domain.
        encoder: Folder or Hub id of an encoder whose features are compared; None for features of the pixels, which
            show copies but not what else is alike.
        similarity: Cosine of two images' features from which on they are near duplicates; None for 0.9 of pixels and
            0.96 of an encoder.
        num_clusters: Number of the smallest clusters; None for the square root of the number of images.
        images_per_shard: Most images of a shard that is written.
        seed: Seed of clusters and of the choice.

    Raises:
        ValueError: A number is out of its range.
    """

    num_images: int | None = None
    min_side: int = 32
    max_aspect: float = 4.0
    min_entropy: float = 1.0
    min_sharpness: float = 0.0
    encoder: str | None = None
    similarity: float | None = None
    num_clusters: int | None = None
    images_per_shard: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "num_images": (1, math.inf),
            "min_side": (1, math.inf),
            "max_aspect": (1, math.inf),
            "min_entropy": (0, 8),
            "min_sharpness": (0, math.inf),
            "similarity": (0, 1),
            "num_clusters": (1, math.inf),
            "images_per_shard": (1, math.inf),
            "seed": (0, 2**32 - 1),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise ValueError(f"{name} {value}: it must be {limit}")

    @property
    def min_similarity(self) -> float:
        if self.similarity is not None:
            return self.similarity
        return PIXEL_SIMILARITY if self.encoder is None else ENCODER_SIMILARITY


@dataclass(frozen=True)
class Work:
    """A curation on disk, the same for all processes and machines that share the folder.

    Attributes:
        folder: Where shards and report are written.
        data: Name of the source.
        split: Its split.
        format: `parquet` or `webdataset`, of the shards that are read and of those that are written.
        shards: Paths or URLs of the shards.
        options: Which images are kept.
    """

    folder: Path
    data: str
    split: str
    format: str
    shards: tuple[str, ...]
    options: CurationOptions

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def path(self, stage: str, unit: int) -> Path:
        """The table of a unit of a stage, which is there once the unit is done."""
        return self.folder / WORK_FOLDER / stage / f"{unit:05d}.safetensors"

    def save(self, stage: str, unit: int, arrays: dict[str, Array]) -> None:
        path = self.path(stage, unit)
        path.parent.mkdir(exist_ok=True)
        with replaced_file(path) as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))

    def load(self, stage: str, unit: int, *names: str, rows: slice | None = None) -> list[Array]:
        """Columns of a table, or some rows of them, without reading the others."""
        path = self.path(stage, unit)
        try:
            with safe_open(path, "numpy") as file:
                return [_read(file, name, rows) for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete it, and start the same command again"
            ) from error


def _read(file: Any, name: str, rows: slice | None) -> Array:
    part = file.get_slice(name)
    if rows is None or not part.get_shape()[0]:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    return part[rows if rows.start < rows.stop else slice(0, 0)]  # type: ignore[no-any-return]


def open_work(data: str, folder: Path, *, split: str = "train", options: CurationOptions) -> Work:
    """Begins a curation in a folder, or continues the one that is there.

    Raises:
        ValueError: There are no Parquet files or tars, the folder holds something else, or a curation of other data
            or options.
    """
    format, found = find_shards(data, split)
    folder = folder.absolute()  # processes of a cluster may start elsewhere
    paths = [path if is_remote(path) else Path(path).absolute() for path in found]
    work = Work(folder, redact_url(data), canonical_split(split), format, tuple(map(str, paths)), options)
    path = folder / WORK_FOLDER / OPTIONS_FILE
    begun = {
        "split": work.split,
        **dataclasses.asdict(options),
        "shards": {redact_url(path): _size(path) for path in paths},
    }
    if path.is_file():
        _check_same(json.loads(path.read_text()), begun, folder)
        return work
    if folder.exists() and (not folder.is_dir() or any(entry.name != WORK_FOLDER for entry in folder.iterdir())):
        raise ValueError(f"{folder} holds something else already: name a new folder for the shards")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(begun, indent=1) + "\n")
    return work


def _size(path: Path) -> int | None:
    return None if is_remote(path) else path.stat().st_size


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        texts = [
            "other shards" if name == "shards" else f"{name} {before.get(name)} (now {now[name]})" for name in changed
        ]
        raise ValueError(
            f"{folder} holds a curation that was begun with {', '.join(texts)}: continue it with the same data and "
            "options, or name another folder"
        )


def concatenate(parts: Sequence[Sequence[Array]]) -> list[Array]:
    """Columns of several tables, one after the other."""
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]
