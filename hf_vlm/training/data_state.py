"""The data position in a checkpoint; complete checkpoints of a run, and checks of its folder."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from hf_vlm.data.io.messages import summarise
from hf_vlm.data.stream import ExampleStream
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.provenance import RUN_FILE

__all__ = ["check_run_folder", "clear_run_folder", "last_checkpoint", "load_data_state", "save_data_state"]

logger = logging.getLogger(__name__)


def save_data_state(checkpoint: Path, loader: StatefulDataLoader[Any], args: VisionTrainingArguments) -> None:
    """Write this rank's position in the data into a checkpoint's folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.save({**_layout(args), "loader": loader.state_dict()}, _path(checkpoint, args.process_index))


def load_data_state(checkpoint: Path, stream: ExampleStream, args: VisionTrainingArguments) -> dict[str, Any] | None:
    """The state of this rank's loader in a checkpoint.

    None where the numbers of processes or workers differ and `approximate_resume` allows that: the stream then
    continues with the next epoch instead of the exact position.

    Raises:
        ValueError: The numbers differ and that is not allowed, or the checkpoint holds no position.
    """
    paths = sorted(checkpoint.glob(_path(checkpoint, "*").name))
    if not paths:
        raise ValueError(f"{checkpoint} holds no data position: it is not a checkpoint of a run on a stream.")
    own = _path(checkpoint, args.process_index)
    state = _load(own if own in paths else paths[0])
    changed = [f"{state[name]} {name} (now {now})" for name, now in _layout(args).items() if state[name] != now]
    if not changed:
        if own not in paths:
            raise ValueError(f"{own} is missing: this process cannot know which images it has seen.")
        return dict(state["loader"])
    if not args.approximate_resume:
        raise ValueError(
            f"{checkpoint} holds the data positions of {summarise(changed)}. Resume with the same numbers, or accept "
            "with --approximate_resume true that the remaining images of the epoch are skipped."
        )
    epoch = 1 + max(epoch for path in paths for epoch in _epochs(_load(path)))
    logger.warning(
        "%s holds the data positions of %s: the data continues at the start of epoch %d, not at its exact position.",
        checkpoint,
        summarise(changed),
        epoch,
    )
    stream.start_at_epoch(epoch)
    return None


def check_run_folder(args: VisionTrainingArguments) -> None:
    """Makes sure that the folder of a new run will hold its own checkpoints only.

    Raises:
        ValueError: if `output_dir` holds a run or a model that is not to be overwritten.
    """
    folder = Path(args.output_dir)
    found = [*_complete_checkpoints(folder), *filter(Path.exists, (folder / RUN_FILE, folder / CONFIG_NAME))]
    if found and not args.overwrite_output_dir:
        raise ValueError(
            f"{folder} holds a run already ({found[0].name}). Name another folder with --output_dir, resume that "
            "run with --resume_from_checkpoint last, or delete it with --overwrite_output_dir true."
        )


def clear_run_folder(folder: Path) -> None:
    """Deletes an earlier run's checkpoints and record, which would be taken for those of the new run."""
    for path in _checkpoints(folder):
        shutil.rmtree(path)
    (folder / RUN_FILE).unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def _complete_checkpoints(folder: Path) -> list[Path]:
    return [path for path in _checkpoints(folder) if _is_complete(path)]


def last_checkpoint(folder: str | Path) -> str:
    """The newest complete checkpoint of a run; ValueError where there is none."""
    complete = _complete_checkpoints(Path(folder))
    if not complete:
        raise ValueError(f"{folder} holds no complete checkpoint to resume from.")
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the file that the trainer writes last, after all ranks have written theirs, is there and complete."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _layout(args: VisionTrainingArguments) -> dict[str, int]:
    """What the positions depend on, by the names used in messages."""
    return {"processes": args.world_size, "data workers": args.dataloader_num_workers}


def _path(checkpoint: Path, rank: int | str) -> Path:
    return checkpoint / f"data_state_{rank}.pt"


def _load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def _epochs(state: Any) -> Iterator[int]:
    """Epochs of all streams within a loader's state, which holds one for each data worker."""
    if isinstance(state, dict):
        if "progress" in state and "layout" in state:
            yield int(state["progress"]["epoch"])
        else:
            for value in state.values():
                yield from _epochs(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _epochs(value)
