"""The arms of `label_efficiency.py`: the commands that each runs, one after the other, and what they leave."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from label_efficiency_data import DETECTION, LABELS, DataSet, as_words, labelled_folder, prepare

__all__ = ["ARMS", "Lab", "Run", "arms_of"]

BENCHMARKS = Path(__file__).parent
HF_VLM = ("-m", "hf_vlm.cli")
DISTILLED = "distill/vit_nano_cpu.yaml"

Record = dict[str, Any]


class Run(NamedTuple):
    """One point of a curve, written as set/labels/arm/seed."""

    data: str
    labels: str
    arm: str
    seed: int

    @classmethod
    def parse(cls, text: str, sets: Mapping[str, DataSet]) -> "Run":
        """The run of a name; ValueError where there is none of it."""
        try:
            data, labels, arm, seed = text.split("/")
            run = cls(data, labels, arm, int(seed))
        except ValueError:
            raise ValueError(f"{text!r} is no run: give set/labels/arm/seed, as bccd/50/pretrained/0.") from None
        for value, known in ((data, sets), (labels, LABELS), (arm, ARMS)):
            if value not in known:
                raise ValueError(f"{text!r}: there is no {value!r}, but {', '.join(known)}.")
        return run

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True)
class Lab:
    """Runs commands on one core each, each once: finished ones are read from their folder.

    Args:
        folder: Folder of all runs.
        sets: Sets by name.
        data_dir: Folder of the sets of files.
        teacher: Frozen encoder of the arm `distilled`.
        keys: Keys of all recipes, after those of sets and arms: none, or a length for a check that all runs.
        shares_pretraining: Whether the seeds of a set start from the same pretrained weights.
    """

    folder: Path
    sets: Mapping[str, DataSet]
    data_dir: Path | None = None
    teacher: Path | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    shares_pretraining: bool = False
    locks: dict[str, threading.Lock] = field(default_factory=dict)

    def lock(self, name: str) -> threading.Lock:
        return self.locks.setdefault(name, threading.Lock())

    def run_folder(self, run: Run) -> Path:
        return self.folder / run.data / run.labels / f"{run.arm}-{run.seed}"

    def execute(self, folder: Path, words: Sequence[str]) -> Record:
        """The record of a command, which is run if its folder has none of a finished run.

        Raises:
            RuntimeError: The command failed; its output is in the log that the message names.
        """
        path, log = folder / "run.json", folder.with_name(f"{folder.name}.log")
        with self.lock(str(folder)):
            if not (path.is_file() and json.loads(path.read_text()).get("finished")):
                folder.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, *words, "--output_dir", str(folder)]
                command += ["--overwrite_output_dir", "true"]
                with log.open("w") as output:
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    status = subprocess.call(command, env=environment, stdout=output, stderr=output)
                if status:
                    raise RuntimeError(f"{' '.join(words[:4])} ... ended with status {status}: see {log}")
            return json.loads(path.read_text())  # type: ignore[no-any-return]

    def data(self, run: Run) -> tuple[Path, Path]:
        """The folders of the labelled and of the unlabelled images."""
        folder = self.folder / "data" / run.data
        with self.lock(str(folder)):
            prepare(self.sets[run.data], folder, self.data_dir)
            return labelled_folder(self.sets[run.data], folder, run.labels, run.seed), folder / "unlabelled"

    def num_labelled(self, run: Run) -> int:
        return pq.read_metadata(self.data(run)[0] / "train.parquet").num_rows  # type: ignore[no-any-return]

    def pretrain(self, run: Run, name: str, recipe: str, keys: dict[str, Any]) -> tuple[Path, Record]:
        """A pretraining that the arms and the numbers of labels of a set share, and the seeds where they are to."""
        seed = 0 if self.shares_pretraining else run.seed
        folder = self.folder / run.data / f"{name}-{seed}"
        shared = {"data": self.data(run)[1], "seed": seed, "probe_steps": 0, **self.sets[run.data].encoder}
        return folder, self.execute(folder, [*HF_VLM, "pretrain", recipe, *as_words(shared | keys | self.keys)])

    def pretrain_own(self, run: Run) -> tuple[Path, Record]:
        """An encoder, or where objects are found a detector of one class, pretrained without labels."""
        data = self.sets[run.data]
        keys = data.pretraining | (data.head if data.task.pretrains_head else {})
        folder, record = self.pretrain(run, "own", data.task.pretraining, keys)
        rounds = [json.loads(path.read_text()) for path in folder.glob("round-*/run.json")]
        seconds = sum(each["seconds"] + each.get("labelling_seconds", 0.0) for each in (record, *rounds))
        return folder, record | {"seconds": seconds}

    def finetune(self, run: Run, *, by: Sequence[str] = (*HF_VLM, "finetune"), **keys: Any) -> Record:
        """A model of the labelled images, by the same words for all arms but what these add."""
        data = self.sets[run.data]
        shared = {"data": self.data(run)[0], "eval_split": "test", "save_strategy": "no", "seed": run.seed}
        keys = shared | data.encoder | data.head | data.training | keys | self.keys
        return self.execute(self.run_folder(run), [*by, data.task.recipe, *as_words(keys)])


def random(lab: Lab, run: Run) -> list[Record]:
    return [lab.finetune(run)]


def pretrained(lab: Lab, run: Run) -> list[Record]:
    encoder, record = lab.pretrain_own(run)
    return [record, lab.finetune(run, encoder=encoder)]


def task_distilled(lab: Lab, run: Run) -> list[Record]:
    teacher = run._replace(arm="pretrained")
    records = pretrained(lab, teacher)
    keys = {"unlabelled_data": lab.data(run)[1], "labels_from": lab.run_folder(teacher)}
    return [*records, lab.finetune(run, encoder=lab.pretrain_own(run)[0], **keys)]


def distilled(lab: Lab, run: Run) -> list[Record]:
    encoder, record = lab.pretrain(run, "distilled", DISTILLED, {"model_config.teacher": lab.teacher})
    return [record, lab.finetune(run, encoder=encoder)]


def prototypes(lab: Lab, run: Run) -> list[Record]:
    objects, record = lab.pretrain_own(run)
    return [record, lab.finetune(run, by=[str(BENCHMARKS / "prototypes.py")], encoder=objects)]


def transformers(lab: Lab, run: Run) -> list[Record]:
    return [lab.finetune(run, by=[str(BENCHMARKS / "transformers_detector.py")])]


# Each returns the records of what it ran, last that of the model that is tested.
ARMS: dict[str, Callable[[Lab, Run], list[Record]]] = {
    arm.__name__: arm for arm in (random, pretrained, transformers, distilled, task_distilled, prototypes)
}


def arms_of(data: DataSet) -> list[str]:
    """The arms that there are for the task of a set: some are of detectors alone."""
    of_detectors = (transformers, task_distilled, prototypes) if data.task is not DETECTION else ()
    return [name for name, arm in ARMS.items() if arm not in of_detectors]
