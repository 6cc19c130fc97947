"""`hf-vlm demo`: from unlabelled images to a detector, and what the pretraining gained, on built-in images."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from hf_vlm.cli.options import Parser

VARIANTS = {"pretrained": "from the pretrained detector", "random": "from random initialisation"}
SCENES = "icons"
NUM_UNLABELLED = 8_000
NUM_RUNS = 3  # of fine-tuning, by seed
NUM_TEST = 500
METRICS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ar_100": "AR 100"}


def run(argv: Sequence[str]) -> None:
    """Runs the demo and prints its result."""
    parser = Parser(
        prog="hf-vlm demo",
        description="Pretrains a detector on unlabelled built-in images, fine-tunes it on few labelled ones, and "
        "compares it with one from random initialisation, in three runs of each. Offline; minutes on two CPU cores.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    results = run_demo(arguments.output_dir, seed=arguments.seed)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_report(arguments.output_dir, results)
    print(closing_message(arguments.output_dir, results))


def run_demo(
    folder: Path, *, seed: int = 0, num_runs: int = NUM_RUNS, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Pretrains one detector and fine-tunes both variants with the same budget, in subfolders of `folder`.

    It runs the commands that a user would. Runs of fine-tuning differ in their seed, which both variants of a run
    share: order, augmentation and new layers. `overrides` are recipe keys for all runs (a short test run). Returns
    the test metrics of each variant, one dict per run.

    Raises:
        ValueError: if one of the commands fails, which has printed the reason.
    """
    print(f"\n[1/3] Pretraining on {NUM_UNLABELLED:,} unlabelled images: no label is read", flush=True)
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    images, pretrained = folder / "unlabelled.parquet", folder / "pretrained"
    keys = {"overwrite_output_dir": "true", **(overrides or {})}
    options = [f"--{key}={value}" for key, value in keys.items()]

    synthesise_unlabelled(images, num_images=NUM_UNLABELLED)
    command = ["pretrain", "demo/pretrain.yaml", "--data", str(images), f"--seed={seed}", *options]
    _finish(_start([*command, "--output_dir", str(pretrained)]))

    print(f"\n[2/3] Fine-tuning on few labelled images, {num_runs} runs of each variant", flush=True)
    results: dict[str, Any] = {variant: [] for variant in VARIANTS}
    num_test = (overrides or {}).get("num_eval_examples", NUM_TEST)
    for index in range(num_runs):
        found = _finetune_both(folder, pretrained, index, [f"--seed={seed + index}", *options], num_test)
        for variant, metrics in found.items():
            results[variant].append(metrics)
    return results


def _finetune_both(
    folder: Path, pretrained: Path, index: int, options: list[str], num_test: int
) -> dict[str, dict[str, float]]:
    """Test metrics of both variants of a run, which are trained at the same time."""
    from hf_vlm.tasks.evaluation import evaluate_run

    folders = {variant: run_folder(folder, variant, index) for variant in VARIANTS}
    start = {"pretrained": ["--encoder", str(pretrained)], "random": []}
    with contextlib.ExitStack() as stack:
        processes = []
        for name, path in folders.items():
            is_shown = name == "pretrained" and index == 0  # one of all
            log = None if is_shown else stack.enter_context((folder / f"{name}-{index}.log").open("w"))
            argv = ["finetune", "demo/detector.yaml", *options, *start[name], "--output_dir", str(path)]
            processes.append(_start(argv, output=log))
        _finish(*processes)
    metrics = {
        name: evaluate_run(path, f"scenes:{SCENES}", "test", num_examples=num_test).metrics
        for name, path in folders.items()
    }
    shown = ", ".join(f"AP {metrics[name]['ap']:.3f} {where}" for name, where in VARIANTS.items())
    print(f"Run {index + 1}: {shown}, on scenes that neither has seen", flush=True)
    return metrics


def run_folder(folder: Path, variant: str, index: int) -> Path:
    """Folder of a run of fine-tuning."""
    return folder / f"detector_{variant}" / str(index)


def _start(argv: list[str], *, output: TextIO | None = None) -> subprocess.Popen[bytes]:
    """Starts a command of ours. On CPUs it has one core: at this size a second thread gains next to nothing."""
    import torch

    environment = os.environ if torch.accelerator.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_vlm.cli", *argv]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _finish(*processes: subprocess.Popen[bytes]) -> None:
    """Waits for all; if this is stopped, or one of them fails, none is left running."""
    try:
        for process in processes:
            if process.wait():
                raise ValueError("A step of the demo failed. The reason is printed above, or in a .log of its folder.")
    finally:
        for process in processes:
            process.terminate()


