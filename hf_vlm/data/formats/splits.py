"""Which split a file belongs to, by its name."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from hf_vlm.data.io.messages import redact_url, summarise

__all__ = [
    "SPLIT_ALIASES",
    "NoSplitError",
    "canonical_split",
    "choose_split",
    "common_folder",
    "describe_folder",
    "folder_split_of",
    "group_by_split",
    "split_of",
]

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
CANONICAL = {alias: split for split, aliases in SPLIT_ALIASES.items() for alias in aliases}
SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")

Content = TypeVar("Content")


class NoSplitError(ValueError):
    """A source has no split of a name; `splits` are the names that it has."""

    def __init__(self, source: object, split: str, splits: Sequence[str]) -> None:
        super().__init__(f"{source} has no split {split!r}; it has {', '.join(splits)}")
        self.splits = tuple(splits)


def canonical_split(name: str) -> str:
    """`val` and `valid` are `validation`; other names are their own."""
    return CANONICAL.get(name.lower(), name)


def split_of(path: PurePath) -> str | None:
    """The split that a path, relative to its source, names: by a folder, or by a word of the file name.

    >>> split_of(PurePath("data/train-00000-of-00002.parquet")), split_of(PurePath("instances_val2017.json"))
    ('train', 'validation')
    """
    split = folder_split_of(path)
    if split is not None:
        return split
    for word in re.split(r"[^a-z]+", path.stem.lower()):
        if word in CANONICAL:
            return canonical_split(word)
    shard = SHARD_NAME.fullmatch(path.stem)
    return shard[1] if shard else None


def folder_split_of(path: PurePath) -> str | None:
    """The split that a folder of a path names; names of images and their labels may hold such words by chance."""
    return next((canonical_split(folder) for folder in path.parts[:-1] if folder.lower() in CANONICAL), None)


def group_by_split(
    files: Sequence[Path], root: Path, split_of: Callable[[PurePath], str | None] = split_of
) -> dict[str, list[Path]]:
    """Files by their split, as a function of their path in a folder says; where none names one, they are all `train`.

    Raises:
        ValueError: Some files name a split and others do not.
    """
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative_to(root)), []).append(file)
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise ValueError(
            f"{root}: no split can be recognised in the names of {summarise(unnamed)}, while other files name "
            f"{summarise(splits)}; rename them, as train-00000.parquet, or move them elsewhere"
        )
    return {"train": unnamed} if unnamed else {str(split): files for split, files in splits.items()}


def choose_split(splits: Mapping[str, Content], split: str, source: object) -> Content:
    """The content of a split.

    Raises:
        NoSplitError: There is no such split; the message names those that are there.
    """
    by_name = {canonical_split(name): content for name, content in splits.items()}
    if canonical_split(split) not in by_name:
        raise NoSplitError(source, split, list(splits))
    return by_name[canonical_split(split)]


def common_folder(paths: Sequence[Path]) -> Path:
    """The innermost folder that holds all paths.

    Raises:
        ValueError: There is none.
    """
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        if folder == folder.parent:
            raise ValueError(f"{summarise(map(redact_url, paths))} have no folder in common; open them one by one")
        folder = folder.parent
    return folder


def describe_folder(folder: Path) -> str:
    """What a folder holds, for messages."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"it holds {summarise(names)}" if names else "it is empty"
