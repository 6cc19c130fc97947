"""Checks of output paths before a command starts, so that it does not fail once all work is done."""

import os
from pathlib import Path

from hf_vlm.data.io.durable import make_folder, remove_empty_folders

_made: list[Path] = []  # folders that were not there before the command, innermost first


def is_picture(path: Path) -> bool:
    """Whether Pillow can write a file with this extension."""
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE


def prepare_picture(path: Path, *, like: str, option: str = "--save") -> None:
    """Make the folder of a picture; ValueError, with an example, where Pillow cannot write such a file."""
    if not is_picture(path):
        raise ValueError(f"{option} {path}: name a picture file, such as {like}")
    prepare_file(path)


def prepare_folder(path: Path) -> None:
    """Make a folder to write into; ValueError where that is impossible."""
    prepare_file(path / "file")


def prepare_file(path: Path) -> None:
    """Make the folder of a file; ValueError where that is impossible."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    try:
        _made[:0] = make_folder(path.parent)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: you may not write into {path.parent}")


def remove_unused_folders() -> None:
    """Delete the folders that were made for outputs and got none, as where a command failed."""
    remove_empty_folders(_made)
    _made.clear()
