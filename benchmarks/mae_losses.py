"""What losses of the painted image do to MAE: sharpness of what it paints, features, and the time of a step.

    python benchmarks/mae_losses.py [--data CIFAR10] [--seeds 1] [--num_images 40000] [--picture out.png] [--quick]

Arms, each trained by `hf-vlm pretrain` on the same number of images: plain MAE; with a perceptual loss by the moving
average of its own encoder; with an adversarial one; with both. Targets are plain pixels, so that nothing of what is
hidden reaches the painted image. Judged on the same hidden patches of test images:

    knn       accuracy of frozen features, percent
    distance  to the original in the features of an encoder that SimCLR trained, which no arm has seen: lower is better
    gradient  mean gradient within painted patches / that of the original: below 1 is blurred, above 1 too rough
    psnr      decibels, painted patches alone; the mean square error is what plain MAE minimises

`mean colour` paints the mean of the visible pixels. The last line of stdout is JSON: means over the seeds.
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
from mae_quality import SIDE, load
from PIL import Image
from ssl_quality import recipe_of
from torch import Tensor
from tqdm.auto import tqdm

from hf_vlm import MAEForPreTraining, VLMViTImageProcessor, VLMViTModel
from hf_vlm.deploy.draw import titled_rows
from hf_vlm.models.ssl_perceptual import features_of_layers, perceptual_distance
from hf_vlm.training.arguments import parse_arguments
from hf_vlm.training.build import build_model, quiet_transformers
from hf_vlm.training.callbacks import LogFile, read_log
from hf_vlm.training.device import suit_cpu
from hf_vlm.training.run import evaluate_encoder, pretrain, quiet_libraries

PERCEPTUAL = {"perceptual_weight": 1.0}
ADVERSARIAL = {"adversarial_weight": 0.1, "adversarial_start": 0.25, "discriminator_size": 32}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "perceptual": PERCEPTUAL,
    "adversarial": ADVERSARIAL,
    "both": {**PERCEPTUAL, **ADVERSARIAL},
}
JUDGE_LAYERS = (2, 3, 4, 6)
PATCH = 4


def recipe(arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of an arm, or of SimCLR, as the comparison of methods has it."""
    found = recipe_of("simclr" if arm == "simclr" else "mae", seed, folder, options)
    if arm != "simclr":
        found["model_config"] = {**found["model_config"], "norm_pix_loss": False, **ARMS[arm]}
    return found


def step_times(options: argparse.Namespace, num_rounds: int = 8) -> dict[str, float]:
    """Median CPU time of a step over that of plain MAE, arms taking turns, on noise."""
    images, steps = torch.randn(options.batch_size, 3, SIDE, SIDE), {}
    for arm in ARMS:
        model = build_model(parse_arguments(recipe(arm, 0, Path(), options)), task="pretraining").train()
        suit_cpu(model)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[arm] = model, torch.optim.AdamW(learned, lr=1e-3, fused=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(num_rounds + 1), desc="Timing steps", leave=False):
        for arm, (model, optimizer) in steps.items():
            started = time.process_time()
            model(images).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(model, "after_step"):
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


def gradient(images: Tensor, masks: Tensor) -> Tensor:
    """Mean absolute difference () of neighbours within one masked patch; images (n, 3, side, side)."""
    total, count = torch.zeros(()), torch.zeros(())
    for axis in (2, 3):
        inside = (torch.arange(SIDE - 1) % PATCH != PATCH - 1).unflatten(0, (-1, 1) if axis == 2 else (1, -1))
        chosen = masks.narrow(axis, 0, SIDE - 1) & inside
        total += (images.diff(dim=axis).abs() * chosen).sum()
        count += 3 * chosen.sum()
    return total / count


def figures_of(painted: Tensor, originals: Tensor, masks: Tensor, judge: VLMViTModel, std: Tensor) -> dict[str, float]:
    """Figures of painted images, all (n, 3, side, side), normalised with the deviations `std` (3, 1, 1)."""
    errors = ((painted - originals) * std).square() * masks
    psnr = -10 * (errors.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))).log10()
    with torch.inference_mode():
        distance = perceptual_distance(
            features_of_layers(judge, painted, JUDGE_LAYERS), features_of_layers(judge, originals, JUDGE_LAYERS)
        )
    return {
        "distance": distance.item(),
        "gradient": (gradient(painted, masks) / gradient(originals, masks)).item(),
        "psnr": psnr.mean().item(),
    }


