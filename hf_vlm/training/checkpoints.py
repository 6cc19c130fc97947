"""The checkpoints of a run: which there are, whether they are whole, and which are deleted or set aside."""

import json
import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from hf_vlm.data.io.durable import (
    MANIFEST_FILE,
    PARTIAL_FOLDER,
    damage,
    disk_errors,
    remove_folder,
    sync_folder,
    sync_tree,
    write_manifest,
)
from hf_vlm.data.io.messages import summarise
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.provenance import RUN_FILE

__all__ = [
    "abandon_later_checkpoints",
    "check_run_folder",
    "checkpoint_folder",
    "checkpoints",
    "clear_run_folder",
    "commit_checkpoint",
    "commit_model",
    "complete_checkpoints",
    "last_checkpoint",
    "prepare_run_folder",
    "resume_advice",
    "rotate_checkpoints",
    "step_of",
    "verify_checkpoint",
]

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files of which a resumed run needs at least one each; those of sharded models are folders.
NEEDED = {
    "weights": ("model*.safetensors", "adapter_model*", "pytorch_model*"),
    "optimiser state": ("optimizer*", "global_step*"),
    "state of the learning rate's schedule": ("scheduler*", "global_step*"),
    "random states": ("rng_state*",),
    "trainer state": (TRAINER_STATE_NAME,),
}
# What commands would take from the folder of an earlier run; "objective" is the pretraining model of version 0.1.
MODEL_FILES = (CONFIG_NAME, RUN_FILE, "preprocessor_config.json", "model*.safetensors*", "adapter_*")
MODEL_FOLDERS = ("pretraining_model", "objective")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step of the run in `folder`."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    found = CHECKPOINT.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run by step, also damaged ones; file times play no part, for clocks may go back."""
    paths = (path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir())
    return sorted(paths, key=step_of)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, by step, whose files are all there with their sizes; contents are not read."""
    return [path for path in checkpoints(Path(folder)) if not _faults(path, checksums=False)]


def last_checkpoint(folder: str | Path) -> str:
    """The newest checkpoint of a run, of the branch that was trained last; whether it is whole is not checked.

    Raises:
        ValueError: There is none.
    """
    committed = [path for path in checkpoints(Path(folder)) if not _was_cut_short(path)]
    if not committed:
        raise ValueError(f"{folder} holds no complete checkpoint to resume from.")
    return str(committed[-1])


def verify_checkpoint(checkpoint: str | Path, *, checksums: bool = True) -> None:
    """Makes sure that training can be resumed exactly from a checkpoint.

    Args:
        checksums: Whether contents are compared with the manifest, and not only names and sizes.

    Raises:
        ValueError: A file is missing or damaged; it is named, and the newest older checkpoint that is intact.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        near = summarise(path.name for path in reversed(checkpoints(checkpoint.parent)))
        raise ValueError(f"There is no checkpoint {checkpoint}." + (f" There are: {near}." if near else ""))
    if faults := _faults(checkpoint, checksums=checksums):
        raise ValueError(f"{checkpoint} cannot be resumed from: {summarise(faults)}. {_older_advice(checkpoint)}")


def _older_advice(checkpoint: Path) -> str:
    if CHECKPOINT.fullmatch(checkpoint.name):
        for older in reversed(checkpoints(checkpoint.parent)):
            if step_of(older) < step_of(checkpoint) and not _faults(older, checksums=True):
                return f"The newest intact one before it: --resume_from_checkpoint {older}"
    return "There is no intact one before it: start again with --overwrite_output_dir true, or in another folder."


def _was_cut_short(checkpoint: Path) -> bool:
    """Whether a run of an earlier version, which wrote in place, was killed while it wrote this checkpoint."""
    return not (checkpoint / MANIFEST_FILE).exists() and bool(_unreadable(checkpoint / TRAINER_STATE_NAME))


