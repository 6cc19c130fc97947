"""Checks the files that a command will write before it begins, rather than fail when all work is done."""

import os
from pathlib import Path


def is_picture(path: Path) -> bool:
    """Whether Pillow can write such a file, by its ending."""
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE


def prepare_picture(path: Path, *, like: str, option: str = "--save") -> None:
    """Make the folder of a picture; ValueError where Pillow cannot write such a file, with a name to copy."""
    if not is_picture(path):
        raise ValueError(f"{option} {path}: name a picture, as {like}")
    prepare_file(path)


def prepare_file(path: Path) -> None:
    """Make the folder of a file; ValueError where that is impossible."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: you may not write into {path.parent}")
