"""The training stream: block shuffle over an encoded source, decoding in the worker, an exact and small state.

One epoch of one consumer (a data worker of a rank; with no workers, the rank itself), in plain words:

    shards  = the source's shards, in an order sampled by (seed, epoch)
    if the shards divide by the number of consumers: keep every n-th shard, from my own index on
    for block, examples in enumerate(blocks of block_size examples of these shards):
        for index in permutation sampled by (seed, epoch, block):
            position = number of examples of this epoch that came before
            if the shards were not divided:
                keep every n-th example, from my own index on, counted from the beginning of the first epoch
            yield transform(examples[index], generator seeded by (seed, epoch, position))

So what an example becomes depends on its position alone: where shards are not divided, ranks 0 and 1 with batch B see
together exactly what one rank with batch 2B sees, and any number of ranks can continue where others stopped. Resuming
reads one block again, whatever the position.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import datasets
import fsspec.asyn
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.io.messages import shown_path

__all__ = ["ExampleStream", "Transform"]

logger = logging.getLogger(__name__)

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]

# The first entry of a generator's seed names what is sampled; seeds that only differ in trailing zeros would be equal.
SHARD_ORDER, BLOCK_ORDER, EXAMPLE = 1, 2, 3

# What a position depends on wherever it is resumed.
SHARED_LAYOUT = ("seed", "shuffle", "block_size", "num_shards")

MIN_SEEN = 100  # examples before the fraction of bad images is checked within an epoch
NUM_LOGGED = 10  # bad images that are named


@dataclass(frozen=True)
class Consumer:
    """One reader of the stream among all data workers of all ranks."""

    index: int
    count: int
    divides_shards: bool

    @property
    def shard_index(self) -> int:
        return self.index if self.divides_shards else 0

    @property
    def num_readers(self) -> int:
        """Number of consumers among which the shards are divided, rather than the examples."""
        return self.count if self.divides_shards else 1


@dataclass
class Progress:
    """The position of a consumer; every field is a JSON value."""

    epoch: int = 0
    first: int = 0  # examples read in earlier epochs
    position: int = 0  # examples read in this epoch
    block: int = 0
    offset: int = 0  # in the permuted block
    source: dict[str, Any] | None = None  # state of the source at the block's start; None at the epoch's start
    num_idle_epochs: int = 0  # that ended since an example was yielded
    num_seen: int = 0
    num_bad: int = 0
    bad_names: list[str] = field(default_factory=list)

    def start_epoch(self) -> None:
        self.epoch += 1
        self.first += self.position
        self.position = self.block = self.offset = 0
        self.source = None


class ExampleStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Examples of a source, shuffled, decoded and transformed, exactly resumable.

    For a `torchdata.stateful_dataloader.StatefulDataLoader` with any number of workers; `state_dict` is small and
    made of JSON values. Iterating again without `load_state_dict` starts from the beginning.

    Args:
        source: The examples, whose images are still encoded.
        transform: Decodes and transforms one example, with random numbers only from its generator. A `BadImageError`
            makes the example be counted, named in the log and skipped.
        seed: Seed of the order and of every transform.
        shuffle: Whether to shuffle; False keeps the order of the source.
        repeat: Whether to continue with the next epoch, forever; False ends after one, so that all consumers together
            see each example once.
        block_size: Number of encoded examples held in memory and permuted at a time, read before the first batch.
        rank: Rank of this process.
        world_size: Number of processes.
        max_bad_fraction: Fraction of undecodable images, among those this consumer saw, above which the stream stops.
            It is checked from 100 examples on, and at the end of each epoch.

    Raises:
        ValueError: for options out of range, when the source gives this consumer nothing, when too many images are
            bad, and for a state that was saved by a stream of other options.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        transform: Transform,
        *,
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = True,
        block_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if block_size < 1:
            raise ValueError(f"block_size must be 1 or more, got {block_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction must be between 0 and 1, got {max_bad_fraction}")
        self.source = source
        self.transform = transform
        self.seed = seed
        self.shuffle = shuffle
        self.repeat = repeat
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.max_bad_fraction = max_bad_fraction
        self._start = Progress()
        self._progress = Progress()
        self._loaded_layout: dict[str, Any] | None = None

    def start_at_epoch(self, epoch: int) -> None:
        """Make iterations that resume no state begin with a later epoch: other orders and views than before."""
        self._start = Progress(epoch=epoch)

    def start_after(self, states: Sequence[dict[str, Any]], *, num_workers: int) -> bool:
        """Make iterations that resume no state begin where all consumers of another number had come to, together.

        Args:
            states: What `state_dict` gave for each of them, at the end of the same step.
            num_workers: Data workers of each rank here.

        Returns:
            False, and nothing is changed, where they had not come to one position: where shards are divided among
            them, or would be here, some have skipped bad images, or data workers are not equally far.
        """
        own, count = self._layout(self._consumer()), len(states)
        is_same = all(state["layout"][key] == own[key] for state in states for key in SHARED_LAYOUT)
        is_complete = all(state["layout"]["num_consumers"] == count for state in states)
        divides = self._divides_shards(count) or self._divides_shards(self.world_size * max(num_workers, 1))
        ends = {state["progress"]["first"] + state["progress"]["position"]: state["progress"] for state in states}
        last = max(ends)
        if not is_same or not is_complete or divides or set(ends) != set(range(last - count + 1, last + 1)):
            return False
        self._start = Progress(**ends[last])
        return True

    def state_dict(self) -> dict[str, Any]:
        """The position after the example yielded last, as JSON values."""
        return {"layout": self._layout(self._consumer()), "progress": dataclasses.asdict(self._progress)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue after the example that `state` was saved at."""
        progress = Progress(**state["progress"])
        self._progress = dataclasses.replace(progress, bad_names=list(progress.bad_names))
        self._loaded_layout = dict(state["layout"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not a generator itself: the state must be right before the first example is asked for.
        if torch.utils.data.get_worker_info() is not None:
            cv2.setNumThreads(0)  # the workers are the parallelism
            fsspec.asyn.reset_lock()  # a lock inherited from the parent process hangs remote reads
        consumer = self._consumer()
        if self._loaded_layout is None:
            self._progress = dataclasses.replace(self._start, bad_names=list(self._start.bad_names))
        else:
            self._check_layout(self._loaded_layout, consumer)
            self._loaded_layout = None
        return self._iterate(consumer, self._progress)

    def _iterate(self, consumer: Consumer, progress: Progress) -> Iterator[dict[str, Any]]:
        while True:
            yield from self._epoch(consumer, progress)
            self._check_epoch(consumer, progress)
            if not self.repeat:
                return
            progress.start_epoch()

    def _epoch(self, consumer: Consumer, progress: Progress) -> Iterator[dict[str, Any]]:
        for block in self._blocks(consumer, progress):
            order = self._order(len(block), consumer, progress)
            while progress.offset < len(block):
                index, position = order[progress.offset], progress.position
                progress.offset += 1
                progress.position += 1
                if consumer.divides_shards:  # equal positions of different shards get different random numbers
                    position = position * consumer.count + consumer.index
                elif (progress.first + position) % consumer.count != consumer.index:
                    continue
                example = self._transformed(block[index], position, progress)
                if example is not None:
                    progress.num_idle_epochs = 0
                    yield example
            progress.block += 1
            progress.offset = 0

    def _blocks(self, consumer: Consumer, progress: Progress) -> Iterator[list[dict[str, Any]]]:
        """The rest of the epoch in blocks, beginning with the one that `progress` is in."""
        # A new dataset each time: the state that a dataset was once given stays in it, and its epoch is memory shared
        # between workers.
        stream = split_dataset_by_node(self.source, rank=consumer.shard_index, world_size=consumer.num_readers)
        if self.shuffle:
            # An epoch other than 0 shuffles the shards and nothing else, and unlike `shuffle` needs no buffer.
            generator = np.random.default_rng((SHARD_ORDER, self.seed, progress.epoch))
            stream.set_epoch(int(generator.integers(1, 2**31)))
        if progress.source is not None:
            stream.load_state_dict(progress.source)
        # `iter`, as `__iter__` would divide the shards among the data workers by itself.
        for columns in stream.iter(batch_size=self.block_size):
            yield [dict(zip(columns, values)) for values in zip(*columns.values())]
            progress.source = stream.state_dict()

    def _order(self, num_examples: int, consumer: Consumer, progress: Progress) -> list[int]:
        if not self.shuffle:
            return list(range(num_examples))
        key = (BLOCK_ORDER, self.seed, progress.epoch, progress.block, consumer.shard_index)
        return np.random.default_rng(key).permutation(num_examples).tolist()  # type: ignore[no-any-return]

    def _transformed(self, example: dict[str, Any], position: int, progress: Progress) -> dict[str, Any] | None:
        progress.num_seen += 1
        try:
            return self.transform(example, np.random.default_rng((EXAMPLE, self.seed, progress.epoch, position)))
        except BadImageError as error:
            self._count_bad(example, error, progress)
            return None

    def _count_bad(self, example: dict[str, Any], error: BadImageError, progress: Progress) -> None:
        progress.num_bad += 1
        if len(progress.bad_names) < NUM_LOGGED:
            name = _name(example)
            progress.bad_names.append(name)
            logger.warning("Skipping the image %s: %s", name, error)
        if progress.num_seen >= MIN_SEEN:
            self._check_bad_fraction(progress)

    def _check_bad_fraction(self, progress: Progress) -> None:
        if progress.num_bad > self.max_bad_fraction * progress.num_seen:
            raise ValueError(
                f"{progress.num_bad} of {progress.num_seen} images could not be decoded, among them "
                f"{', '.join(progress.bad_names)}. Fix or remove them, or raise --max_bad_fraction "
                f"(now {self.max_bad_fraction})."
            )

    def _check_epoch(self, consumer: Consumer, progress: Progress) -> None:
        """Refuse to continue with a source that gives nothing."""
        self._check_bad_fraction(progress)
        if progress.position == 0 and not consumer.divides_shards:
            raise ValueError("The source gives no example. Check its path, its split and its filters.")
        progress.num_idle_epochs += 1
        # A source with fewer examples than consumers gives each its turn within as many epochs.
        if progress.num_idle_epochs > (1 if consumer.divides_shards else consumer.count) and self.repeat:
            raise ValueError(
                f"The source gives nothing to consumer {consumer.index} of {consumer.count} (ranks times data "
                "workers): its shards are empty or none of their images can be decoded. Fix the data, or use fewer "
                "data workers or ranks."
            )

    def _consumer(self) -> Consumer:
        worker = torch.utils.data.get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        count = self.world_size * num_workers
        return Consumer(worker_index * self.world_size + self.rank, count, self._divides_shards(count))

    def _divides_shards(self, num_consumers: int) -> bool:
        divides = num_consumers > 1 and self.source.num_shards % num_consumers == 0
        return divides and not _has_fixed_order(self.source)

    def _layout(self, consumer: Consumer) -> dict[str, Any]:
        """What a state depends on and a stream that resumes it must share."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "block_size": self.block_size,
            "num_shards": self.source.num_shards,
            "consumer": consumer.index,
            "num_consumers": consumer.count,
        }

    def _check_layout(self, saved: dict[str, Any], consumer: Consumer) -> None:
        layout = self._layout(consumer)
        changed = [
            f"{name} {saved.get(name)} (now {value})" for name, value in layout.items() if saved.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"The data state to resume from was saved with {', '.join(changed)}. Resume with the same data, seed, "
                "block size and number of ranks and data workers, or start the data from the beginning."
            )


def _name(example: dict[str, Any]) -> str:
    image = example.get("image")
    path = image.get("path") if isinstance(image, dict) else None
    return shown_path(path) if path else f"image_id {example.get('image_id')}"


def _has_fixed_order(source: datasets.IterableDataset) -> bool:
    """Whether `take` or `skip` made the source, whose result would change with the division of its shards."""

    def contains(state: object) -> bool:
        if isinstance(state, dict):
            return state.get("type") in ("TakeExamplesIterable", "SkipExamplesIterable") or any(
                contains(value) for value in state.values()
            )
        return isinstance(state, list) and any(contains(value) for value in state)

    return contains(source.state_dict())
