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

__all__ = ["has_same_ranks", "load_data_state", "save_data_state"]

logger = logging.getLogger(__name__)


def save_data_state(checkpoint: Path, loader: StatefulDataLoader[Any], args: VisionTrainingArguments) -> None:
    """Write the position in the data of this rank, and of those with the same images, into a checkpoint's folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if args.process_index % args.tp_size == 0:
        state = {**_layout(args), "tp_size": args.tp_size, "loader": loader.state_dict()}
        torch.save(state, _path(checkpoint, args.data_rank))


def load_data_state(checkpoint: Path, stream: ExampleStream, args: VisionTrainingArguments) -> dict[str, Any] | None:
    """The state of this rank's loader in a checkpoint.

    None where the numbers of ranks with images of their own, or of workers, differ: the stream then continues where
    all of them had come to together, or, where that is not one position and `approximate_resume` allows it, with the
    next epoch.

    Raises:
        ValueError: There is no one position and that is not allowed, or the checkpoint holds none.
    """
    paths = sorted(checkpoint.glob(_path(checkpoint, "*").name))
    if not paths:
        raise ValueError(f"{checkpoint} holds no data position: it is not a checkpoint of a run on a stream.")
    own = _path(checkpoint, args.data_rank)
    state = _load(own if own in paths else paths[0])
    changed = [f"{state[name]} {name} (now {now})" for name, now in _layout(args).items() if state[name] != now]
    if not changed:
        if own not in paths:
            raise ValueError(f"{own} is missing: this process cannot know which images it has seen.")
        return dict(state["loader"])
    positions = [position for path in paths for position in _positions(_load(path))]
    is_complete = len(positions) == state["processes"] * max(state["data workers"], 1)
    if is_complete and stream.start_after(positions, num_workers=args.dataloader_num_workers):
        return None
    if not args.approximate_resume:
        raise ValueError(
            f"{checkpoint} holds the data positions of {summarise(changed)}, which are not one position for all: the "
            "shards are divided among them, bad images were skipped, or data workers are not equally far. Resume with "
            "the same numbers, or accept with --approximate_resume true that the remaining images of the epoch are "
            "skipped."
        )
    epoch = 1 + max(int(position["progress"]["epoch"]) for position in positions)
    logger.warning(
        "%s holds the data positions of %s: the data continues at the start of epoch %d, not at its exact position.",
        checkpoint,
        summarise(changed),
        epoch,
    )
    stream.start_at_epoch(epoch)
    return None


def has_same_ranks(checkpoint: Path, args: VisionTrainingArguments) -> bool:
    """Whether a checkpoint was saved by as many ranks in the same layout, so that each has its random state in it."""
    first = _path(checkpoint, 0)
    if not first.is_file():  # of a run on no stream
        return args.tp_size == 1
    state = _load(first)
    return (state["processes"] * state.get("tp_size", 1), state.get("tp_size", 1)) == (args.world_size, args.tp_size)


def _layout(args: VisionTrainingArguments) -> dict[str, int]:
    """What the positions depend on, by the names used in messages."""
    return {"processes": args.num_data_ranks, "data workers": args.dataloader_num_workers}


def _path(checkpoint: Path, rank: int | str) -> Path:
    return checkpoint / f"data_state_{rank}.pt"


def _load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def _positions(state: Any) -> Iterator[dict[str, Any]]:
    """States of all streams within a loader's state, which holds one for each data worker."""
    if isinstance(state, dict):
        if "progress" in state and "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _positions(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _positions(value)
