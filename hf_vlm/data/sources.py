"""Open anything as a stream of one schema: one table of kinds, told by what a source looks like."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import aiohttp
import datasets
from upath import UPath

from hf_vlm.data.formats.coco import find_coco_files, open_coco
from hf_vlm.data.formats.columns import Categories, ColumnMap, RowReader, find_columns, object_fields, read_categories
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, open_imagefolder
from hf_vlm.data.formats.mixture import mix_sources
from hf_vlm.data.formats.parquet import open_parquet
from hf_vlm.data.formats.splits import canonical_split, choose_split, describe_folder
from hf_vlm.data.formats.voc import looks_like_voc, open_voc
from hf_vlm.data.formats.webdataset import open_webdataset
from hf_vlm.data.formats.yolo import looks_like_yolo, open_yolo
from hf_vlm.data.io.files import can_list, find_paths, is_remote
from hf_vlm.data.io.messages import did_you_mean, error_text, redact, redact_url
from hf_vlm.data.scenes.render import scenes_source
from hf_vlm.data.source import Source

__all__ = ["FORMATS", "guess_format", "open_source"]

logger = logging.getLogger(__name__)

# Of files.
OPENERS: dict[str, Callable[..., Source]] = {
    "parquet": open_parquet,
    "webdataset": open_webdataset,
    "coco": open_coco,
    "voc": open_voc,
    "yolo": open_yolo,
    "imagefolder": open_imagefolder,
}
FORMATS = ("scenes", *OPENERS, "hub")
FILE_FORMATS = ("parquet", "webdataset")  # of which several files make a source, on disk or remote
SUFFIXES = {".parquet": "parquet", ".tar": "webdataset", ".json": "coco", ".yaml": "yolo", ".yml": "yolo"}


def open_source(
    source: str | Path | Mapping[str, float],
    split: str = "train",
    *,
    format: str | None = None,
    num_samples: int | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> Source:
    """Open a source, whose images stay encoded.

    Args:
        source: `scenes`, `scenes:easy` or `scenes:hard` (the built-in images); a Parquet file, a WebDataset tar, or a
            folder of these; a COCO json or a folder with one; a folder of Pascal VOC; a data.yaml of YOLO or its
            folder; a folder of images; or the id of a dataset on the Hub. Files and folders may also be URLs of any
            protocol that fsspec knows (https, s3, gs, ...), with credentials from its configuration; web servers alone
            have no folders. Of Parquet files and tars, `{00..31}` and `*` name several. A mapping of sources to
            weights mixes them (see `mix_sources`).
        split: Of the source; `val` and `valid` are `validation`.
        format: One of `FORMATS`; None tells it from the source.
        num_samples: Only so many examples: the first, but of class folders ones that are evenly spread.
        name: Of the configuration of a dataset on the Hub.
        revision: Of a dataset on the Hub.

    Returns:
        A source with the columns `image` ({"bytes", "path"}) and `image_id`, and as the source has them `label`,
        `objects` {bbox, category, area, iscrowd}, `mask` and `instance_mask`.

    Raises:
        ValueError: There is nothing of the format, no such split, or the labels make no sense.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be positive")
    if isinstance(source, Mapping):
        mixture = _open_mixture(source, split, format=format, num_samples=num_samples)
        return replace(mixture, name=", ".join(map(redact_url, source)), format="mixture", split=split)
    format = guess_format(source) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; the formats are {', '.join(FORMATS)}")
    if (name is not None or revision is not None) and format != "hub":
        raise ValueError(f"name and revision belong to datasets on the Hub; {source} is of the format {format!r}")
    if format == "scenes":
        preset = str(source).removeprefix("scenes").removeprefix(":") or "easy"
        opened = scenes_source(preset, canonical_split(split), num_samples=num_samples)
    elif format == "hub":
        opened = _open_hub(str(source), split, num_samples=num_samples, name=name, revision=revision)
    else:
        opened = _open_files(str(source), split, format=format, num_samples=num_samples)
    return replace(opened, name=redact_url(source), format=format, split=split)


def _open_mixture(source: Mapping[str, float], split: str, *, format: str | None, num_samples: int | None) -> Source:
    if not source:
        raise ValueError("a mixture needs at least one source with its weight")
    mixture = mix_sources({part: open_source(part, split, format=format) for part in source}, source)
    return mixture if num_samples is None else replace(mixture, dataset=mixture.dataset.take(num_samples))


def _open_files(source: str, split: str, *, format: str, num_samples: int | None) -> Source:
    """Open what lies on disk or behind a URL."""
    with _as_value_error(source):
        paths = find_paths(source)
        if format not in FILE_FORMATS and not can_list(source) and SUFFIXES.get(_suffix(source)) != format:
            raise ValueError(
                f"{source}: web servers cannot list the files of a folder, which data of the format {format!r} need; "
                "give the COCO json or the data.yaml of YOLO itself, or make it Parquet or tars"
            )
        # Files of a remote source are opened at once, which says so too.
        missing = [path for path in paths if not (is_remote(source) and format in FILE_FORMATS) and can_list(path)]
        missing = [path for path in missing if not path.exists()]
        if missing:
            raise ValueError(f"{missing[0]} does not exist{did_you_mean(str(missing[0]), _siblings(missing[0]))}")
        if format == "imagefolder" and not paths[0].is_dir():
            raise ValueError(f"{source} is a file; give the folder of the images")
        if len(paths) > 1 and format not in FILE_FORMATS:
            raise ValueError(f"{source} names {len(paths)} files; only {' and '.join(FILE_FORMATS)} may be several")
        return OPENERS[format](paths if len(paths) > 1 else paths[0], split, num_samples=num_samples)


