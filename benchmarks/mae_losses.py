"""What losses on reconstructed images do to MAE: its reconstructions, its encoder's accuracy, and the time of a step.

    python benchmarks/mae_losses.py [--data CIFAR10] [--seeds 1] [--num_images 16000] [--picture out.png] [--quick]

Variants, each trained by `hf-vlm pretrain` on the same number of images: plain MAE; with a perceptual loss by the
moving average of its own encoder, or by a frozen encoder of SimCLR; with an adversarial loss; with the latter two.
Targets are plain pixels, so that nothing of what is masked reaches the reconstruction. Evaluated on the same masked
patches of test images:

    knn       accuracy of frozen features, percent
    tuned     accuracy after a short fine-tuning on the labelled images, percent
    distance  to the original in the features of another SimCLR encoder, which no variant has seen: lower is better
    gradient  mean gradient within reconstructed patches / that of the original: below 1 is blurred, above 1 too rough;
              noise and grids have it too, so it means nothing without the distance and the picture
    psnr      decibels, reconstructed patches alone; the mean square error is what plain MAE minimises

`mean colour` fills in the mean of the visible pixels; `no pretraining` is the encoder as initialised. After a few
hundred steps a model reconstructs only low frequencies: small images and small batches are the cheapest way past that.
With `--output_dir` runs are kept, and finished ones are not run again. The last line of stdout is JSON: means over the
seeds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from mae_quality import features, finetune, load
from PIL import Image
from ssl_quality import recipe_of
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vlm import MAEForPreTraining, MAEImageLossesForPreTraining, VLMViTModel
from hf_vlm.features.device import use_fast_cpu_matmul
from hf_vlm.features.loading import quiet_transformers
from hf_vlm.metrics import knn_accuracy
from hf_vlm.models.ssl_perceptual import features_of_layers, perceptual_distance
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_model
from hf_vlm.training.callbacks import LogFile, read_log
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import pretrain, quiet_libraries
from hf_vlm.viz.sheets import titled_rows

FROZEN = {"perceptual_weight": 30.0, "perceptual_encoder": "frozen"}
ADVERSARIAL = {"adversarial_weight": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "perceptual": {"perceptual_weight": 1.0},
    "frozen": FROZEN,
    "adversarial": ADVERSARIAL,
    "both": {**FROZEN, **ADVERSARIAL},
}
ENCODERS = {"evaluation": 0, "frozen": 1}  # name to seed; SimCLR encoders trained before the variants
EVALUATION_LAYERS = (2, 3, 4, 6)
ENLARGED = 96  # side of an image in the picture, pixels
SIMCLR_BATCH_SIZE = 128  # contrastive learning needs many images


def recipe(variant: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a variant, or SimCLR's, with the settings of `ssl_quality.py`."""
    if variant == "simclr":
        return recipe_of(
            variant, seed, folder, argparse.Namespace(**{**vars(options), "batch_size": SIMCLR_BATCH_SIZE})
        )
    found, own = recipe_of("mae", seed, folder, options), dict(VARIANTS[variant])
    if name := own.get("perceptual_encoder"):
        own["perceptual_encoder"] = str(options.output_dir / name)
    method = "mae_image_losses" if own else "mae"
    return {**found, "method": method, "model_config": {**found["model_config"], "norm_pix_loss": False, **own}}


