"""`hf-vlm demo`: from unlabelled images to a detector, and what the pretraining gained, on built-in images."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

VARIANTS = ("pretrained", "random")
NUM_UNLABELLED = 16_000


def run(argv: Sequence[str]) -> None:
    """Runs the demo and prints its result."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm demo",
        description="Pretrains on unlabelled built-in images, fine-tunes a detector on few labelled ones from the "
        "pretrained encoder and from random initialisation, and compares them. Offline; minutes on two CPU cores.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    results = run_demo(arguments.output_dir, seed=arguments.seed)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_report(arguments.output_dir, results)
    print(closing_message(arguments.output_dir, results))


def run_demo(folder: Path, *, seed: int = 0, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Pretrains one encoder and fine-tunes both variants with the same budget, in subfolders of `folder`.

    It runs the commands that a user would, both fine-tunings at the same time. `overrides` are recipe keys for all
    three runs (a short test run). Returns the test metrics of each variant.

    Raises:
        ValueError: if one of the commands fails, which has printed the reason.
    """
    from hf_vlm.tasks.evaluation import evaluate_run
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    images, encoder = folder / "unlabelled.parquet", folder / "encoder"
    keys = {"seed": seed, "overwrite_output_dir": "true", **(overrides or {})}
    options = [f"--{key}={value}" for key, value in keys.items()]

    print(f"\n[1/3] Pretraining on {NUM_UNLABELLED:,} unlabelled images: no label is read", flush=True)
    synthesise_unlabelled(images, num_images=NUM_UNLABELLED)
    _finish(_start(["pretrain", "demo/pretrain.yaml", "--data", str(images), "--output_dir", str(encoder), *options]))

    print(
        "\n[2/3] Fine-tuning a detector on few labelled images, from the encoder and from random weights", flush=True
    )
    command = ["finetune", "demo/detector.yaml", *options, "--output_dir"]
    pretrained = [*command, str(folder / "detector_pretrained"), "--encoder", str(encoder)]
    with (folder / "detector_random.log").open("w") as log:
        finetunings = [_start([*command, str(folder / "detector_random")], output=log), _start(pretrained)]
        _finish(*reversed(finetunings))

    print("\n[3/3] Evaluating both on scenes that neither has seen", flush=True)
    num_test = (overrides or {}).get("num_eval_examples", 500)
    return {
        variant: evaluate_run(folder / f"detector_{variant}", "scenes:easy", "test", num_examples=num_test).metrics
        for variant in VARIANTS
    }


def _start(argv: list[str], *, output: TextIO | None = None) -> subprocess.Popen[bytes]:
    """Starts a command of ours. On CPUs it has one core: at this size a second thread gains next to nothing."""
    environment = os.environ if torch.accelerator.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_vlm.cli", *argv]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _finish(*processes: subprocess.Popen[bytes]) -> None:
    """Waits for all; if this is stopped, or one of them fails, none is left running."""
    try:
        for process in processes:
            if process.wait():
                raise ValueError(
                    "A step of the demo failed. The reason is printed above, or in detector_random.log of its folder."
                )
    finally:
        for process in processes:
            process.terminate()


def synthesise_unlabelled(path: Path, *, num_images: int) -> None:
    """Synthesises the demo's unlabelled images once, into a file as a user would have, not again in every epoch."""
    from datasets import Dataset
    from tqdm.auto import tqdm

    from hf_vlm.data.scenes.stream import scenes_source

    path.parent.mkdir(parents=True, exist_ok=True)
    source = scenes_source("easy", "train", num_samples=num_images, masks=False).unlabelled()
    scenes = list(tqdm(source, desc="Synthesising scenes", total=num_images, disable=None))
    Dataset.from_list(scenes, features=source.features).to_parquet(path, batch_size=1000)


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, a table (`README.md`), `learning_curves.png` and `predictions.png`."""
    from hf_vlm.training.record import as_json

    (folder / "results.json").write_text(as_json(results) + "\n")
    plot_curves(folder)
    render_predictions(folder)
    table = results_table(results)
    (folder / "README.md").write_text(
        f"# What pretraining on unlabelled images gained\n\n{table}\n\nHeld-out scenes, {results['seconds']:.0f} s in "
        "all. The models are in `detector_pretrained/` and `detector_random/`, the encoder in `encoder/`.\n\n"
        "![Learning curves](learning_curves.png)\n\n![Predictions](predictions.png)\n"
    )


def results_table(results: dict[str, Any]) -> str:
    """A Markdown table of both variants."""
    names = ("ap", "ap50", "ap75", "ar_100")
    rows = ["| encoder | " + " | ".join(name.upper() for name in names) + " |", "|---|" + "---:|" * len(names)]
    rows += [
        f"| {variant} | " + " | ".join(f"{results[variant][name]:.3f}" for name in names) + " |"
        for variant in VARIANTS
    ]
    return "\n".join(rows)


def closing_message(folder: Path, results: dict[str, Any]) -> str:
    """The gain of pretraining, and the next commands."""
    gain = results["pretrained"]["ap"] - results["random"]["ap"]
    verdict = (
        f"Pretraining on unlabelled images gained {gain:+.3f} AP with the same labels and the same number of steps."
        if gain > 0
        else f"Pretraining did not help in this run ({gain:+.3f} AP)."
    )
    return f"""
{results_table(results)}

{verdict}
Look at {folder / "predictions.png"} and {folder / "learning_curves.png"}; took {results["seconds"]:.0f} s.

With your own images:
  hf-vlm pretrain mae/vit_small.yaml --data YOUR_IMAGES
  hf-vlm finetune detection/vit_small.yaml --data YOUR_LABELLED_IMAGES --encoder runs/pretrain
  hf-vlm predict runs/detector PHOTO.jpg --save out.png"""


def plot_curves(folder: Path) -> None:
    """The loss of pretraining, and the validation AP50 of both variants over the steps."""
    from hf_vlm.training.callbacks import LogFile, read_log
    from hf_vlm.viz.curves import Panel, plot_panels, series

    loss = series(read_log(folder / "encoder" / LogFile.name), "loss")
    labels = {"pretrained": "from pretrained encoder", "random": "from random initialisation"}
    ap50 = {
        labels[name]: series(read_log(folder / f"detector_{name}" / LogFile.name), "eval_ap50") for name in VARIANTS
    }
    plot_panels(
        folder / "learning_curves.png",
        [
            Panel(title="Pretraining, no labels", ylabel="loss", curves={"loss": loss}),
            Panel(title="Fine-tuning on few labels", ylabel="validation AP50", ylim=(0, 1), curves=ap50),
        ],
    )


def render_predictions(folder: Path, num_images: int = 8) -> None:
    """Predictions of the pretrained detector on test scenes, beside the ground truth."""
    import numpy as np
    from PIL import Image

    from hf_vlm.data.scenes.render import render_scene, scene_settings
    from hf_vlm.deploy.predict import Predictor
    from hf_vlm.viz.detections import render_detections
    from hf_vlm.viz.sheets import contact_sheet, side_by_side

    predictor = Predictor.from_pretrained(folder / "detector_pretrained")
    pictures = []
    for index in range(num_images):
        scene = render_scene(0, index, scene_settings("easy"), split="test")
        prediction = predictor.predict(Image.fromarray(scene.image), threshold=0.3)[0]
        low, size = np.split(np.asarray(scene.boxes, dtype=np.float32).reshape(-1, 4), 2, axis=1)
        names = [str(category) for category in scene.categories]
        truth = render_detections(
            scene.image, np.concatenate([low, low + size], axis=1), names, class_ids=scene.categories
        )
        pictures.append(side_by_side(prediction.draw(scene.image), truth))
    contact_sheet(pictures, columns=2).save(folder / "predictions.png")
