"""Sources of models: what is no folder and cannot be a name on the Hub is refused before the Hub is asked.

The Hub's client tries for half a minute, and transformers then says that there is no connection.
"""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers.utils import CONFIG_NAME

from .nearest_name import did_you_mean

NUM_SHOWN = 5


def check_source(source: str, revision: str | None = None) -> None:
    """Makes sure that a source of a model is a folder, or a name for which a Hub that answers can be asked.

    Raises:
        ValueError: There is no such folder, and it is no name on the Hub but a path: by its form, or because its
            first folder is there. Or the Hub cannot be reached and the model is not in the cache.
    """
    if Path(source).is_dir():
        return
    if why := _why_local(source):
        near = _near(Path(source).expanduser())
        raise ValueError(f"There is no folder {source!r}{near} It is not looked for on the Hub, {why}.")
    if isinstance(try_to_load_from_cache(source, CONFIG_NAME, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, CONFIG_NAME, revision=revision))
    except (HfHubHTTPError, FileMetadataError):
        return  # it answers: whoever loads the model says what is wrong
    except Exception as error:  # the client's own types, of which there were two so far
        raise ValueError(
            f"{source!r} is neither a folder with a model nor one on the Hub, as far as it can be reached: {error}"
        ) from error


def _why_local(source: str) -> str:
    """Why a source can only be a path, as the end of a sentence; empty where it may be a name on the Hub."""
    first, slash, _ = source.partition("/")
    try:
        validate_repo_id(source)
    except HFValidationError:
        return "where models are called owner/name"
    if slash and (first == "runs" or Path(first).is_dir()):  # recipes write into `runs`
        return f"for it begins with the folder {first}"
    return ""


def _near(path: Path) -> str:
    """The folders that a missing one may have been meant to be, as the end of a sentence."""
    if path.is_file():
        return ", but a file: name the folder that it is in."
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    folders = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if near := did_you_mean(
        missing.name, folders, offered=lambda name: str(parent / name / path.relative_to(missing))
    ):
        return near
    more = f" and {len(folders) - NUM_SHOWN} more" if len(folders) > NUM_SHOWN else ""
    return f"; in {parent} are {', '.join(folders[:NUM_SHOWN])}{more}." if folders else f"; in {parent} are none."


__all__ = ["check_source"]