def step_times(options: argparse.Namespace, num_rounds: int = 8) -> dict[str, float]:
    """Median CPU time of a step relative to plain MAE's, variants alternating, on noise."""
    images, steps = torch.randn(options.batch_size, 3, options.image_size, options.image_size), {}
    for variant in dict.fromkeys(("plain", *options.variants)):
        args = parse_arguments(recipe(variant, 0, Path(), options))
        model = build_model(args, find_model(args.method)).train()
        use_fast_cpu_matmul(model)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[variant] = model, torch.optim.AdamW(learned, lr=1e-3, fused=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(num_rounds + 1), desc="Timing steps", leave=False):
        for variant, (model, optimizer) in steps.items():
            started = time.process_time()
            model(images).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step(0.5)
            seconds[variant].append(time.process_time() - started)
    medians = {}
    for variant, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values[1:], seconds["plain"][1:])]
        print(
            f"{variant:<12} {1000 * statistics.median(values[1:]):6.0f} ms per step, {statistics.median(ratios):.2f} "
            f"times plain ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
        medians[variant] = round(statistics.median(ratios), 2)
    return medians


def gradient(images: Tensor, masks: Tensor, patch: int) -> Tensor:
    """Mean absolute difference () of neighbouring pixels within one masked patch; images (n, 3, side, side)."""
    total, count = torch.zeros(()), torch.zeros(())
    for axis in (2, 3):
        length = images.shape[axis] - 1
        inside = (torch.arange(length) % patch != patch - 1).unflatten(0, (-1, 1) if axis == 2 else (1, -1))
        chosen = masks.narrow(axis, 0, length) & inside
        total += (images.diff(dim=axis).abs() * chosen).sum()
        count += 3 * chosen.sum()
    return total / count


def reconstruction_metrics(
    images: Tensor, originals: Tensor, masks: Tensor, evaluator: VLMViTModel, std: Tensor
) -> dict[str, float]:
    """Metrics of reconstructions; images (n, 3, side, side), normalised with standard deviations `std` (3, 1, 1)."""
    patch = evaluator.config.patch_size
    errors = ((images - originals) * std).square() * masks
    psnr = -10 * (errors.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))).log10()
    with torch.inference_mode():
        distance = perceptual_distance(
            features_of_layers(evaluator, images, EVALUATION_LAYERS),
            features_of_layers(evaluator, originals, EVALUATION_LAYERS),
        )
    return {
        "distance": distance.item(),
        "gradient": (gradient(images, masks, patch) / gradient(originals, masks, patch)).item(),
        "psnr": psnr.mean().item(),
    }


def picture(columns: dict[str, Tensor], mean: Tensor, std: Tensor) -> Image.Image:
    """One row per image: the enlarged images (n, 3, side, side) of all columns side by side."""
    shown = {}
    for name, images in columns.items():
        pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        shown[name] = [Image.fromarray(p).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST) for p in pixels]
    return titled_rows([[(name, shown[name][row]) for name in shown] for row in range(len(images))])


def encoder_accuracy(
    encoder: VLMViTModel, seed: int, data: dict[str, tuple[Tensor, Tensor]], num_steps: int
) -> dict[str, float]:
    """Accuracies in percent of an encoder; its weights are fine-tuned in place."""
    reference, test = ((features(encoder, images), labels) for images, labels in data.values())
    knn = knn_accuracy(*reference, *test)
    torch.manual_seed(seed)
    return {"knn": 100 * knn, "tuned": 100 * finetune(encoder, data, num_steps, "Fine-tuning")}