def picture(columns: dict[str, Tensor], mean: Tensor, std: Tensor) -> Image.Image:
    """Images (n, 3, side, side) of each column side by side, enlarged."""
    shown = {}
    for name, images in columns.items():
        pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        shown[name] = [Image.fromarray(p).resize((5 * SIDE, 5 * SIDE), Image.Resampling.NEAREST) for p in pixels]
    return titled_rows([[(name, shown[name][row]) for name in shown] for row in range(len(images))])


def run_seed(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Trains the judge and all arms of a seed, draws them, and returns their figures."""
    pretrain(recipe("simclr", seed, folder / "judge", options))
    with quiet_transformers():
        judge = VLMViTModel.from_pretrained(folder / "judge").eval()
    processor = VLMViTImageProcessor.from_pretrained(folder / "judge")
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    originals = (load(options.data, "test", options.num_judged)[0].float() / 255 - mean) / std
    noise = torch.rand(len(originals), (SIDE // PATCH) ** 2, generator=torch.Generator().manual_seed(0))
    found, columns = {}, {"original": originals}
    for arm in ARMS:
        pretrain(recipe(arm, seed, folder / arm, options))
        with quiet_transformers():
            model = MAEForPreTraining.from_pretrained(folder / arm / "objective").eval()
        columns[arm], masks = model.reconstruct(originals, noise=noise)
        knn = evaluate_encoder(folder / arm, options.data, "test", num_examples=options.num_labelled)["knn"]
        found[arm] = {"knn": 100 * knn, **figures_of(columns[arm], originals, masks, judge, std)}
        logged = [entry for entry in read_log(folder / arm / LogFile.name) if "loss_pixel" in entry][-1:]
        found[arm] |= {name: entry[name] for entry in logged for name in entry if name.startswith("loss_")}
        print(f"seed {seed} {arm:<12} " + "  ".join(f"{k} {v:.3f}" for k, v in found[arm].items()), flush=True)
    visible_mean = (originals * ~masks).sum((2, 3), keepdim=True) / (~masks).sum((2, 3), keepdim=True)
    flat = torch.where(masks, visible_mean, originals)
    found["mean colour"] = figures_of(flat, originals, masks, judge, std)
    if options.picture is not None and seed == 0:
        masked = torch.where(masks, -mean / std, originals)
        columns = {"original": originals, "seen": masked, **{arm: columns[arm] for arm in ARMS}}
        picture({name: images[:10] for name, images in columns.items()}, mean, std).save(options.picture)
    return found


def main() -> None:
    """Prints the cost of a step, a row a run, a table of means and spreads, and JSON."""
    parser = argparse.ArgumentParser(description="MAE with perceptual and adversarial losses.")
    parser.add_argument("--data", default="scenes:hard", help="labelled images with the splits train and test")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--num_images", type=int, default=40_000, help="seen in pretraining")
    parser.add_argument("--num_labelled", type=int, default=5_000, help="images of each split for kNN")
    parser.add_argument("--num_judged", type=int, default=2_000, help="test images that are painted")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--picture", type=Path, help="where to draw what the arms of the first seed paint")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--quick", action="store_true", help="hardly trained: no figure to quote")
    options = parser.parse_args()
    options.image_size, options.patch_size = SIDE, PATCH
    if options.quick:
        options.seeds, options.num_images, options.num_labelled, options.num_judged = 1, 3_000, 500, 200
    torch.set_num_threads(1)
    quiet_libraries()
    costs = step_times(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or Path(temporary)
        runs = [run_seed(seed, folder / str(seed), options) for seed in range(options.seeds)]
    means: dict[str, Any] = {}
    print("| arm | kNN | distance | gradient | PSNR | step |\n|---|---:|---:|---:|---:|---:|")
    for arm in runs[0]:
        row = {name: [run[arm][name] for run in runs if name in run[arm]] for name in runs[0]["plain"]}
        means[arm] = {name: round(statistics.mean(values), 4) for name, values in row.items() if values}
        cells = [
            f"{statistics.mean(row[name]):.{digits}f} ± {statistics.pstdev(row[name]):.{digits}f}" if row[name] else ""
            for name, digits in {"knn": 1, "distance": 3, "gradient": 2, "psnr": 2}.items()
        ]
        print(f"| {arm} | {' | '.join(cells)} | {costs.get(arm, '')} |")
    print(json.dumps({**means, "step": costs, "seeds": options.seeds, **({"quick": True} if options.quick else {})}))


if __name__ == "__main__":
    main()
