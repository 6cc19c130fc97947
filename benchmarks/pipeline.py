"""The whole loop, JPEGs in Parquet on disk to updated weights: ours vs the one of transformers' example.

    python benchmarks/pipeline.py [--quick] [--device cuda] [--workers 0] [--rows nano tiny]

ours: `hf-vlm pretrain` (exact stream, reduced decoding, views, MAE, VisionTrainer).
theirs: examples/pytorch/image-pretraining/run_mae.py of transformers (map-style `datasets`, Pillow, ViTMAE with sdpa,
stock Trainer); its torchvision transforms are written out with Pillow and torch, operation by operation.
Both at 224 pixels from JPEGs of 640 x 480, with the same optimiser. In the rows with one decoder the whole model is
the same in both: encoder, decoder, mask and loss. In the row `recipe_nano` only the nano encoder is: ours is the
recipe mae/vit_nano_cpu.yaml with its slim decoder and half of the patches visible, theirs has the example's own
decoder and mask. In the rows `partial_...` sizes are the same and ours predicts a third of the masked patches by
cross-attention. Ours multiplies matrices as `VisionTrainer` sets it (hf_vlm/features/device.py), theirs as torch does
by default. The two alternate in segments; time is the process's CPU time on one thread, wall time on an accelerator or
with data workers. The last line of stdout is JSON.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import datasets
import numpy as np
import torch
from machine import describe, set_products
from PIL import Image
from stream import write_images
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils import logging as transformers_logging

from hf_vlm.models.configuration_vlm_vit import PRESETS
from hf_vlm.training import run
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.recipe import load_recipe
from hf_vlm.training.trainer import VisionTrainer

SIZE = 224
NUM_WARM = 2  # steps before a segment's clock starts
DEFAULT_DECODER = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16}  # ViTMAEConfig's
SLIM_DECODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}  # the nano recipe's
SMALL_DECODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIMISER = {"learning_rate": 1e-4, "weight_decay": 0.05, "adam_beta2": 0.95, "max_grad_norm": 0.0}


@dataclass(frozen=True)
class Row:
    """One comparison: the `decoder` of both, or None for the recipe's in ours and the default in theirs."""

    preset: str
    decoder: dict[str, Any] | None
    batch_size: int
    num_steps: int
    is_partial: bool = False


ROWS = {
    "nano": Row("nano", SLIM_DECODER, 32, 8),
    "tiny": Row("tiny", SMALL_DECODER, 16, 8),
    "recipe_nano": Row("nano", None, 8, 2),
    "tiny_default_decoder": Row("tiny", DEFAULT_DECODER, 8, 2),
    "partial_nano": Row("nano", SLIM_DECODER, 32, 8, is_partial=True),
    "partial_tiny_default_decoder": Row("tiny", DEFAULT_DECODER, 8, 2, is_partial=True),
}
QUICK_ROWS = ("nano", "tiny", "recipe_nano")