def synthesise_unlabelled(path: Path, *, num_images: int) -> None:
    """Synthesises the demo's unlabelled images once, into a file as a user would have, not again in every epoch."""
    from datasets import Dataset
    from tqdm.auto import tqdm

    from hf_vlm.data.scenes.stream import scenes_source

    path.parent.mkdir(parents=True, exist_ok=True)
    source = scenes_source(SCENES, "train", num_samples=num_images, masks=False).unlabelled()
    scenes = list(tqdm(source, desc="Synthesising scenes", total=num_images, disable=None))
    Dataset.from_list(scenes, features=source.features).to_parquet(path, batch_size=1000)


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, a table (`README.md`), `learning_curves.png` and `predictions.png`."""
    from hf_vlm.training.record import as_json

    (folder / "results.json").write_text(as_json(results) + "\n")
    num_runs = len(results["random"])
    print("\n[3/3] Drawing what was learned", flush=True)
    plot_curves(folder, num_runs)
    render_predictions(folder)
    (folder / "README.md").write_text(
        f"# What pretraining on unlabelled images gained\n\n{results_table(results)}\n\n{verdict(results)}\n\n"
        f"Held-out scenes; mean and standard deviation of {num_runs} runs; {results['seconds']:.0f} s in all. The "
        "models are in `detector_pretrained/` and `detector_random/`, what was pretrained without labels in "
        "`pretrained/`, and what it took for objects in `pretrained/pseudo_labels.png`.\n\n"
        "![Learning curves](learning_curves.png)\n\n![Predictions](predictions.png)\n"
    )


def results_table(results: dict[str, Any]) -> str:
    """A Markdown table of both variants: mean and standard deviation over the runs."""
    rows = ["| fine-tuned | " + " | ".join(METRICS.values()) + " |", "|---|" + "---:|" * len(METRICS)]
    for variant, where in VARIANTS.items():
        values = {name: [metrics[name] for metrics in results[variant]] for name in METRICS}
        rows.append(f"| {where} | " + " | ".join(_with_spread(values[name]) for name in METRICS) + " |")
    return "\n".join(rows)


def _with_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def gains(results: dict[str, Any]) -> list[float]:
    """AP that pretraining gained in each run, of two detectors with the same seed."""
    return [ours["ap"] - other["ap"] for ours, other in zip(results["pretrained"], results["random"], strict=True)]


def verdict(results: dict[str, Any]) -> str:
    """What the pretraining gained, in words."""
    found = gains(results)
    mean, random = statistics.mean(found), statistics.mean(metrics["ap"] for metrics in results["random"])
    each = ", ".join(f"{gain:+.3f}" for gain in found)
    if mean <= 0:
        return f"Pretraining did not help ({mean:+.3f} AP; by run {each})."
    share = f" ({mean / random:+.0%})" if random else ""
    return (
        f"Pretraining on unlabelled images gained {mean:+.3f} AP{share} with the same labels and the same number of "
        f"steps; by run {each}."
    )


def closing_message(folder: Path, results: dict[str, Any]) -> str:
    """The gain of pretraining, and the next commands."""
    return f"""
{results_table(results)}

{verdict(results)}
Look at {folder / "predictions.png"} and {folder / "learning_curves.png"}; took {results["seconds"]:.0f} s.

With your own images:
  hf-vlm pretrain region_detection/vit_nano_cpu.yaml --data YOUR_IMAGES
  hf-vlm finetune detection/vit_nano_cpu.yaml --data YOUR_LABELLED_IMAGES --encoder runs/pretrain
  hf-vlm predict runs/detector PHOTO.jpg --save out.png"""


def plot_curves(folder: Path, num_runs: int) -> None:
    """The loss of pretraining, and the validation AP of both variants: mean and range of the runs."""
    from hf_vlm.training.callbacks import LogFile, read_log
    from hf_vlm.viz.curves import Panel, Series, plot_panels, series

    curves: dict[str, Series] = {}
    bands = {}
    for variant, label in VARIANTS.items():
        logs = [read_log(run_folder(folder, variant, index) / LogFile.name) for index in range(num_runs)]
        steps, _ = series(logs[0], "eval_ap")
        of_steps = list(zip(*(series(log, "eval_ap")[1] for log in logs)))
        curves[label] = steps, [statistics.mean(values) for values in of_steps]
        bands[label] = [min(values) for values in of_steps], [max(values) for values in of_steps]
    loss = series(read_log(folder / "pretrained" / LogFile.name), "loss")
    plot_panels(
        folder / "learning_curves.png",
        [
            Panel(title="Pretraining, no labels", ylabel="loss", curves={"loss": loss}),
            Panel(
                title="Fine-tuning on few labels", ylabel="validation AP", ylim=(0, None), curves=curves, bands=bands
            ),
        ],
    )


def render_predictions(folder: Path, num_images: int = 10) -> None:
    """Predictions of both variants of the first run on test scenes, beside the ground truth."""
    import numpy as np
    from PIL import Image

    from hf_vlm.data.scenes.render import render_scene, scene_settings
    from hf_vlm.deploy.predict import Predictor
    from hf_vlm.viz.detections import render_detections
    from hf_vlm.viz.sheets import titled_rows

    predictors = {name: Predictor.from_pretrained(run_folder(folder, name, 0)) for name in VARIANTS}
    settings, pictures = scene_settings(SCENES), []
    for index in range(num_images):
        scene = render_scene(0, index, settings, split="test")
        for name, predictor in predictors.items():
            prediction = predictor.predict(Image.fromarray(scene.image), threshold=0.3)[0]
            pictures.append((name, prediction.draw(scene.image)))
        low, size = np.split(np.asarray(scene.boxes, dtype=np.float32).reshape(-1, 4), 2, axis=1)
        names = [settings.class_names[category] for category in scene.categories]
        truth = np.concatenate([low, low + size], axis=1)
        pictures.append(("ground truth", render_detections(scene.image, truth, names, class_ids=scene.categories)))
    titled_rows([pictures[first : first + 6] for first in range(0, len(pictures), 6)]).save(folder / "predictions.png")
