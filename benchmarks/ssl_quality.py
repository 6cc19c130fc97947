"""Which method learns the best features: frozen kNN and linear accuracy after the same number of images seen.

    python benchmarks/ssl_quality.py --data CIFAR10 [--seeds 3] [--num_images 100000] [--methods simclr,mae] [--jobs 2]

Every method trains the same encoder by `hf-vlm pretrain` with its own settings below, at the same batch size and
number of images; methods with more views do more work per image, so the seconds are reported too. Distillation learns
from the encoder of `--teacher`, such as `teachers.py` makes, or without it from a SimCLR encoder of a separate run,
whose seconds are not counted. Baselines: the same encoder untrained, the pixels themselves, and the given teacher,
frozen. With `--output_dir` runs are kept, and finished ones are not run again. The last line of stdout is JSON: means
over the seeds, accuracies in percent.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ssl_peers import PEERS, missing_packages
from ssl_peers import pretrain as pretrain_peer
from tqdm.auto import tqdm

# Method: how it differs from `SHARED`. Sizes of heads and decoders follow the encoder's; rates are those of the
# recipes, scaled to the batch. Views as in the methods' papers, without blur at 32 pixels.
COLOR = {
    "jitter": [0.4, 0.4, 0.2, 0.1],
    "jitter_probability": 0.8,
    "grayscale_probability": 0.2,
    "flip_probability": 0.5,
    "blur_probability": 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {
        "model_config": {"projection_hidden_size": 512, "projection_size": 128, "temperature": 0.2},
        "views": {**COLOR, "crop_scale": [0.2, 1.0]},
    },
    "moco_v3": {
        "model_config": {
            "projection_hidden_size": 512,
            "projection_size": 128,
            "predictor_norm": False,  # this and the next as in the peer; official ones: RESULTS.md
            "freeze_patch_projection": False,
        },
        "views": {**COLOR, "crop_scale": [0.2, 1.0], "views": [{}, {"solarize_probability": 0.2}]},
        "weight_decay": 0.1,
    },
    "mae": {
        "model_config": {
            "mask_ratio": 0.75,
            "decoder_config": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3},
        },
    },
    "lejepa": {
        "model_config": {
            "projection_hidden_size": 512,
            "projection_size": 32,
            "num_slices": 256,
            "sigreg_weight": 0.02,
            "join_views": True,  # as in stable-pretraining; the paper's, each view by itself: RESULTS.md
        },
        "views": {
            **COLOR,
            "solarize_probability": 0.0,
            "crop_scale": [0.3, 1.0],
            "local": {"num_views": 4, "crop_scale": [0.1, 0.4]},
        },
    },
    "dinov2": {
        "model_config": {
            "num_prototypes": 256,
            "head_hidden_size": 512,
            "bottleneck_size": 32,  # in 128 no feature is close to a prototype, and the teacher stays uniform
            "momentum": 0.98,
            "teacher_temperature": 0.04,
        },
        "views": {
            **COLOR,
            "crop_scale": [0.4, 1.0],
            "views": [{}, {"solarize_probability": 0.2}],
            "local": {"num_views": 4, "crop_scale": [0.1, 0.4]},
        },
        "max_grad_norm": 3.0,
    },
    "simmim": {
        "views": {"crop_scale": [0.67, 1.0]},
    },
    "ijepa": {
        "encoder_config": {"use_class_token": False},
        "model_config": {
            "momentum": 0.99,
            "predictor_config": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
        },
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
    },
    "distill": {"learning_rate": 3e-3},
}
SHARED: dict[str, Any] = {
    "encoder_config": {"position_embedding_type": "sincos"},
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.95,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 50,
    "save_strategy": "no",
    "overwrite_output_dir": True,  # of an interrupted run
    "probe_steps": 0,  # peers have none, and their seconds are compared
    "report_to": "none",
}
ACCURACIES = {  # of the mean patch token, of the class token, and of both concatenated
    "knn": "kNN, mean",
    "linear": "linear, mean",
    "knn_class": "kNN, class",
    "linear_class": "linear, class",
    "knn_both": "kNN, both",
    "linear_both": "linear, both",
}


def own_settings(row: str, image_size: int, patch_size: int) -> dict[str, Any]:
    """A method's settings, with its sizes in pixels: small views of half the image, mask blocks of two patches."""
    own = copy.deepcopy(METHODS.get(row, {}))
    if local := own.get("views", {}).get("local"):
        local["size"] = image_size // 2 // patch_size * patch_size
    if row == "simmim":
        own["model_config"] = {"mask_patch_size": 2 * patch_size}
    return own


