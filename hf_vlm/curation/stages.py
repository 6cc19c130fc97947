"""The stages of a curation in their order, each a function of a work folder and a unit, such as a shard.

A unit writes one file, whole or not at all, and is done where that is there. So any number of processes, on any number
of machines that share the folder, may take units of a stage, and a curation that was killed continues.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_vlm.curation.clusters import assign_shard, find_clusters
from hf_vlm.curation.duplicates import find_exact, find_near, num_exact_units, num_near_units
from hf_vlm.curation.measure import measure_shard
from hf_vlm.curation.report import report_path, write_report
from hf_vlm.curation.selection import balance, decide_shard
from hf_vlm.curation.work import Work
from hf_vlm.curation.writing import num_written, shard_path, write_shard

__all__ = ["STAGES", "Stage", "Step", "steps_of"]


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: Its name.
        num_units: Number of its units, known once the stages before are done.
        run: Does a unit.
        path: The file that a unit writes; None for a table of the work folder.
    """

    name: str
    num_units: Callable[[Work], int]
    run: Callable[[Work, int], None]
    path: Callable[[Work, int], Path] | None = None

    def unfinished(self, work: Work) -> list[int]:
        """Units that are still to be done."""
        units = range(self.num_units(work))
        if self.path is not None:
            return [unit for unit in units if not self.path(work, unit).exists()]
        return [unit for unit in units if not work.path(self.name, unit).exists()]


def _num_shards(work: Work) -> int:
    return work.num_shards


def _one(work: Work) -> int:
    return 1


STAGES = (
    Stage("measure", _num_shards, measure_shard),
    Stage("exact", num_exact_units, find_exact),
    Stage("cluster", _one, find_clusters),
    Stage("assign", _num_shards, assign_shard),
    Stage("near", num_near_units, find_near),
    Stage("decide", _num_shards, decide_shard),
    Stage("balance", _one, balance),
    Stage("write", num_written, write_shard, shard_path),
    Stage("report", _one, write_report, report_path),
)


@dataclass(frozen=True)
class Step:
    """A stage of a curation as a step of a `datatrove` pipeline, which takes any callable with these arguments.

    Attributes:
        work: The curation.
        index: Position of the stage in `STAGES`.
    """

    work: Work
    index: int

    def __call__(self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Does every `world_size`-th unit from `rank` on, of those that are not done.

        Raises:
            ValueError: The stage before has not ended.
        """
        if self.index and (unfinished := STAGES[self.index - 1].unfinished(self.work)):
            name = STAGES[self.index - 1].name
            raise ValueError(f"{len(unfinished)} units of the stage {name!r} are not done: run it again")
        stage = STAGES[self.index]
        for unit in stage.unfinished(self.work):
            if unit % world_size == rank:
                stage.run(self.work, unit)

    def __repr__(self) -> str:
        return f"hf-vlm curate: {STAGES[self.index].name}"


def steps_of(work: Work) -> list[Step]:
    """The stages of a curation as steps, each to be run to its end before the next."""
    return [Step(work, index) for index in range(len(STAGES))]
