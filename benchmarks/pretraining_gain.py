"""What pretraining gains for a detector with few labels: the demo's recipes over several seeds.

    python benchmarks/pretraining_gain.py [--seeds 3] [--quick]

Each seed pretrains an encoder on unlabelled scenes, then fine-tunes a detector on few labelled ones from it and from
random initialisation with the same budget, and evaluates both on held-out scenes. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from hf_vlm.cli.demo import VARIANTS, run_demo
from hf_vlm.training.record import as_json

QUICK = {"max_steps": 20, "eval_steps": 20, "num_eval_examples": 50}


def test_metrics(folder: Path, seed: int, overrides: dict[str, int] | None) -> dict[str, dict[str, float]]:
    """Test metrics of both variants for one seed, read from its folder if that run is finished."""
    finished = folder / "results.json"
    if not finished.is_file():
        results = run_demo(folder, seed=seed, overrides=overrides)
        finished.write_text(as_json(results))
    return json.loads(finished.read_text())


def main() -> None:
    """Runs the seeds one after the other and prints means and standard deviations."""
    parser = argparse.ArgumentParser(description="Detection AP from a pretrained and from a random encoder.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute: not a result to quote")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="where runs are kept; a finished seed is not run again")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output_dir or Path(temporary)
        runs = [test_metrics(folder / str(seed), seed, QUICK if arguments.quick else None) for seed in seeds]
    metrics = {}
    for variant in VARIANTS:
        for name in ("ap", "ap50"):
            values = [run[variant][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            metrics[f"{variant}_{name}"] = round(statistics.mean(values), 4)
            print(
                f"{variant:<11} {name:<5} {statistics.mean(values):.3f} +- {spread:.3f}  ",
                [round(v, 3) for v in values],
            )
    print(json.dumps(metrics | {"seeds": len(runs)}))


if __name__ == "__main__":
    main()
