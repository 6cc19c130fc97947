"""What own pretraining is worth to a classifier: kNN, linear, attentive and fine-tuned accuracy, from random and own
encoders.

    python benchmarks/classification.py --data grocery_store --image_size 48 --num_pretraining_steps 500 [--seeds 3]

Per seed, by the commands that a user types: an encoder is pretrained on the images without their labels (LeJEPA, the
laptop recipe); it and one with random weights are evaluated frozen, by classifiers on their features and by one query
that attends to all their tokens, and fine-tuned, the last two on the same labels in the same order for the same number
of steps. Accuracies are of the test split, in percent. With `--output_dir` finished runs are kept and not run again.
The last line of stdout is JSON: means over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from commands import hf_vlm

from hf_vlm.tasks.evaluation import evaluate_run

FROZEN = ("knn", "linear", "knn_both", "linear_both")  # of the mean patch token, and of it beside the class token
FINE_TUNED = ("top1", "balanced_accuracy")
ATTENTIVE = ("--model_config.pooling", "attentive", "--encoder_lr_multiplier", "0")  # the encoder stays as it is
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


def finetune(folder: Path, encoder: Path, seed: int, options: argparse.Namespace, *words: str) -> dict[str, float]:
    """Metrics of a classifier on the test split; `words` are added to the command."""
    architecture = json.dumps({"patch_size": 8})
    hf_vlm(
        *("finetune", "classification/vit_nano_cpu.yaml", "--data", options.data, "--encoder", str(encoder)),
        *("--encoder_config", architecture, "--image_size", str(options.image_size), "--eval_split", "test"),
        *("--num_train_examples", str(options.num_labelled), "--num_eval_examples", "200", "--seed", str(seed)),
        *("--per_device_train_batch_size", "64", "--max_steps", str(options.num_steps)),
        *("--output_dir", str(folder), *words),
    )
    return evaluate_run(folder, options.data, "test").metrics


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
            frozen = evaluate_run(encoder, options.data, "test", num_examples=options.num_labelled).metrics
            attentive = finetune(folder / variant / "attentive", encoder, seed, options, *ATTENTIVE)
            tuned = finetune(folder / variant / "classifier", encoder, seed, options)
            metrics = {name: frozen[name] for name in FROZEN} | {"attentive": attentive["top1"]}
            metrics |= {name: tuned[name] for name in FINE_TUNED}
            saved.write_text(json.dumps(metrics))
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