class Segment(TrainerCallback):
    """Times the steps of a run after the first ones."""

    def __init__(self, device: str):
        self.device = device
        self.started = self.ended = (0.0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (NUM_WARM, state.max_steps):
            if self.device != "cpu":
                torch.accelerator.synchronize()
            self.started, self.ended = self.ended, (time.process_time(), time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """CPU time of the process, and wall time."""
        cpu, wall = (end - start for start, end in zip(self.started, self.ended))
        return cpu, wall


@dataclass(frozen=True)
class Setting:
    folder: Path
    device: str
    num_workers: int


def common_arguments(row: Row, setting: Setting, contestant: str) -> dict[str, Any]:
    return {
        "output_dir": str(setting.folder / contestant),
        "max_steps": NUM_WARM + row.num_steps,
        "per_device_train_batch_size": row.batch_size,
        "dataloader_num_workers": setting.num_workers,
        "logging_steps": NUM_WARM,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": setting.device == "cpu",
        "bf16": setting.device != "cpu",
        "remove_unused_columns": False,
        **OPTIMISER,
    }


def ours(row: Row, setting: Setting) -> tuple[float, float]:
    """CPU and wall seconds of one segment of `hf-vlm pretrain`."""
    recipe = load_recipe("mae/vit_nano_cpu.yaml") | {"image_size": SIZE, "encoder_preset": row.preset}
    if row.decoder is not None:
        recipe["model_config"] = {"mask_ratio": 0.75, "norm_pix_loss": True, "decoder_config": row.decoder}
        recipe["views"] = {}  # the method's default, which the example uses too
        if row.is_partial:
            recipe["model_config"] |= {"prediction_ratio": 1 / 3, "use_cross_attention": True}
    recipe |= common_arguments(row, setting, "ours") | {"data": str(setting.folder / "parquet"), "run_name": "ours"}
    segment = Segment(setting.device)
    with mock.patch.object(run, "VisionTrainer", functools.partial(VisionTrainer, callbacks=[segment])):
        run.pretrain(recipe)
    return segment.seconds()


def random_resized_crop(image: Image.Image) -> Image.Image:
    """torchvision's RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            break
    else:  # the centre, within the ratios
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    cropped = image.crop((left, top, left + w, top + h))
    return cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def transformed(image: Image.Image) -> torch.Tensor:
    """What run_mae.py composes: RGB, crop, flip, ToTensor, Normalize."""
    image = random_resized_crop(image.convert("RGB") if image.mode != "RGB" else image)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().float().div(255)
    return pixels.clone().sub_(MEAN).div_(STD)


def transform_batch(examples: dict[str, Any]) -> dict[str, Any]:
    return {"pixel_values": [transformed(image) for image in examples["image"]]}


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


def theirs(row: Row, setting: Setting) -> tuple[float, float]:
    """CPU and wall seconds of one segment of transformers' example."""
    dataset: Any = datasets.load_dataset(
        "parquet",
        data_files=str(setting.folder / "parquet/*"),
        split="train",
        cache_dir=str(setting.folder / "cache"),
    )
    dataset.set_transform(transform_batch)
    encoder, decoder = PRESETS[row.preset], row.decoder or DEFAULT_DECODER
    config = ViTMAEConfig(
        **encoder,
        intermediate_size=4 * encoder["hidden_size"],
        decoder_intermediate_size=4 * decoder["hidden_size"],
        **{f"decoder_{name}": value for name, value in decoder.items()},
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    segment = Segment(setting.device)
    trainer = Trainer(
        model=ViTMAEForPreTraining(config),
        args=TrainingArguments(**common_arguments(row, setting, "theirs")),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[segment],
    )
    trainer.train()
    return segment.seconds()


def compare(name: str, setting: Setting, rounds: int) -> dict[str, float]:
    """Median ratios of their time to ours, CPU time and wall time; the two alternate."""
    row = ROWS[name]
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for index in tqdm(range(rounds), desc=name):
        contestants = (("ours", ours), ("theirs", theirs))
        for contestant, train in contestants if index % 2 else reversed(contestants):
            set_products(as_trained=contestant == "ours" and setting.device == "cpu")
            with contextlib.redirect_stdout(io.StringIO()):  # the trainers' logs
                found[contestant].append(train(row, setting))
    ratios = {}
    num_images = row.batch_size * row.num_steps
    for index, clock in enumerate(("cpu", "wall")):
        each = [t[index] / o[index] for t, o in zip(found["theirs"], found["ours"])]
        ratios[clock] = statistics.median(each)
        rates = {
            contestant: num_images / statistics.median(pair[index] for pair in pairs)
            for contestant, pairs in found.items()
        }
        print(
            f"{name:<20} {clock:<4} ours {rates['ours']:7.1f} images/s, theirs {rates['theirs']:7.1f}: "
            f"{ratios[clock]:.2f} times ({min(each):.2f} to {max(each):.2f}, {rounds} rounds)"
        )
    log = [entry for entry in read_log(setting.folder / "ours/log.jsonl") if "mfu" in entry]
    means = {key: statistics.mean(entry[key] for entry in log) for key in ("data_wait", "mfu")}
    print(f"{name:<20} ours in the last round: " + ", ".join(f"{key} {mean:.3f}" for key, mean in means.items()))
    return ratios


def main() -> None:
    """Prints the rows and the JSON line; `vs_trainer_pillow` is the row of the same nano model in both."""
    parser = argparse.ArgumentParser(description="Images per second from disk to updated weights.")
    parser.add_argument("--quick", action="store_true", help="few steps: not a result to quote")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=0, help="data workers of each contestant")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"rows to run, of {', '.join(ROWS)}")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(describe(torch.device(arguments.device)))
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    transformers_logging.disable_progress_bar()
    clock = "cpu" if arguments.device == "cpu" and not arguments.workers else "wall"
    ratios_by_row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(Path(temporary), arguments.device, arguments.workers)
        write_images(setting.folder, (480, 640), 400)
        for name in arguments.rows or (QUICK_ROWS if arguments.quick else ROWS):
            rounds = (1 if name == "recipe_nano" else 2) if arguments.quick else arguments.rounds
            ratios_by_row[f"vs_trainer_pillow_{name}"] = round(compare(name, setting, rounds)[clock], 3)
    if "vs_trainer_pillow_nano" in ratios_by_row:
        ratios_by_row["vs_trainer_pillow"] = ratios_by_row["vs_trainer_pillow_nano"]
    print(json.dumps(ratios_by_row | {"clock": clock} | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