def run_seed(
    seed: int,
    folder: Path,
    evaluator: VLMViTModel,
    data: dict[str, tuple[Tensor, Tensor]],
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Trains all variants of one seed, renders their reconstructions, and returns their metrics."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    originals = (data["test"][0][: options.num_test].float() / 255 - mean) / std
    num_patches = (options.image_size // options.patch_size) ** 2
    noise = torch.rand(len(originals), num_patches, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    found = {"no pretraining": encoder_accuracy(VLMViTModel(evaluator.config), seed, data, options.num_steps)}
    columns: dict[str, Tensor] = {}
    for variant in options.variants:
        saved = folder / variant / "metrics.json"
        if not saved.is_file():
            pretrain(recipe(variant, seed, folder / variant, options))
        with quiet_transformers():
            model_class = MAEImageLossesForPreTraining if VARIANTS[variant] else MAEForPreTraining
            model = model_class.from_pretrained(folder / variant / "pretraining_model").eval()
        columns[variant], masks = model.reconstruct(originals, noise=noise)
        if not saved.is_file():
            metrics = reconstruction_metrics(columns[variant], originals, masks, evaluator, std)
            metrics |= encoder_accuracy(model.backbone, seed, data, options.num_steps)
            logged = [entry for entry in read_log(folder / variant / LogFile.name) if "loss_pixel" in entry][-1:]
            metrics |= {name: entry[name] for entry in logged for name in entry if name.startswith("loss_")}
            saved.write_text(json.dumps(metrics))
        found[variant] = json.loads(saved.read_text())
    visible_mean = (originals * ~masks).sum((2, 3), keepdim=True) / (~masks).sum((2, 3), keepdim=True)
    flat = torch.where(masks, visible_mean, originals)
    found["mean colour"] = reconstruction_metrics(flat, originals, masks, evaluator, std)
    for variant, metrics in found.items():
        print(f"seed {seed} {variant:<14} " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)
    if options.picture is not None and seed == 0:
        masked = torch.where(masks, -mean / std, originals)
        columns = {"original": originals, "seen": masked, **columns}
        picture({name: images[:8] for name, images in columns.items()}, mean, std).save(options.picture)
    return found


def main() -> None:
    """Prints the time of a step, one row per run, a table of means and standard deviations, and JSON."""
    parser = argparse.ArgumentParser(description="MAE with perceptual and adversarial losses.")
    parser.add_argument("--data", default="scenes:hard", help="labelled images with the splits train and test")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--num_images", type=int, default=16_000, help="images seen in pretraining")
    parser.add_argument("--num_labelled", type=int, default=4_000, help="labelled images for kNN and fine-tuning")
    parser.add_argument("--num_test", type=int, default=1_000, help="test images to reconstruct and classify")
    parser.add_argument("--num_steps", type=int, default=40, help="steps of fine-tuning")
    parser.add_argument("--image_size", type=int, default=24)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--picture", type=Path, help="where to save the reconstructions of the first seed")
    parser.add_argument("--output_dir", type=Path, help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    parser.set_defaults(encoder_preset="nano", num_workers=0)  # what `recipe_of` asks for besides
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.num_images, options.num_labelled, options.num_test = 1, 1_600, 500, 200
        options.num_steps = 5
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"no variants {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir = options.output_dir or Path(temporary)
        for name, seed in ENCODERS.items():
            if not (folder / name / "run.json").is_file():
                pretrain(recipe("simclr", seed, folder / name, options))
        costs = step_times(options)
        with quiet_transformers():
            evaluator = VLMViTModel.from_pretrained(folder / "evaluation").eval()
        sizes = {"labelled": ("train", options.num_labelled), "test": ("test", options.num_test)}
        data = {name: load(options.data, *which, options.image_size) for name, which in sizes.items()}
        runs = [run_seed(seed, folder / str(seed), evaluator, data, options) for seed in range(options.seeds)]
    means: dict[str, Any] = {}
    print("| variant | distance | gradient | PSNR | kNN | fine-tuned | step |\n|---|---:|---:|---:|---:|---:|---:|")
    names = list(dict.fromkeys(name for metrics in runs[0].values() for name in metrics))
    for variant in runs[0]:
        row = {name: [run[variant][name] for run in runs if name in run[variant]] for name in names}
        means[variant] = {name: round(statistics.mean(values), 4) for name, values in row.items() if values}
        cells = [
            f"{statistics.mean(row[name]):.{digits}f} ± {statistics.pstdev(row[name]):.{digits}f}" if row[name] else ""
            for name, digits in {"distance": 4, "gradient": 2, "psnr": 2, "knn": 1, "tuned": 1}.items()
        ]
        print(f"| {variant} | {' | '.join(cells)} | {costs.get(variant, '')} |")
    print(json.dumps({**means, "step": costs, "seeds": options.seeds, **({"quick": True} if options.quick else {})}))


if __name__ == "__main__":
    main()
