"""What pretraining gains for a detector with few labels: the demo's recipes over several seeds.

    python benchmarks/pretraining_gain.py [--seeds 5] [--quick]

Each seed pretrains a detector on unlabelled scenes, then fine-tunes it on few labelled ones, and another one from
random initialisation with the same budget, and evaluates both on held-out scenes. Gain and standard error are those of
the differences of AP within a seed. The last line of stdout is JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hf_vlm.cli.demo import VARIANTS, gains, run_demo
from hf_vlm.training.record import as_json

QUICK = {"max_steps": 20, "eval_steps": 20, "num_eval_examples": 50}


def test_metrics(folder: Path, seed: int, overrides: dict[str, int] | None) -> dict[str, Any]:
    """Test metrics of both variants for one seed, read from its folder if that run is finished."""
    finished = folder / "results.json"
    if not finished.is_file():
        results = run_demo(folder, seed=seed, num_runs=1, overrides=overrides)
        finished.write_text(as_json(results))
    return json.loads(finished.read_text())  # type: ignore[no-any-return]


def main() -> None:
    """Runs the seeds one after the other and prints means, standard deviations and the gain."""
    parser = argparse.ArgumentParser(description="Detection AP of a pretrained detector and one from random weights.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute: not a result to quote")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="where runs are kept; a finished seed is not run again")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output_dir or Path(temporary)
        runs = [test_metrics(folder / str(seed), seed, QUICK if arguments.quick else None) for seed in seeds]
    summary: dict[str, float] = {}
    for variant in VARIANTS:
        for name in ("ap", "ap50"):
            values = [run[variant][0][name] for run in runs]
            summary[f"{variant}_{name}"] = round(statistics.mean(values), 4)
            shown = [round(value, 3) for value in values]
            print(f"{variant:<11} {name:<5} {statistics.mean(values):.3f} +- {_deviation(values):.3f}  ", shown)
    found = [gains(run)[0] for run in runs]
    least = min(gain / run["random"][0]["ap"] if run["random"][0]["ap"] else 0.0 for gain, run in zip(found, runs))
    print(f"gain of AP by seed: {', '.join(f'{gain:+.3f}' for gain in found)}; at least {least:+.0%} of random's AP")
    summary["gain"] = round(statistics.mean(found), 4)
    summary["standard_error"] = round(_deviation(found) / math.sqrt(len(found)), 4)
    print(json.dumps(summary | {"seeds": len(runs)}))


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