def _faults(checkpoint: Path, *, checksums: bool) -> list[str]:
    """What is missing or damaged in a checkpoint, one text each."""
    found = damage(checkpoint, checksums=checksums)
    if found:
        return found
    missing = [
        f"it holds no {what} ({patterns[0]})"
        for what, patterns in NEEDED.items()
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    if (checkpoint / MANIFEST_FILE).is_file():
        return missing
    return missing + list(_faults_without_manifest(checkpoint))


def _faults_without_manifest(checkpoint: Path) -> Iterator[str]:
    """Faults that the files of a checkpoint of an earlier version show by themselves."""
    names = {path.name for path in checkpoint.iterdir()}
    for index in checkpoint.glob("*.index.json"):
        if not _unreadable(index):
            names |= set(json.loads(index.read_bytes())["weight_map"].values())
    if "rng_state_0.pth" in names:  # one per rank, as there are positions in the data
        names |= {f"rng_state_{path.stem.rpartition('_')[2]}.pth" for path in checkpoint.glob("data_state_*.pt")}
    for name in sorted(names):
        if not (checkpoint / name).exists():
            yield f"{name} is missing"
        elif reason := _unreadable(checkpoint / name):
            yield f"{name} is damaged ({reason})"


def _unreadable(path: Path) -> str:
    """Why a file's format shows that it is not whole; empty where it does not. Contents are not read."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return "cut short"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error).splitlines()[0]
    return ""


def resume_advice(folder: Path) -> str:
    """What to do about a run that cannot write: the last checkpoint that is kept."""
    complete = complete_checkpoints(folder)
    kept = (
        f"The last checkpoint, {complete[-1]}, is kept: continue with --resume_from_checkpoint last."
        if complete
        else "There is no checkpoint yet."
    )
    return f"Free space there (earlier checkpoints, see save_total_limit), or name another --output_dir. {kept}"


def commit_checkpoint(partial: Path, checkpoint: Path) -> None:
    """Gives a checkpoint that was written aside its name, once it is on the disk with a manifest."""
    sync_tree(partial)
    write_manifest(partial)
    if checkpoint.exists():  # saved twice at one step
        remove_folder(checkpoint)
    partial.replace(checkpoint)
    sync_folder(checkpoint.parent)


def commit_model(partial: Path, folder: Path) -> None:
    """Moves a model that was written aside into its folder, in place of an earlier one.

    `config.json`, without which nothing loads, is the first file of the earlier model to go and the last of the new
    one to come: a kill leaves one model, or none, and never the parts of two.
    """
    sync_tree(partial)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):  # the new weights may be in more or fewer files
        path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        if path.is_dir() and (folder / path.name).exists():
            remove_folder(folder / path.name)
        elif path.name == CONFIG_NAME:
            sync_folder(folder)
        path.replace(folder / path.name)
    sync_folder(folder)
    shutil.rmtree(partial.parent)


def rotate_checkpoints(folder: Path, limit: int | None, *, keep: Collection[Path]) -> None:
    """Deletes the checkpoints of the lowest steps until there are at most `limit`; those in `keep` always stay."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(folder)
    surplus = len(found) - max(limit, len(keep))
    for path in [path for path in found if path not in keep][: max(surplus, 0)]:
        try:
            remove_folder(path)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)


def abandon_later_checkpoints(folder: Path, step: int) -> None:
    """Renames checkpoints after `step`, where training continues: they belong to a branch that it leaves."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = path.with_name(f"abandoned-{path.name}-{number}")
            path.replace(aside)
            logger.warning(
                "Training continues from step %d: %s of an earlier branch is now %s. Delete it if it is not needed.",
                step,
                path,
                aside.name,
            )


def prepare_run_folder(folder: Path) -> None:
    """Makes the folder of a run and tries to write there; ValueError, before any work is done, where that fails."""
    with disk_errors("The run", folder, lambda: "Name with --output_dir a folder that you may write to."):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))


def check_run_folder(args: VisionTrainingArguments) -> None:
    """Makes sure that the folder of a new run will hold its own checkpoints only.

    Raises:
        ValueError: if `output_dir` holds a run or a model that is not to be overwritten.
    """
    folder = Path(args.output_dir)
    found = [path for path in checkpoints(folder) if not _was_cut_short(path)]
    found += filter(Path.exists, (folder / RUN_FILE, folder / CONFIG_NAME))
    if found and not args.overwrite_output_dir:
        raise ValueError(
            f"{folder} holds a run already ({found[0].name}). Name another folder with --output_dir, resume that "
            "run with --resume_from_checkpoint last, or delete it with --overwrite_output_dir true."
        )


def clear_run_folder(folder: Path) -> None:
    """Deletes an earlier run's model, record and checkpoints, which would be taken for those of the new run."""
    for pattern in MODEL_FILES:  # config.json first: without it there is no model
        for path in folder.glob(pattern):
            path.unlink()
    abandoned = folder.glob("abandoned-checkpoint-*")
    for path in (*checkpoints(folder), *abandoned, *(folder / name for name in MODEL_FOLDERS)):
        if path.is_dir():
            remove_folder(path)
    shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