def recipe_of(method: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a run: the method's own settings over the shared ones; a peer has those of our row."""
    row = PEERS[method].row if method in PEERS else method
    own = own_settings(row, options.image_size, options.patch_size)
    return {
        **SHARED,
        "method": row if row in METHODS else "simclr",
        "data": options.data,
        "output_dir": str(folder),
        "encoder_preset": options.encoder_preset,
        "image_size": options.image_size,
        "dataloader_num_workers": options.num_workers,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": max(1, options.num_images // options.batch_size),
        "seed": seed,
        **own,
        "encoder_config": {
            **SHARED["encoder_config"],
            "patch_size": options.patch_size,
            **own.get("encoder_config", {}),
        },
    }


def run_one(method: str, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """Trains and evaluates one encoder in this process, and writes `metrics.json`."""
    from hf_vlm import VLMViTModel
    from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
    from hf_vlm.tasks.evaluation import evaluate_run
    from hf_vlm.training import run
    from hf_vlm.training.build import build_encoder_config, build_processor
    from hf_vlm.training.recipe import check_recipe, parse_arguments

    torch.set_num_threads(1)
    recipe = check_recipe(recipe_of(method, seed, folder, options), "ssl_quality.py")
    seconds = 0.0
    if method == "distill":
        if not options.teacher:
            run.pretrain(check_recipe(recipe_of("simclr", seed, folder / "teacher", options), "ssl_quality.py"))
        recipe["model_config"] = {"teacher": options.teacher or str(folder / "teacher")}
    if method in METHODS:
        seconds = run.pretrain(recipe)["seconds"]
    elif method in PEERS:
        seconds = pretrain_peer(method, recipe)
    elif method == "random_init":
        torch.manual_seed(seed)
        args = parse_arguments(recipe)
        VLMViTModel(build_encoder_config(args)).save_pretrained(folder)
        build_processor(args, VLMViTImageProcessor, 3).save_pretrained(folder)
    if method == "pixels":
        metrics = accuracy_of(options, 16, ([0.5], [0.25]), lambda images: images.flatten(1))
    elif method == "teacher":
        metrics = accuracy_of_teacher(options)
    else:
        metrics = evaluate_run(folder, options.data, "test", num_examples=options.num_labelled).metrics
    (folder / "metrics.json").write_text(json.dumps({**metrics, "seconds": seconds}))


def accuracy_of_teacher(options: argparse.Namespace) -> dict[str, float]:
    """kNN and linear accuracy of the frozen teacher's feature of an image, which is what the student learns."""
    from hf_vlm.models.ssl_frozen import frozen_features, load_encoder, patch_size_of, read_encoder, read_statistics

    config, revision = read_encoder(options.teacher)
    teacher, patch_hw = load_encoder(options.teacher, config, revision, torch.float32), patch_size_of(config)
    with torch.inference_mode():
        return accuracy_of(
            options,
            options.image_size,
            read_statistics(options.teacher, revision),
            lambda images: torch.cat([frozen_features(teacher, part, patch_hw)[1] for part in images.split(64)]),
        )


def accuracy_of(
    options: argparse.Namespace,
    size: int,
    statistics_of_images: tuple[list[float], list[float]],
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """kNN and linear accuracy of what `encode` makes of images of a size, normalised by mean and deviation."""
    from hf_vlm.data.sources import open_source
    from hf_vlm.data.stream import ExampleStream
    from hf_vlm.data.transforms.views import EvalTransform
    from hf_vlm.features.accuracy import classify

    mean, std = statistics_of_images
    transform = EvalTransform(size, image_mean=mean, image_std=std)
    data: list[torch.Tensor] = []
    for split in ("train", "test"):
        source = open_source(options.data, split, num_samples=options.num_labelled)
        examples = list(ExampleStream(source.dataset, transform, shuffle=False, repeat=False))
        data += [
            encode(torch.stack([example["pixel_values"] for example in examples])),
            torch.tensor([example["label"] for example in examples]),
        ]
    return classify(*data)


def jobs_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int, Path]]:
    """All runs, one seed after the other, so that the first seed is complete first."""
    once = ("pixels", "teacher") if options.teacher else ("pixels",)  # they depend on no seed
    for seed in range(options.seeds):
        for method in ("random_init", *(once if seed == 0 else ()), *options.methods):
            yield method, seed, folder / f"{method}_{seed}"


def start(method: str, seed: int, folder: Path, argv: list[str]) -> None:
    """Starts one run in a process of its own, unless it is finished; if it fails, the error names its log."""
    if (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *argv, "--one", method, str(seed), str(folder)]
    with (folder / "output.txt").open("w") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
            raise SystemExit(f"{method}, seed {seed} failed: see {folder / 'output.txt'}")


def table(jobs: list[tuple[str, int, Path]]) -> dict[str, dict[str, float]]:
    """Prints means and standard deviations, best kNN first, and returns the means."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, _, folder in jobs:
        metrics = json.loads((folder / "metrics.json").read_text())
        for name, value in metrics.items():
            found[method][name].append(value if name == "seconds" else 100 * value)
    print("| method | " + " | ".join(ACCURACIES.values()) + " | seconds |\n|---" + "|---:" * 7 + "|")
    for method, row in sorted(found.items(), key=lambda item: -statistics.mean(item[1]["knn"])):
        cells = [f"{statistics.mean(v):.1f} ± {statistics.pstdev(v):.1f}" if (v := row[n]) else "" for n in ACCURACIES]
        print(f"| {method} | {' | '.join(cells)} | {statistics.mean(row['seconds']):.0f} |")
    return {
        name: {method: round(statistics.mean(row[name]), 1) for method, row in found.items() if row[name]}
        for name in ACCURACIES
    }


def choose(methods: list[str] | None) -> list[str]:
    """The requested methods, or all of ours and the installed peers.

    Raises:
        ValueError: for an unknown name, or a requested peer that is not installed.
    """
    if unknown := set(methods or []) - {*METHODS, *PEERS}:
        raise ValueError(
            f"no settings for {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}, and the peers "
            f"{', '.join(PEERS)}"
        )
    chosen = []
    for name in methods or [*METHODS, *PEERS]:
        missing = missing_packages(name) if name in PEERS else ""
        if not missing:
            chosen.append(name)
        elif methods:
            raise ValueError(f"{name} needs: pip install {missing}")
        else:
            print(f"{name} is skipped; for it: pip install {missing}", file=sys.stderr)
    return chosen


def main() -> None:
    """Runs what is not finished, prints the table and JSON."""
    parser = argparse.ArgumentParser(description="Frozen accuracy of each method's encoder.")
    parser.add_argument("--data", required=True, help="images with class labels and the splits train and test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), help="methods of ours and of peers, separated by commas"
    )
    parser.add_argument("--teacher", help="folder or Hub id of the encoder that distillation learns from")
    parser.add_argument("--num_images", type=int, default=100_000, help="images seen in pretraining")
    parser.add_argument("--num_labelled", type=int, default=5_000, help="images per split for the accuracies")
    parser.add_argument("--encoder_preset", default="nano", help="size of the encoder; tiny or small on a GPU")
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that read images, for ours only; for a GPU"
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core per run")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.num_images, options.num_labelled = 1, 1_000, 500
    if options.one:
        run_one(options.one[0], int(options.one[1]), Path(options.one[2]), options)
        return
    try:
        options.methods = choose(options.methods)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        jobs = list(jobs_of(options, options.output_dir or Path(temporary)))
        list(tqdm(pool.map(lambda job: start(*job, sys.argv[1:]), jobs), total=len(jobs), desc="Runs"))
        means = table(jobs)
    print(json.dumps({**means, "seeds": options.seeds, **({"quick": True} if options.quick else {})}))


if __name__ == "__main__":
    main()
