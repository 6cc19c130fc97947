"""What pretraining could give a detector with few labels, at most: random < pretrained < oracle.

    python benchmarks/ladder.py [--seeds 2] [--output_dir runs/ladder] [--quick]

The oracle is the demo's detector, trained on many labelled scenes. Its encoder, and then its encoder and head but for
the class layers, start the same fine-tuning on few labels as random weights and the demo's pretrained detector do.
Where the oracle gains little, the protocol keeps any pretraining from showing a gain; where it gains much, its
distance to what was pretrained is what pretraining has to close. With --output_dir finished runs are kept and not
run again. The last line of stdout is JSON.
"""

import argparse
import json
import re
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from commands import hf_vlm

DATA = "scenes:icons"
NUM_TEST = 500
# Rung of the ladder -> run that it starts from, and options of the fine-tuning.
RUNGS: dict[str, tuple[str | None, list[str]]] = {
    "random": (None, []),
    "pretrained encoder": ("pretrained", ["--load_head", "false"]),
    "pretrained encoder and head": ("pretrained", []),
    "oracle's encoder": ("oracle", ["--load_head", "false"]),
    "oracle's encoder, rate x 0.1": ("oracle", ["--load_head", "false", "--encoder_lr_multiplier", "0.1"]),
    "oracle's encoder and head": ("oracle", []),
}


def run(argv: list[str], folder: Path) -> None:
    """Runs a command of hf_vlm on one core, its output in a log beside the folder of the run, if it is not done."""
    if (folder / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        hf_vlm(*argv, "--output_dir", str(folder), "--overwrite_output_dir", "true", log=log)


def finetune_rung(name: str, seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """Test metrics of a rung of one seed."""
    from hf_vlm.tasks.evaluation import evaluate_run
    from hf_vlm.training.record import as_json

    source, own = RUNGS[name]
    # Shapes are those of the demo's detector, also where the encoder alone is taken from the oracle.
    start = [] if source is None else ["--encoder", str(folder / source)]
    output = folder / f"{re.sub('[^a-z0-9]+', '_', name)}-{seed}"
    finished = output / "test.json"
    if not finished.is_file():
        run(["finetune", "demo/detector.yaml", "--data", DATA, "--seed", str(seed), *options, *start, *own], output)
        finished.write_text(as_json(evaluate_run(output, DATA, "test", num_examples=NUM_TEST).metrics))
    return json.loads(finished.read_text())  # type: ignore[no-any-return]


def main() -> None:
    """Trains oracle and pretrained detector, then all rungs, and prints a table."""
    parser = argparse.ArgumentParser(description="random < pretrained < oracle, for a detector with few labels.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--output_dir", type=Path, help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    arguments = parser.parse_args()
    short = ["--max_steps", "10", "--eval_strategy", "no"] if arguments.quick else []
    many = ["--num_train_examples", "16000", *(short or ["--max_steps", "2500"])]
    pretrain = ["pretrain", "demo/pretrain.yaml", "--data", DATA, "--num_train_examples", "16000", *short[:2]]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.output_dir or Path(temporary)
        oracle = pool.submit(run, ["finetune", "demo/detector.yaml", "--data", DATA, *many], folder / "oracle")
        pool.submit(run, pretrain, folder / "pretrained").result()
        oracle.result()
        tasks = {
            name: [pool.submit(finetune_rung, name, seed, folder, short) for seed in range(arguments.seeds)]
            for name in RUNGS
        }
        found = {name: [task.result() for task in of_seeds] for name, of_seeds in tasks.items()}
    print("| what the run with few labels starts from | AP | AP50 |\n|---|---:|---:|")
    for name, metrics in found.items():
        columns = [", ".join(f"{m[key]:.3f}" for m in metrics) for key in ("ap", "ap50")]
        print(f"| {name} | {' | '.join(columns)} |")
    means = {name: round(statistics.mean(m["ap"] for m in metrics), 4) for name, metrics in found.items()}
    print(json.dumps({**means, "seeds": arguments.seeds}))


if __name__ == "__main__":
    main()