@contextmanager
def _as_value_error(source: str) -> Iterator[None]:
    """Errors of a remote source as ValueError, without passwords and keys in URLs."""
    try:
        yield
    except (OSError, ImportError, aiohttp.ClientError) as error:  # no server, a status, a protocol without its package
        if not is_remote(source):
            raise
        raise ValueError(f"{redact_url(source)} cannot be read: {error_text(error)}") from error
    except ValueError as error:
        if redact(str(error)) == str(error):
            raise
        raise ValueError(redact(str(error))) from error


def guess_format(source: str | Path) -> str:
    """The format of a source, told from its name and what is there.

    Raises:
        ValueError: There is nothing of that name, or nothing of a known format in it.
    """
    text, path = str(source), Path(source).expanduser()
    is_pattern = re.search(r"[*{]", text) is not None
    if is_remote(text) or is_pattern:
        if _suffix(text) in SUFFIXES:
            return SUFFIXES[_suffix(text)]
        if is_pattern or not can_list(text):
            raise ValueError(f"the format of {redact_url(text)} cannot be told from its name; give the format")
        with _as_value_error(text):
            return _format_of_folder(cast(Path, UPath(text)))
    if text == "scenes" or text.startswith("scenes:"):
        return "scenes"
    if path.is_dir():
        return _format_of_folder(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{source} is neither Parquet, a tar, a COCO json nor a data.yaml of YOLO; give a folder or the format"
            )
        return SUFFIXES[path.suffix.lower()]
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and path.suffix not in SUFFIXES:
        return "hub"
    raise ValueError(f"{source} does not exist{did_you_mean(str(path), _siblings(path))}")


def _suffix(source: str) -> str:
    return PurePosixPath(redact_url(source)).suffix.lower()


def _format_of_folder(folder: Path) -> str:
    """The format of what a folder holds, on disk or remote."""
    if isinstance(folder, Path):
        names = [name for _, _, files in os.walk(folder) for name in files]
    else:  # a remote one
        names = folder.fs.find(folder.path)
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if not suffixes and not folder.exists():
        raise ValueError(f"{folder} does not exist")
    # Folders with annotations hold images too.
    signs: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("parquet", lambda: ".parquet" in suffixes),
        ("webdataset", lambda: ".tar" in suffixes),
        ("coco", lambda: find_coco_files(folder)),
        ("voc", lambda: looks_like_voc(folder)),
        ("yolo", lambda: looks_like_yolo(folder)),
        ("imagefolder", lambda: suffixes & IMAGE_EXTENSIONS),
    )
    for format, is_there in signs:
        if is_there():
            return format
    raise ValueError(
        f"{folder} holds no Parquet files, no tars, no COCO json (annotations/*.json, _annotations.coco.json or a "
        "json beside the images), no xml of Pascal VOC, no data.yaml or labels/ of YOLO, and no images; "
        f"{describe_folder(folder)}"
    )


def _open_hub(source: str, split: str, *, num_samples: int | None, name: str | None, revision: str | None) -> Source:
    # A stream that is closed early would sleep for seconds; nothing here needs that.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    try:
        splits = datasets.load_dataset(source, name, revision=revision, streaming=True)
    except Exception as error:  # of many kinds: no such dataset, no network, a gate, a missing configuration
        hint = did_you_mean(source, ["scenes", *_siblings(Path(source))])
        raise ValueError(
            f"{source} is no folder or file here, and as a dataset on the Hub it cannot be opened: {error}{hint}. "
            f"For a private or gated one, accept its terms at https://huggingface.co/datasets/{source} and log in: "
            "hf auth login"
        ) from error
    stream = choose_split(splits, split, source).decode(False)
    features = stream.features if stream.features is not None else stream._resolve_features().features
    columns = find_columns(features, source)
    reader = RowReader(
        map=columns,
        label=_declared(features, columns, "label", source),
        category=_declared(features, columns, "objects", source),
        source=source,
    )
    declared = (stream.info.splits or {}).get(str(stream.split))
    if num_samples is not None:
        stream = stream.take(num_samples)
    raw = list(columns.source_names)
    examples = stream.select_columns(raw).map(reader, remove_columns=raw, features=reader.features)
    num_examples = (declared.num_examples if declared is not None else None) or None
    if num_examples is not None and num_samples is not None:
        num_examples = min(num_examples, num_samples)
    return Source(dataset=examples, num_examples=num_examples)


def _declared(features: datasets.Features, columns: ColumnMap, column: str, source: str) -> Categories | None:
    """The classes that the features of a column declare: the values of a remote source are not read to find them."""
    name = columns.columns.get(column)
    if name is None:
        return None
    feature = features[name] if column == "label" else object_fields(features[name])[columns.objects["category"]]
    categories = read_categories(feature)
    if categories is None:
        logger.warning("%s: the column %r is left out: without ClassLabel its classes are not known", source, name)
    return categories


def _siblings(path: Path) -> list[str]:
    """What lies where a missing path should be."""
    return [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
