"""The data position in a checkpoint."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.io.messages import summarise
from hf_vlm.data.stream import ExampleStream
from hf_vlm.training.arguments import VisionTrainingArguments

__all__ = ["load_data_state", "save_data_state"]

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
