"""What losses of the painted image do to MAE: what it paints, what its encoder is worth, and the time of a step.

    python benchmarks/mae_losses.py [--data CIFAR10] [--seeds 1] [--num_images 16000] [--picture out.png] [--quick]

Arms, each trained by `hf-vlm pretrain` on the same number of images: plain MAE; with a perceptual loss by the moving
average of its own encoder, or by a frozen encoder of SimCLR; with an adversarial one; with the latter two.
Targets are plain pixels, so that nothing of what is hidden reaches the painted image. Judged on the same hidden
patches of test images:

    knn       accuracy of frozen features, percent
    tuned     accuracy after a short fine-tuning on the labelled images, percent
    distance  to the original in the features of another encoder of SimCLR, which no arm has seen: lower is better
    gradient  mean gradient within painted patches / that of the original: below 1 is blurred, above 1 too rough; noise
              and grids have it too, so that it says nothing without the distance and the picture
    psnr      decibels, painted patches alone; the mean square error is what plain MAE minimises

`mean colour` paints the mean of the visible pixels; `no pretraining` is the encoder as drawn. A model of a few hundred
steps paints low frequencies: small images and small batches are the cheapest way there. With `--output_dir` runs are
kept, and those that are finished are not run again. The last line of stdout is JSON: means over the seeds.
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
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "perceptual": {"perceptual_weight": 1.0},
    "frozen": FROZEN,
    "adversarial": ADVERSARIAL,
    "both": {**FROZEN, **ADVERSARIAL},
}
ENCODERS = {"judge": 0, "frozen": 1}  # trained before the arms, each from a seed of its own
JUDGE_LAYERS = (2, 3, 4, 6)
ENLARGED = 96  # pixels of a side in the picture
JUDGE_BATCH = 128  # contrasts need many images


def recipe(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of an arm, or of SimCLR, as the comparison of methods has it."""
    if arm == "simclr":
        return recipe_of(arm, seed, folder, argparse.Namespace(**{**vars(options), "batch_size": JUDGE_BATCH}))
    found, own = recipe_of("mae", seed, folder, options), dict(ARMS[arm])
    if name := own.get("perceptual_encoder"):
        own["perceptual_encoder"] = str(options.output_dir / name)
    method = "mae_image_losses" if own else "mae"
    return {**found, "method": method, "model_config": {**found["model_config"], "norm_pix_loss": False, **own}}


def step_times(options: argparse.Namespace, num_rounds: int = 8) -> dict[str, float]:
    """Median CPU time of a step over that of plain MAE, arms taking turns, on noise."""
    images, steps = torch.randn(options.batch_size, 3, options.image_size, options.image_size), {}
    for arm in dict.fromkeys(("plain", *options.arms)):
        args = parse_arguments(recipe(arm, 0, Path(), options))
        model = build_model(args, find_model(args.method)).train()
        use_fast_cpu_matmul(model)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[arm] = model, torch.optim.AdamW(learned, lr=1e-3, fused=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(num_rounds + 1), desc="Timing steps", leave=False):
        for arm, (model, optimizer) in steps.items():
            started = time.process_time()
            model(images).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step(0.5)
            seconds[arm].append(time.process_time() - started)
    medians = {}
    for arm, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values[1:], seconds["plain"][1:])]
        print(
            f"{arm:<12} {1000 * statistics.median(values[1:]):6.0f} ms a step, {statistics.median(ratios):.2f} of "
            f"plain ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
        medians[arm] = round(statistics.median(ratios), 2)
    return medians


def gradient(images: Tensor, masks: Tensor, patch: int) -> Tensor:
    """Mean absolute difference () of neighbours within one masked patch; images (n, 3, side, side)."""
    total, count = torch.zeros(()), torch.zeros(())
    for axis in (2, 3):
        length = images.shape[axis] - 1
        inside = (torch.arange(length) % patch != patch - 1).unflatten(0, (-1, 1) if axis == 2 else (1, -1))
        chosen = masks.narrow(axis, 0, length) & inside
        total += (images.diff(dim=axis).abs() * chosen).sum()
        count += 3 * chosen.sum()
    return total / count


def figures_of(painted: Tensor, originals: Tensor, masks: Tensor, judge: VLMViTModel, std: Tensor) -> dict[str, float]:
    """Figures of painted images, all (n, 3, side, side), normalised with the deviations `std` (3, 1, 1)."""
    patch = judge.config.patch_size
    errors = ((painted - originals) * std).square() * masks
    psnr = -10 * (errors.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))).log10()
    with torch.inference_mode():
        distance = perceptual_distance(
            features_of_layers(judge, painted, JUDGE_LAYERS), features_of_layers(judge, originals, JUDGE_LAYERS)
        )
    return {
        "distance": distance.item(),
        "gradient": (gradient(painted, masks, patch) / gradient(originals, masks, patch)).item(),
        "psnr": psnr.mean().item(),
    }


def picture(columns: dict[str, Tensor], mean: Tensor, std: Tensor) -> Image.Image:
    """Images (n, 3, side, side) of each column side by side, enlarged."""
    shown = {}
    for name, images in columns.items():
        pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        shown[name] = [Image.fromarray(p).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST) for p in pixels]
    return titled_rows([[(name, shown[name][row]) for name in shown] for row in range(len(images))])


