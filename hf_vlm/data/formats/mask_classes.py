"""Names of the values of masks, from a text file beside the data."""

from pathlib import Path

from hf_vlm.data.io.files import can_list, is_folder
from hf_vlm.data.io.messages import summarise

__all__ = ["MASK_CLASSES_FILE", "read_mask_classes"]

MASK_CLASSES_FILE = "mask_classes.txt"


def read_mask_classes(path: Path) -> tuple[str, ...] | None:
    """The names of the values 0, 1, 2, ... of masks: the lines of `mask_classes.txt` in a folder, or beside a file.

    Returns:
        The names; None where there is no such file, or the server cannot list files.

    Raises:
        ValueError: A line is empty, or a name is there twice.
    """
    if not can_list(path):
        return None
    file = (path if is_folder(path) else path.parent) / MASK_CLASSES_FILE
    if not file.exists():
        return None
    names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    if not names or not all(names):
        line = names.index("") + 1 if names else 1
        raise ValueError(f"{file}: line {line} is empty; each line names one value of the masks, 0, 1, 2, ...")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} names {summarise(repeated)} more than once")
    return tuple(names)
