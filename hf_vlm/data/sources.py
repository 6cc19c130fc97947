"""Open anything as a source of one schema: one table of the formats, and how each is recognised."""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import aiohttp

from hf_vlm.data.formats.coco import find_coco_files, open_coco
from hf_vlm.data.formats.hub import open_hub
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, open_imagefolder
from hf_vlm.data.formats.mask_classes import name_mask_classes
from hf_vlm.data.formats.mask_folder import looks_like_mask_folder, open_mask_folder
from hf_vlm.data.formats.metadata import is_metadata
from hf_vlm.data.formats.mixture import mix_sources
from hf_vlm.data.formats.parquet import open_parquet
from hf_vlm.data.formats.parquet_files import read_metadata
from hf_vlm.data.formats.splits import canonical_split, describe_folder
from hf_vlm.data.formats.voc import looks_like_voc, open_voc
from hf_vlm.data.formats.webdataset import open_webdataset
from hf_vlm.data.formats.yolo import looks_like_yolo, open_yolo
from hf_vlm.data.io.files import as_path, can_list, find_paths, is_remote, near_path, walk
from hf_vlm.data.io.messages import collect_warnings, error_text, redact, redact_url, summarise
from hf_vlm.data.io.trust import TrustedRows, outside_allowed
from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.data.source import Source

__all__ = ["FORMATS", "guess_format", "open_source"]

logger = logging.getLogger(__name__)


class FileFormat(NamedTuple):
    """How a format of files is opened, and how it is recognised."""

    open: Callable[..., Source]
    suffixes: tuple[str, ...]  # of a file that is a source by itself
    is_in: Callable[[Path, Collection[str]], Any]  # whether a folder holds it, given also the suffixes of its files
    takes_several: bool = False  # whether several files make one source, on disk or remote


def _has_images(suffixes: Collection[str]) -> bool:
    return not IMAGE_EXTENSIONS.isdisjoint(suffixes)


