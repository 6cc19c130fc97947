"""Random views of uint8 images as normalised float batches at 224 px: images/s, vs what the field uses.

    python benchmarks/views.py [--quick]                  one CPU thread: ours by opencv, as in the data workers
    python benchmarks/views.py --device cuda [--quick]    ours in batches against kornia, on the device

Contestants, each with SimCLR's operations at the same probabilities and ranges, and with MAE's (crop, flip): ours,
albumentations, kornia on whole batches, Pillow as torchvision's transforms call it (`pip install -e ".[bench]"`).
All but albumentations and kornia resize with antialiasing; these two keep their default, which is cheaper. Time on the
CPU is the process's CPU time. The last line of stdout is JSON.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import albumentations
import cv2
import kornia.augmentation as kornia
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm.auto import tqdm

from hf_vlm.data.transforms.device_views import DeviceViews
from hf_vlm.data.transforms.views import ViewTransform, render_view, sample_view
from hf_vlm.models.modeling_mae import MAEForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRForPreTraining

Array = np.ndarray[Any, Any]
Contestant = Callable[[Array], Tensor]  # images (B, H, W, 3) uint8 to (B, 3, 224, 224) float32

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS: dict[str, dict[str, Any]] = {  # one view of each image
    "simclr": {**SimCLRForPreTraining.default_views, "num_views": 1},
    "mae": dict(MAEForPreTraining.default_views),
}
MAX_SIGMA = 2.0


def images(num_images: int) -> Array:
    """(N, 256, 341, 3) uint8: crops of two photographs."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images  # of 640 x 427
    crops = []
    for index in range(num_images):
        top, left = generator.integers(0, 427 - 300), generator.integers(0, 640 - 400)
        crop = photographs[index % 2][top : top + 300, left : left + 400]
        crops.append(cv2.resize(crop, (341, 256), interpolation=cv2.INTER_AREA))
    return np.stack(crops)


def transform(views: dict[str, Any]) -> ViewTransform:
    return ViewTransform.from_dict({**views, "size": SIZE}, image_mean=MEAN, image_std=STD)


def ours(views: dict[str, Any]) -> Contestant:
    made, generator = transform(views), np.random.default_rng(0)
    (settings,) = made.views

    def make(batch: Array) -> Tensor:
        out = np.empty((len(batch), 3, SIZE, SIZE), dtype=np.float32)
        for image, target in zip(batch, out):
            made.normalize(render_view(image, settings, sample_view(settings, generator)), target)
        return torch.from_numpy(out)

    return make


def with_albumentations(views: dict[str, Any]) -> Contestant:
    colors = []
    if jitter := views.get("jitter"):
        colors = [
            albumentations.ColorJitter(
                *((1 - strength, 1 + strength) for strength in jitter[:3]),
                (-jitter[3], jitter[3]),
                p=views["jitter_probability"],
            ),
            albumentations.ToGray(p=views["grayscale_probability"]),
            albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.1, MAX_SIGMA), p=views["blur_probability"]),
        ]
    steps = [
        albumentations.RandomResizedCrop((SIZE, SIZE), scale=tuple(views["crop_scale"])),
        albumentations.HorizontalFlip(p=views["flip_probability"]),
        *colors,
        albumentations.Normalize(MEAN, STD),
        ToTensorV2(),
    ]
    pipeline = albumentations.Compose(steps, seed=0)
    return lambda batch: torch.stack([pipeline(image=image)["image"] for image in batch])


def with_kornia(views: dict[str, Any], device: str = "cpu") -> Contestant:
    kernel = 2 * math.ceil(3 * MAX_SIGMA) + 1
    colors = []
    if "jitter" in views:
        colors = [
            kornia.ColorJitter(*views["jitter"], p=views["jitter_probability"]),
            kornia.RandomGrayscale(p=views["grayscale_probability"]),
            kornia.RandomGaussianBlur((kernel, kernel), (0.1, MAX_SIGMA), p=views["blur_probability"]),
        ]
    pipeline = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((SIZE, SIZE), scale=tuple(views["crop_scale"])),
        kornia.RandomHorizontalFlip(p=views["flip_probability"]),
        *colors,
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(device)

    def make(batch: Array) -> Tensor:
        sent = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return pipeline(sent.float() / 255)  # type: ignore[no-any-return]

    return make


