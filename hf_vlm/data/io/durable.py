"""Files and folders that are whole or absent whenever a process is killed, and manifests that show later damage.

What is written goes into a folder aside (`PARTIAL_FOLDER`), is synced to the disk, and is then renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from hf_vlm.data.io.messages import error_text

__all__ = [
    "MANIFEST_FILE",
    "PARTIAL_FOLDER",
    "created_folder",
    "damage",
    "disk_errors",
    "is_partial",
    "make_folder",
    "remove_empty_folders",
    "remove_folder",
    "replace_text",
    "replaced_file",
    "sync_folder",
    "sync_tree",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
PARTIAL_FOLDER = ".partial"  # within the folder of a run; what it holds is never a checkpoint nor a model
NUM_THREADS = 4  # that read files for checksums, which Python computes without its lock
CPP_WRITE_ERRORS = ("iostream", "inline_container", "PytorchStreamWriter")  # torch.save does not say what was wrong


def is_partial(path: Path) -> bool:
    """Whether a path lies in a folder aside, and so is renamed by whoever writes there."""
    return PARTIAL_FOLDER in path.parts


def replace_text(path: Path, text: str) -> None:
    """Writes a text file that always holds the earlier text or the new one."""
    with _replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that is renamed to the path on success, and deleted otherwise.

    Raises:
        ValueError: The path cannot be written.
    """
    try:
        with _replacing(path) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error_text(error)}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, on file systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until all files below a folder, and their names, are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:  # some systems sync only what is open for writing
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it, and returns the ones that were not there, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty_folders(folders: Iterable[Path]) -> None:
    """Deletes those folders that hold nothing, in their order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_folder(folder: Path) -> None:
    """Deletes a folder of a run, which is gone at once: a half-deleted one would look damaged.

    It is first renamed into the folder aside, which the next start clears if this process is killed here.
    """
    aside = folder.parent / PARTIAL_FOLDER / f"deleted-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Writes sizes and SHA-256 checksums of all files below a folder into its `manifest.json`."""
    replace_text(folder / MANIFEST_FILE, json.dumps({"files": _describe(folder, _files(folder))}, indent=1) + "\n")


def damage(folder: Path, *, checksums: bool = True) -> list[str]:
    """What differs from a folder's manifest, one text per file; empty without a manifest. New files are no damage.

    Args:
        checksums: Whether contents are read, and not only sizes compared.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return []
    try:
        expected: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST_FILE} cannot be read ({error})"]
    found = []
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry["size"]:
            found.append(f"{name} has {size:,} of {entry['size']:,} bytes")
    if found or not checksums:
        return found
    now = _describe(folder, [folder / name for name in expected])
    return [f"{name} has other contents" for name, entry in expected.items() if now[name] != entry]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST_FILE]


def _describe(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    def describe(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(describe, files)))


@contextlib.contextmanager
def created_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that is renamed to the path, which must not exist, on success, and deleted otherwise.

    Raises:
        ValueError: The path cannot be written.
    """
    partial, made = path.parent / PARTIAL_FOLDER / path.name, []
    try:
        made = make_folder(partial.parent)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        yield partial
        sync_tree(partial)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error_text(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty_folders([partial.parent, *made])  # others may be writing there


@contextlib.contextmanager
def disk_errors(what: str, folder: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turns errors of writing into a ValueError: what could not be written, where, why, and what to do.

    Args:
        what: What is written, as the subject of the message.
        folder: Where.
        advice: What to do; asked for once there is an error.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(word in str(error) for word in CPP_WRITE_ERRORS):
            raise
        raise ValueError(f"{what} could not be written to {folder}: {_reason(error, folder)}. {advice()}") from error


def _reason(error: Exception, folder: Path) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    reason = "torch could not write a whole file" if type(error) is RuntimeError else reason
    with contextlib.suppress(OSError):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return f"{reason} ({shutil.disk_usage(existing).free / 2**20:,.0f} MiB are free)"
    return reason