def _holds_parquet(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether a folder has Parquet files that are more than features, which `embed` may have left beside images, and
    more than metadata of these."""
    if ".parquet" not in suffixes or not _has_images(suffixes):
        return ".parquet" in suffixes
    paths = [path for path in folder.rglob("*.parquet") if "/." not in path.relative_to(folder).as_posix()]
    return not all(is_metadata(path) or _are_features(path) for path in paths)


def _are_features(path: Path) -> bool:
    try:
        return {"image_id", "features"} <= set(read_metadata(path).schema.to_arrow_schema().names)
    except ValueError:
        return False  # opening it says what is wrong


# In the order in which a folder is asked: annotations beside images decide, whatever else lies there; and folders with
# annotations hold images too.
FILE_FORMATS = {
    "coco": FileFormat(
        open_coco,
        (".json",),
        lambda folder, found: ".json" in found and _has_images(found) and find_coco_files(folder),
    ),
    "voc": FileFormat(
        open_voc, (), lambda folder, found: ".xml" in found and _has_images(found) and looks_like_voc(folder)
    ),
    "yolo": FileFormat(
        open_yolo, (".yaml", ".yml", ".data"), lambda folder, found: _has_images(found) and looks_like_yolo(folder)
    ),
    "parquet": FileFormat(open_parquet, (".parquet",), _holds_parquet, takes_several=True),
    "webdataset": FileFormat(open_webdataset, (".tar",), lambda folder, found: ".tar" in found, takes_several=True),
    "masks": FileFormat(
        open_mask_folder, (), lambda folder, found: _has_images(found) and looks_like_mask_folder(folder)
    ),
    "imagefolder": FileFormat(open_imagefolder, (), lambda folder, found: _has_images(found)),
}
FORMATS = ("scenes", *FILE_FORMATS, "hub")
FORMAT_OF_SUFFIX = {suffix: name for name, format in FILE_FORMATS.items() for suffix in format.suffixes}


def open_source(
    source: str | Path | Mapping[str, float],
    split: str = "train",
    *,
    format: str | None = None,
    num_samples: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    allow_outside: bool = False,
    object_masks: bool = True,
) -> Source:
    """Open a source, whose images stay encoded.

    Args:
        source: `scenes`, `scenes:easy`, `scenes:hard`, `scenes:symbols` or `scenes:captions` (the built-in images); a
            Parquet file, a WebDataset tar, or a folder of these; a COCO json or a folder with one; a folder of
            Pascal VOC; a data.yaml of YOLO or its folder; a folder of images; or the id of a dataset on the Hub. Files
            and folders may also be URLs of any protocol that fsspec knows (https, s3, gs, ...), with credentials from
            its configuration; web servers alone have no folders. `{00..31}` and `*` name several Parquet files or
            tars. A mapping of sources to weights mixes them (see `mix_sources`).
        split: Name of the split; `val` and `valid` are `validation`.
        format: One of `FORMATS`; None to guess it.
        num_samples: Number of examples to read: the first ones, but evenly spread ones of class folders; None for all.
        name: Configuration of a dataset on the Hub.
        revision: Branch, tag or commit of a dataset on the Hub.
        allow_outside: Whether annotations and tables may name files outside of the source's folder or host.
        object_masks: Whether `objects` have their masks, where the source holds some; without them it opens faster.

    Returns:
        A source with the columns `image` ({"bytes", "path"}) and `image_id`, and as the source has them `label`,
        `objects` {bbox, category, area, iscrowd, segmentation}, `mask`, `instance_mask` and `text`, a list of
        captions. The classes of masks are named by a file `mask_classes.txt`, `labelmap.txt` or `class_dict.csv` in
        the folder.

    Raises:
        ValueError: There is nothing of the format, no such split, the labels make no sense, or the source names files
            outside of itself and may not.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be positive")
    with outside_allowed(allow_outside), collect_warnings() as findings:
        options: dict[str, Any] = {"format": format, "num_samples": num_samples, "object_masks": object_masks}
        if isinstance(source, Mapping):
            opened = _open_mixture(source, split, **options)
        else:
            opened = _open(source, split, **options, name=name, revision=revision)
    if allow_outside:
        opened = replace(opened, dataset=opened.dataset.map(TrustedRows(), features=opened.features))
    return replace(opened, findings=tuple(dict.fromkeys(findings)))


def _open(
    source: str | Path,
    split: str,
    *,
    format: str | None,
    num_samples: int | None = None,
    object_masks: bool,
    name: str | None = None,
    revision: str | None = None,
) -> Source:
    format = guess_format(source) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; the formats are {', '.join(FORMATS)}")
    if (name is not None or revision is not None) and format != "hub":
        raise ValueError(f"name and revision belong to datasets on the Hub; {source} has the format {format!r}")
    options: dict[str, Any] = {"num_samples": num_samples, "object_masks": object_masks}
    if format == "scenes":
        preset = str(source).removeprefix("scenes").removeprefix(":") or "easy"
        opened = scenes_source(preset, canonical_split(split), **options)
    elif format == "hub":
        opened = open_hub(str(source), split, name=name, revision=revision, **options)
    else:
        opened = _open_files(str(source), split, format=format, **options)
    return replace(opened, name=redact_url(source), format=format, split=split)


def _open_mixture(
    source: Mapping[str, float], split: str, *, format: str | None, num_samples: int | None, object_masks: bool
) -> Source:
    if not source:
        raise ValueError("a mixture needs at least one source with its weight")
    mixture = mix_sources(
        {part: _open(part, split, format=format, object_masks=object_masks) for part in source}, source
    )
    dataset = mixture.dataset if num_samples is None else mixture.dataset.take(num_samples)
    return replace(mixture, dataset=dataset, name=", ".join(map(redact_url, source)), format="mixture", split=split)


def _open_files(source: str, split: str, *, format: str, **options: Any) -> Source:
    """Open files on disk or behind a URL."""
    with _as_value_error(source):
        paths, takes_several = find_paths(source), FILE_FORMATS[format].takes_several
        if not takes_several and not can_list(source) and FORMAT_OF_SUFFIX.get(_suffix(source)) != format:
            raise ValueError(
                f"{source}: web servers cannot list the files of a folder, which the format {format!r} needs; "
                "give the COCO json or the data.yaml of YOLO itself, or make it Parquet or tars"
            )
        # Remote files of these formats are opened at once, which reports missing ones too.
        missing = [path for path in paths if not (is_remote(source) and takes_several) and can_list(path)]
        missing = [path for path in missing if not path.exists()]
        if missing:
            raise ValueError(f"{missing[0]} does not exist{near_path(missing[0])}")
        if format in ("masks", "imagefolder") and not paths[0].is_dir():
            raise ValueError(f"{source} is a file; give the folder of the images")
        if len(paths) > 1 and not takes_several:
            several = [name for name, entry in FILE_FORMATS.items() if entry.takes_several]
            raise ValueError(f"{source} names {len(paths)} files; only {' and '.join(several)} may be several")
        opened = FILE_FORMATS[format].open(paths if len(paths) > 1 else paths[0], split, **options)
        return name_mask_classes(opened, paths[0])


@contextmanager
def _as_value_error(source: str) -> Iterator[None]:
    """Errors of files and servers as ValueError, without passwords and keys in URLs."""
    try:
        yield
    except (OSError, ImportError, aiohttp.ClientError) as error:  # no server, a status, a protocol without its package
        raise ValueError(f"{redact_url(source)} cannot be read: {error_text(error)}") from error
    except UnicodeEncodeError as error:
        name = error.object[max(error.start - 40, 0) : error.end + 40]
        raise ValueError(f"{redact_url(source)} holds a name that is no Unicode text, {name!r}: rename it") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{redact_url(source)} holds what nests too deep, or a number too large: {error}") from error
    except ValueError as error:
        if redact(str(error)) == str(error):
            raise
        raise ValueError(redact(str(error))) from error


def guess_format(source: str | Path) -> str:
    """The format of a source, guessed from its name and content.

    Raises:
        ValueError: There is nothing of that name, or nothing of a known format in it.
    """
    text, path = str(source), Path(source).expanduser()
    is_pattern = re.search(r"[*{]", text) is not None
    if is_remote(text) or is_pattern:
        if _suffix(text) in FORMAT_OF_SUFFIX:
            return FORMAT_OF_SUFFIX[_suffix(text)]
        if is_pattern or not can_list(text):
            raise ValueError(f"the format of {redact_url(text)} cannot be guessed from its name; give the format")
        with _as_value_error(text):
            return _format_of_folder(as_path(text))
    if text == "scenes" or text.startswith("scenes:"):
        return "scenes"
    if path.is_dir():
        with _as_value_error(text):
            return _format_of_folder(path)
    if path.is_file():
        if path.suffix.lower() not in FORMAT_OF_SUFFIX:
            raise ValueError(
                f"{source} is neither Parquet, a tar, a COCO json nor a data.yaml of YOLO; give a folder or the "
                "format (images and videos to look at are for hf-vlm predict)"
            )
        return FORMAT_OF_SUFFIX[path.suffix.lower()]
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith(".")
    # What is missing in a folder that is here is no name: the Hub's client would retry for half a minute.
    is_in_folder = "/" in text and Path(text.partition("/")[0]).is_dir()
    if is_name and not is_in_folder and path.suffix not in FORMAT_OF_SUFFIX:
        return "hub"
    raise ValueError(f"{source} does not exist{near_path(path)}")


def _suffix(source: str) -> str:
    return PurePosixPath(redact_url(source)).suffix.lower()


def _format_of_folder(folder: Path) -> str:
    """The format of what a folder holds, on disk or remote."""
    names = _file_names(folder)
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if not names and not folder.exists():
        raise ValueError(f"{folder} does not exist")
    formats = [name for name, format in FILE_FORMATS.items() if format.is_in(folder, suffixes)]
    if formats:
        _warn_of_unread(folder, formats, names)
        return formats[0]
    raise ValueError(
        f"{folder} holds no Parquet files, no tars, no COCO json (annotations/*.json, _annotations.coco.json or a "
        "json beside the images), no xml of Pascal VOC, no data.yaml or labels/ of YOLO, and no images; "
        f"{describe_folder(folder)}"
    )


def _file_names(folder: Path) -> list[str]:
    """Names of all files below a folder but hidden ones, as caches hold them."""
    if not isinstance(folder, Path):  # a remote one
        start = len(folder.path.rstrip("/")) + 1
        names = [name[start:] for name in folder.fs.find(folder.path)]
        return [name.rpartition("/")[2] for name in names if "/." not in f"/{name}"]
    return [name for _, files in walk(folder) for name in files]


def _warn_of_unread(folder: Path, formats: Sequence[str], names: Sequence[str]) -> None:
    """Name what a folder holds beside the format that it is opened as."""
    format, *others = formats
    if others := [name for name in others if name != "imagefolder"]:
        logger.warning(
            "%s is opened as %s; what it also holds of %s is not read (give the format to read that)",
            folder,
            format,
            summarise(others),
        )
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
    if images and format in ("parquet", "webdataset"):
        logger.warning(
            "%s is opened as %s; %d image files beside that are not read: %s",
            folder,
            format,
            len(images),
            summarise(images),
        )