def with_pillow(views: dict[str, Any]) -> Contestant:
    generator = np.random.default_rng(0)
    mean, std = np.float32(MEAN), np.float32(STD)

    def make(batch: Array) -> Tensor:
        out = np.empty((len(batch), 3, SIZE, SIZE), dtype=np.float32)
        for image, target in zip(batch, out):
            view = _pillow_crop(Image.fromarray(image), views["crop_scale"], generator)
            if generator.random() < views["flip_probability"]:
                view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if "jitter" in views:
                view = _pillow_colors(view, views, generator)
            target[...] = ((np.asarray(view, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)
        return torch.from_numpy(out)

    return make


def _pillow_crop(image: Image.Image, crop_scale: list[float], generator: np.random.Generator) -> Image.Image:
    """A crop sampled as by torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = generator.uniform(*crop_scale) * image.width * image.height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= image.width and height <= image.height:
            break
    else:
        width = height = image.height
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _pillow_colors(view: Image.Image, views: dict[str, Any], generator: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    if generator.random() < views["jitter_probability"]:
        for index in generator.permutation(4):
            strength = views["jitter"][index]
            change = generator.uniform(-strength, strength)
            if index < 3:
                view = enhancers[index](view).enhance(1 + change)
                continue
            hue, saturation, value = view.convert("HSV").split()
            shifted = np.asarray(hue) + np.uint8(round(change * 255) % 256)
            view = Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
    if generator.random() < views["grayscale_probability"]:
        view = view.convert("L").convert("RGB")
    if generator.random() < views["blur_probability"]:
        view = view.filter(ImageFilter.GaussianBlur(generator.uniform(0.1, MAX_SIGMA)))
    return view


def on_device(views: dict[str, Any], device: str, batch: Array) -> Contestant:
    """Ours on the device, parameters sampled beforehand; the copy to the device is timed, as kornia's is."""
    made = DeviceViews(transform(views))
    made.transform.sample = lambda example, rng: (  # type: ignore[method-assign]
        example["image"],
        [sample_view(made.transform.views[0], rng)],
    )
    sampled = [made.sample({"image": image}, np.random.default_rng(seed)) for seed, image in enumerate(batch)]
    ready = made.collate(sampled)

    def make(batch: Array) -> Tensor:
        sent: Any = {name: _to(values, device) for name, values in ready.items()}
        return made.render(sent)["pixel_values"][:, 0]

    return make


def _to(values: Any, device: str) -> Any:
    return (
        {name: _to(value, device) for name, value in values.items()} if isinstance(values, dict) else values.to(device)
    )


def seconds_per_image(make: Contestant, batch: Array, device: str) -> float:
    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    started = now()
    views = make(batch)
    seconds = (now() - started) / len(batch)
    assert views.shape == (len(batch), 3, SIZE, SIZE)
    assert views.dtype == torch.float32
    return seconds


def compare(
    method: str, contestants: dict[str, Contestant], batch: Array, rounds: int, device: str
) -> dict[str, float]:
    """Median ratios of the others' time to ours; contestants alternate within each round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for name, make in contestants.items():
        views = make(batch)  # also the warm-up
        print(f"{method:<7} {name:<15} mean {views.mean():.2f}, standard deviation {views.std():.2f} of the values")
    for _ in tqdm(range(rounds), desc=method):
        for name, make in contestants.items():
            found[name].append(seconds_per_image(make, batch, device))
    ratios = {}
    for name, seconds in found.items():
        ratio = [theirs / ours for theirs, ours in zip(seconds, found["ours"])]
        ratios[name] = statistics.median(ratio)
        print(
            f"{method:<7} {name:<15} {1 / statistics.median(seconds):8.0f} images/s   "
            f"ours is {ratios[name]:.2f} times as fast ({min(ratio):.2f} to {max(ratio):.2f})"
        )
    return ratios


def main() -> None:
    """Runs what the options select and prints the JSON line."""
    parser = argparse.ArgumentParser(description="Images per second of random views.")
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--device", help="compare with kornia, in batches on this device: cuda, or cpu to try it")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = arguments.device or "cpu"
    batch_size, rounds = (64, 5) if arguments.quick else (128, 15)
    if device != "cpu":
        batch_size = 256
    batch = images(batch_size)
    ratios_by_name: dict[str, float] = {}
    for method, views in METHODS.items():
        if arguments.device:
            contestants = {"ours": on_device(views, device, batch), "kornia": with_kornia(views, device)}
        else:
            contestants = {
                "ours": ours(views),
                "albumentations": with_albumentations(views),
                "kornia": with_kornia(views),
                "pillow": with_pillow(views),
            }
        ratios = compare(method, contestants, batch, rounds, device)
        prefix = "" if method == "simclr" else f"{method}_"
        for name in ratios.keys() & {"kornia", "pillow"}:
            ratios_by_name[f"{prefix}vs_{name}"] = round(ratios[name], 3)
        ratios_by_name[f"{prefix}vs_best"] = round(min(ratio for name, ratio in ratios.items() if name != "ours"), 3)
    print(json.dumps(ratios_by_name | ({"device": device} if arguments.device else {})))


if __name__ == "__main__":
    main()
