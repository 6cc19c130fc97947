"""What own pretraining is worth to a classifier: accuracies of random and own encoders, by all protocols of `probe`.

    python benchmarks/classification.py --data grocery_store --image_size 48 --num_pretraining_steps 500 [--seeds 3]

Per seed, by the commands that a user types: an encoder is pretrained on the images without their labels (LeJEPA, the
laptop recipe); it and one with random weights are evaluated by kNN and a linear classifier on frozen features, a query
that attends to all frozen tokens, updates of low rank and all weights trained, with the same labels, in the same order
and for the same number of steps where they are trained. Accuracies are of the test split, in percent. With
`--output_dir` finished variants are kept and not run again. The last line of stdout is JSON: means over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from commands import hf_vlm

VARIANTS = ("random", "pretrained")


def pretrain(folder: Path, seed: int, options: argparse.Namespace) -> None:
    local = {"num_views": 4, "size": options.image_size // 2, "crop_scale": [0.1, 0.4]}
    hf_vlm(
        *("pretrain", "lejepa/vit_nano_cpu.yaml", "--data", options.data, "--image_size", str(options.image_size)),
        *("--views.local", json.dumps(local), "--per_device_train_batch_size", "64", "--probe_steps", "0"),
        *("--max_steps", str(options.num_pretraining_steps), "--seed", str(seed), "--output_dir", str(folder)),
    )


def save_random_encoder(like: Path, folder: Path, seed: int) -> None:
    """An encoder with the architecture and the image processor of another, and random weights."""
    from transformers import set_seed

    from hf_vlm import VLMViTConfig, VLMViTImageProcessor, VLMViTModel

    set_seed(seed)
    VLMViTModel(VLMViTConfig.from_pretrained(like)).save_pretrained(folder)
    VLMViTImageProcessor.from_pretrained(like).save_pretrained(folder)


def probe(folder: Path, encoder: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies of an encoder by protocol, from the last line that the command prints."""
    with (folder / "probe.log").open("w+") as log:
        hf_vlm(
            *("probe", "classification/vit_nano_cpu.yaml", "--data", options.data, "--encoder", str(encoder)),
            *("--encoder_config", json.dumps({"patch_size": 8}), "--image_size", str(options.image_size)),
            *("--eval_split", "test", "--num_train_examples", str(options.num_labelled), "--seed", str(seed)),
            *("--per_device_train_batch_size", "64", "--max_steps", str(options.num_steps)),
            *("--output_dir", str(folder / "probe"), "--overwrite_output_dir", "true"),
            log=log,
        )
        log.seek(0)
        accuracies = json.loads(log.read().splitlines()[-1])
    return {name: value for name, (value,) in accuracies.items()}


def run_seed(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Accuracies of both variants for a seed, read from its folder where it is finished."""
    encoders = {variant: folder / variant / "encoder" for variant in VARIANTS}
    if not (encoders["pretrained"] / "run.json").is_file():
        pretrain(encoders["pretrained"], seed, options)
    found: dict[str, dict[str, float]] = {}
    for variant, encoder in encoders.items():
        saved = folder / variant / "metrics.json"
        if not saved.is_file():
            if variant == "random":
                save_random_encoder(encoders["pretrained"], encoder, seed)
            saved.write_text(json.dumps(probe(folder / variant, encoder, seed, options)))
        found[variant] = json.loads(saved.read_text())
        print(f"seed {seed} {variant:<10}  " + "  ".join(f"{k} {100 * v:.1f}" for k, v in found[variant].items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:easy", help="images with class labels and the splits train and test")
    parser.add_argument("--image_size", type=int, default=48)
    parser.add_argument("--num_pretraining_steps", type=int, default=500, help="steps of 64 images")
    parser.add_argument("--num_steps", type=int, default=600, help="steps of fine-tuning, 64 images each")
    parser.add_argument("--num_labelled", type=int, default=5000, help="images with labels, for all classifiers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="keeps the runs; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="a check of minutes that everything runs; means nothing")
    options = parser.parse_args()
    if options.quick:
        options.num_pretraining_steps = options.num_steps = 10
        options.num_labelled, options.seeds = 200, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or Path(temporary)
        runs = [run_seed(folder / str(seed), seed, options) for seed in range(options.seeds)]
    means: dict[str, float] = {}
    for variant in VARIANTS:
        values = defaultdict(list)
        for run in runs:
            for name, value in run[variant].items():
                values[name].append(100 * value)
        for name, found in values.items():
            means[f"{variant}_{name}"] = round(statistics.mean(found), 2)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"{variant:<10} {name:<18} {statistics.mean(found):5.1f} ± {spread:.1f}")
    print(json.dumps(means | {"seeds": len(runs)} | ({"quick": True} if options.quick else {})))


if __name__ == "__main__":
    main()
