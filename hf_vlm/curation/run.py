"""Runs the stages of a curation: in processes of this machine, or on a cluster by `datatrove`."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_vlm.curation.stages import STAGES, Stage, steps_of
from hf_vlm.curation.work import WORK_FOLDER, Work

__all__ = ["datatrove_executors", "run_locally", "run_on_cluster"]


def run_locally(work: Work, *, num_workers: int = 1) -> None:
    """Do what is left of a curation, in this process or in several.

    Raises:
        ValueError: A unit failed; those that were done stay done.
    """
    if num_workers == 1:
        for stage in STAGES:
            for unit in _progress(stage, stage.unfinished(work)):
                stage.run(work, unit)
        return
    # Started afresh: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as pool:
        for index, stage in enumerate(STAGES):
            futures = [pool.submit(_run_unit, work, index, unit) for unit in stage.unfinished(work)]
            try:
                for future in _progress(stage, as_completed(futures), total=len(futures)):
                    future.result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"a worker was killed in the stage {stage.name!r}, as where memory is short: start the same "
                    "command again with fewer --num_workers, or give smaller shards"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)  # after the units that are being done
                raise


def _progress(stage: Stage, units: Any, total: int | None = None) -> Any:
    return tqdm(units, desc=f"{stage.name:<8}", total=total, unit=" parts", disable=None)


def _run_unit(work: Work, index: int, unit: int) -> None:
    STAGES[index].run(work, unit)


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed, so that nothing writes beside the one that continues.

    Where the parent is interrupted, it waits for the units that are being done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def datatrove_executors(work: Work, executor: str, *, num_tasks: int, options: dict[str, Any]) -> list[Any]:
    """Executors of `datatrove`, one for each stage, each after the one before: `run()` of the last starts all.

    Args:
        executor: `local`, `slurm` or `ray`.
        num_tasks: Number of tasks of each stage, which may be more than its units.
        options: Further arguments of the executor, such as time and partition of Slurm.

    Raises:
        ValueError: There is no such executor, datatrove is not installed, or it does not take the options.
    """
    try:
        from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise ValueError('clusters need datatrove: pip install "hf_vlm[curate]"') from error
    classes = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
    if executor not in classes:
        raise ValueError(f"there is no executor {executor!r}; there are {', '.join(classes)}")
    executors: list[Any] = []
    for step, stage in zip(steps_of(work), STAGES):
        logs = Path(work.folder, WORK_FOLDER, "logs", stage.name)
        more = {"job_name": f"curate_{stage.name}"} if executor == "slurm" else {}
        try:
            executors.append(
                classes[executor](
                    pipeline=[step],
                    tasks=num_tasks,
                    logging_dir=str(logs.resolve()),
                    skip_completed=False,  # what is done shows in the work folder, for any number of tasks
                    depends=executors[-1] if executors else None,
                    **more,
                    **options,
                )
            )
        except TypeError as error:
            raise ValueError(f"options of the executor {executor!r}: {error}") from error
    return executors


def run_on_cluster(work: Work, executor: str, *, num_tasks: int, options: dict[str, Any]) -> None:
    """Start what is left of a curation by `datatrove`; Slurm's jobs are then in its queue, and Ray's tasks done.

    Raises:
        ValueError: As `datatrove_executors`, or there is no such cluster here.
    """
    executors = datatrove_executors(work, executor, num_tasks=num_tasks, options=options)
    try:
        executors[-1].run()  # after those it depends on
    except (ImportError, FileNotFoundError) as error:  # without Ray, or the commands of Slurm
        raise ValueError(f"the executor {executor!r} cannot start from here: {error}") from error