def worth(encoder: VLMViTModel, seed: int, data: dict[str, tuple[Tensor, Tensor]], num_steps: int) -> dict[str, float]:
    """Accuracies in percent of an encoder, which is fine-tuned."""
    known, asked = ((features(encoder, images), labels) for images, labels in data.values())
    knn = knn_accuracy(*known, *asked)
    torch.manual_seed(seed)
    return {"knn": 100 * knn, "tuned": 100 * finetune(encoder, data, num_steps, "Fine-tuning")}


def run_seed(
    seed: int, folder: Path, judge: VLMViTModel, data: dict[str, tuple[Tensor, Tensor]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Trains all arms of a seed, draws them, and returns their figures."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    originals = (data["test"][0][: options.num_judged].float() / 255 - mean) / std
    num_patches = (options.image_size // options.patch_size) ** 2
    noise = torch.rand(len(originals), num_patches, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    found = {"no pretraining": worth(VLMViTModel(judge.config), seed, data, options.num_steps)}
    columns: dict[str, Tensor] = {}
    for arm in options.arms:
        kept = folder / arm / "figures.json"
        if not kept.is_file():
            pretrain(recipe(arm, seed, folder / arm, options))
        with quiet_transformers():
            model_class = MAEImageLossesForPreTraining if ARMS[arm] else MAEForPreTraining
            model = model_class.from_pretrained(folder / arm / "pretraining_model").eval()
        columns[arm], masks = model.reconstruct(originals, noise=noise)
        if not kept.is_file():
            figures = figures_of(columns[arm], originals, masks, judge, std)
            figures |= worth(model.backbone, seed, data, options.num_steps)
            logged = [entry for entry in read_log(folder / arm / LogFile.name) if "loss_pixel" in entry][-1:]
            figures |= {name: entry[name] for entry in logged for name in entry if name.startswith("loss_")}
            kept.write_text(json.dumps(figures))
        found[arm] = json.loads(kept.read_text())
    visible_mean = (originals * ~masks).sum((2, 3), keepdim=True) / (~masks).sum((2, 3), keepdim=True)
    flat = torch.where(masks, visible_mean, originals)
    found["mean colour"] = figures_of(flat, originals, masks, judge, std)
    for arm, figures in found.items():
        print(f"seed {seed} {arm:<14} " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
    if options.picture is not None and seed == 0:
        masked = torch.where(masks, -mean / std, originals)
        columns = {"original": originals, "seen": masked, **columns}
        picture({name: images[:8] for name, images in columns.items()}, mean, std).save(options.picture)
    return found


def main() -> None:
    """Prints the cost of a step, a row a run, a table of means and spreads, and JSON."""
    parser = argparse.ArgumentParser(description="MAE with perceptual and adversarial losses.")
    parser.add_argument("--data", default="scenes:hard", help="labelled images with the splits train and test")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--num_images", type=int, default=16_000, help="seen in pretraining")
    parser.add_argument("--num_labelled", type=int, default=4_000, help="for kNN and fine-tuning")
    parser.add_argument("--num_judged", type=int, default=1_000, help="test images that are painted and classified")
    parser.add_argument("--num_steps", type=int, default=40, help="of fine-tuning")
    parser.add_argument("--image_size", type=int, default=24)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--picture", type=Path, help="where to draw what the arms of the first seed paint")
    parser.add_argument("--output_dir", type=Path, help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="hardly trained: no figure to quote")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.num_images, options.num_labelled, options.num_judged = 1, 1_600, 500, 200
        options.num_steps = 5
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"there are no arms {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir = options.output_dir or Path(temporary)
        for name, seed in ENCODERS.items():
            if not (folder / name / "run.json").is_file():
                pretrain(recipe("simclr", seed, folder / name, options))
        costs = step_times(options)
        with quiet_transformers():
            judge = VLMViTModel.from_pretrained(folder / "judge").eval()
        sizes = {"labelled": ("train", options.num_labelled), "test": ("test", options.num_judged)}
        data = {name: load(options.data, *which, options.image_size) for name, which in sizes.items()}
        runs = [run_seed(seed, folder / str(seed), judge, data, options) for seed in range(options.seeds)]
    means: dict[str, Any] = {}
    print("| arm | distance | gradient | PSNR | kNN | fine-tuned | step |\n|---|---:|---:|---:|---:|---:|---:|")
    names = list(dict.fromkeys(name for figures in runs[0].values() for name in figures))
    for arm in runs[0]:
        row = {name: [run[arm][name] for run in runs if name in run[arm]] for name in names}
        means[arm] = {name: round(statistics.mean(values), 4) for name, values in row.items() if values}
        cells = [
            f"{statistics.mean(row[name]):.{digits}f} ± {statistics.pstdev(row[name]):.{digits}f}" if row[name] else ""
            for name, digits in {"distance": 4, "gradient": 2, "psnr": 2, "knn": 1, "tuned": 1}.items()
        ]
        print(f"| {arm} | {' | '.join(cells)} | {costs.get(arm, '')} |")
    print(json.dumps({**means, "step": costs, "seeds": options.seeds, **({"quick": True} if options.quick else {})}))


if __name__ == "__main__":
    main()
