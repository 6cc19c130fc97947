"""What own pretraining is worth to each place of an image, and what heads make of it: segmenters on random and own
encoders.

    python benchmarks/segmentation.py --data camvid --classes sky,building,... --ignored 11 [--seeds 3] \\
        [--heads segmentation,mask_query_segmentation] [--train_encoder]

Per seed, by the commands that a user types: an encoder is pretrained on the training images without their masks (MAE,
the laptop recipe), and heads, by default a linear one, are trained on the frozen features of it and of one with random
weights, or together with them, with the same images in the same order. Metrics are of the test split, in percent, at
the size of the masks. The last line of stdout is JSON: means over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import datasets
from commands import hf_vlm

from hf_vlm.data.io.decode import decode_mask
from hf_vlm.data.sources import open_source
from hf_vlm.tasks.evaluation import evaluate_run

METRICS = ("miou", "mean_accuracy", "pixel_accuracy")
VARIANTS = ("random", "pretrained")
SPLITS = ("train", "validation", "test")


def with_255(ignored: int) -> Any:
    """A function that gives 255 to the pixels of a mask that are not to be counted."""

    def changed(example: dict[str, Any]) -> dict[str, Any]:
        values = decode_mask(example["mask"])
        values[values == ignored] = 255
        return {"mask": {"bytes": cv2.imencode(".png", values.astype("uint8"))[1].tobytes(), "path": None}}

    return changed


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """The data as Parquet, with names of the masks' values and 255 where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        source = open_source(options.data, split)
        table = datasets.Dataset.from_list(list(source), features=source.features).select_columns(["image", "mask"])
        table.map(with_255(options.ignored)).to_parquet(folder / f"{split}.parquet")
    (folder / "mask_classes.txt").write_text("\n".join(options.classes.split(",")))
    return folder


def pretrain(folder: Path, data: Path, seed: int, num_steps: int, options: argparse.Namespace) -> None:
    """An encoder that saw `num_steps` batches of images; of 1 step, whose rate is 0, it is that of the seed."""
    hf_vlm(
        *("pretrain", "mae/vit_nano_cpu.yaml", "--data", str(data), "--image_size", json.dumps(options.image_size)),
        *("--encoder_config.patch_size", str(options.patch_size), "--views.vertical_flip_probability", "0"),
        *("--max_steps", str(num_steps), "--probe_steps", "0", "--warmup_steps", "0.05" if num_steps > 1 else "1"),
        *("--seed", str(seed), "--output_dir", str(folder)),
    )


def finetune(
    folder: Path, head: str, encoder: Path, data: Path, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Metrics of a head, by the folder of its recipes, on an encoder."""
    hf_vlm(
        *("finetune", f"{head}/vit_nano_cpu.yaml", "--data", str(data), "--encoder", str(encoder)),
        *("--model_config.freeze_encoder", json.dumps(not options.train_encoder)),
        *("--image_size", json.dumps(options.image_size)),
        *("--max_steps", str(options.num_steps), "--learning_rate", str(options.learning_rate)),
        *("--num_eval_examples", "8", "--seed", str(seed), "--output_dir", str(folder)),
    )
    return evaluate_run(folder, str(data), "test").metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images with masks and the splits train, validation and test")
    parser.add_argument("--classes", required=True, help="names of the masks' values 0, 1, ..., with commas")
    parser.add_argument("--ignored", type=int, default=255, help="value of pixels that are not counted")
    parser.add_argument("--image_size", type=json.loads, default=[96, 128])
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--num_pretraining_steps", type=int, default=300, help="steps of 32 images")
    parser.add_argument("--num_steps", type=int, default=200, help="steps of 16 images with masks")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--heads", default="segmentation", help="folders of recipes, with commas")
    parser.add_argument("--train_encoder", action="store_true", help="fine-tunes the encoder as well")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, help="keeps the runs; a temporary folder by default")
    options = parser.parse_args()
    means: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or Path(temporary)
        data = prepare(folder / "data", options)
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for seed in range(options.seeds):
            for variant, num_steps in zip(VARIANTS, (1, options.num_pretraining_steps)):
                runs = folder / f"{variant}-{seed}"
                pretrain(runs / "encoder", data, seed, num_steps, options)
                for head in options.heads.split(","):
                    metrics = finetune(runs / head, head, runs / "encoder", data, seed, options)
                    found[f"{variant}_{head}"].append(metrics)
                    print(seed, variant, head, json.dumps({k: round(100 * v, 1) for k, v in metrics.items()}))
    for variant, runs_of_variant in found.items():
        for name in METRICS:
            means[f"{variant}_{name}"] = round(statistics.mean(100 * run[name] for run in runs_of_variant), 2)
    print(json.dumps(means | {"seeds": options.seeds}))


if __name__ == "__main__":
    main()
