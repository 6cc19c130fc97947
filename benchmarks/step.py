"""A pretraining step: ours vs transformers' ViTMAE, and vs timm with lightly's loss.

    python benchmarks/step.py [--presets tiny small] [--device cuda] [--compile] [--quick]

Contestants alternate step by step on the same images; ratios are medians over the steps. On the CPU, time is the
process's CPU time on one thread; on an accelerator, wall time around synchronised steps in bfloat16. Peak memory is
that of a separate process on the CPU. timm and lightly (`pip install timm lightly`) are skipped where they cannot be
imported.

Two ratios are printed where they differ: with the same matrix products in both, and as each trains by default: our
trainer lets the CPU multiply with oneDNN where a trial finds that exact and faster (`hf_vlm/features/device.py`). What
the trial chooses depends on the processor, which the output names. The last line of stdout is JSON.
"""

import argparse
import gc
import importlib.machinery
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from machine import describe, has_fast_products, processor, set_products
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_vlm import MAEConfig, MAEForPreTraining, SimCLRConfig, SimCLRForPreTraining, VLMViTConfig
from hf_vlm.features.device import use_fast_cpu_matmul
from hf_vlm.models.configuration_vlm_vit import PRESETS
from hf_vlm.models.modeling_simclr import nt_xent
from hf_vlm.models.ssl_layers import ProjectionHead
from hf_vlm.training.meters import FlopCounter, peak_flops

SIZE, PATCH = 224, 16
PARTIAL = {"prediction_ratio": 1 / 3, "use_cross_attention": True}
Loss = Callable[[], Tensor]


def encoder_config(preset: str) -> VLMViTConfig:
    return VLMViTConfig.from_preset(preset, image_size=SIZE, patch_size=PATCH, position_embedding_type="sincos")


def our_mae(preset: str, **options: Any) -> nn.Module:
    return MAEForPreTraining(MAEConfig(backbone_config=encoder_config(preset), **options))


def their_mae(preset: str) -> nn.Module:
    shape = PRESETS[preset]
    config = ViTMAEConfig(
        **{name: shape[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        intermediate_size=4 * shape["hidden_size"],
        patch_size=PATCH,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")


def our_simclr(preset: str) -> nn.Module:
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=encoder_config(preset)))


class TheirSimCLR(nn.Module):
    """timm's encoder, the same projection head, lightly's loss."""

    def __init__(self, preset: str):
        super().__init__()
        import timm
        from lightly.loss import NTXentLoss

        shape = PRESETS[preset]
        self.backbone = timm.models.VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=shape["hidden_size"],
            depth=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_classes=0,
        )
        self.head = ProjectionHead(shape["hidden_size"], 2048, 128, num_layers=3)
        self.loss = NTXentLoss(temperature=0.2)

    def forward(self, pixel_values: Tensor) -> Any:
        first, second = (self.head(self.backbone(views)) for views in pixel_values.unbind(1))
        return type("Output", (), {"loss": self.loss(first, second)})


def import_peers() -> bool:
    """Whether timm and lightly can be imported; both require torchvision and use nothing of it here."""
    if importlib.util.find_spec("torchvision") is None:
        parts = (
            "ops",
            "ops.misc",
            "transforms",
            "transforms.functional",
            "datasets",
            "datasets.vision",
            "io",
            "models",
        )
        for name in ("torchvision", *(f"torchvision.{part}" for part in parts)):
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    try:
        import lightly.loss
        import timm
    except Exception as error:  # whatever their own dependencies raise
        print(f"timm and lightly are skipped: {error}")
        return False
    return bool(timm and lightly)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "transformers": their_mae,
    "exact": our_mae,
    "partial": lambda preset: our_mae(preset, **PARTIAL),
    "timm": TheirSimCLR,
    "simclr": our_simclr,
}


class Contestant:
    """A model with its optimiser; `as_trained` lets it multiply matrices as our trainer does on this processor."""

    def __init__(self, name: str, preset: str, device: torch.device, *, as_trained: bool, is_compiled: bool = False):
        torch.manual_seed(0)
        self.model = MODELS[name](preset).to(device).train()
        self.as_trained = as_trained
        if as_trained:
            use_fast_cpu_matmul(self.model)  # type: ignore[arg-type]
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.run: Any = compile_regions(self.model) if is_compiled else self.model  # layer by layer, as training does

    def loss(self, images: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.run(pixel_values=images).loss  # type: ignore[no-any-return]

    def step(self, images: Tensor) -> float:
        """Trains one step; returns its seconds."""
        set_products(as_trained=self.as_trained)
        started = clock(self.device)
        self.loss(images).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return clock(self.device) - started

    def flops(self, images: Tensor) -> int:
        with FlopCounter() as counter:
            self.loss(images).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def peak(contestant: Contestant) -> float:
    """Peak FLOP/s: of an accelerator by its data sheet; of the CPU as measured with a large matrix product."""
    if contestant.device.type != "cpu":
        return peak_flops(contestant.device, "bf16")
    set_products(as_trained=contestant.as_trained)
    matrix, seconds = torch.randn(1024, 1024), []
    for _ in range(6):
        started = clock(contestant.device)
        matrix @ matrix
        seconds.append(clock(contestant.device) - started)
    return 2 * 1024**3 / min(seconds)


def compare(contestants: dict[str, Contestant], images: Tensor, num_steps: int, what: str) -> dict[str, float]:
    """Median ratios of the first contestant's time to that of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant.step(images)
    for _ in tqdm(range(num_steps), desc=what, leave=False):
        for name, contestant in contestants.items():
            seconds[name].append(contestant.step(images))
    first, *_ = seconds.values()
    ratios = {}
    for name, found in seconds.items():
        ratio = [theirs / ours for theirs, ours in zip(first, found)]
        ratios[name] = statistics.median(ratio)
        median = statistics.median(found)
        mfu = contestants[name].flops(images) / median / peak(contestants[name])
        print(
            f"{what:<14} {name:<22} {len(images) / median:8.1f} images/s  {ratios[name]:5.2f} times "
            f"({min(ratio):.2f} to {max(ratio):.2f})  MFU {mfu:.2f}"
        )
    return ratios


def mae(preset: str, arguments: argparse.Namespace) -> dict[str, float]:
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch, 3, SIZE, SIZE, device=device)
    options = {"preset": preset, "device": device, "is_compiled": arguments.compile}
    contestants = {"transformers": Contestant("transformers", as_trained=False, **{**options, "is_compiled": False})}
    for name in ("exact", "partial"):
        contestants[name] = Contestant(name, as_trained=False, **options)
        if has_fast_products(device):
            contestants[f"{name}, as trained"] = Contestant(name, as_trained=True, **options)
    return compare(contestants, images, arguments.steps, f"MAE {preset}")


def simclr(preset: str, arguments: argparse.Namespace) -> dict[str, float]:
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch, 2, 3, SIZE, SIZE, device=device)
    options = {"preset": preset, "device": device, "is_compiled": arguments.compile}
    contestants = {"timm": Contestant("timm", as_trained=False, **{**options, "is_compiled": False})}
    contestants["simclr"] = Contestant("simclr", as_trained=False, **options)
    if has_fast_products(device):
        contestants["simclr, as trained"] = Contestant("simclr", as_trained=True, **options)
    return compare(contestants, images, arguments.steps, f"SimCLR {preset}")


def losses(device: torch.device, num_rounds: int, *, batch: int = 512) -> dict[str, float]:
    """lightly's time for NT-Xent over ours, forward and backward, with the same products and as trained."""
    from lightly.loss import NTXentLoss

    projections = F.normalize(torch.randn(2 * batch, 128, device=device), dim=1)
    theirs = NTXentLoss(temperature=0.2)
    variants = {"ntxent": False} | ({"ntxent_as_trained": True} if has_fast_products(device) else {})
    ratios: dict[str, list[float]] = {name: [] for name in variants}

    def seconds(loss_of: Callable[[Tensor], Tensor], *, as_trained: bool) -> float:
        set_products(as_trained=as_trained)
        leaf = projections.clone().requires_grad_()
        started = clock(device)
        loss_of(leaf).backward()
        return clock(device) - started

    for _ in range(num_rounds):
        of_lightly = seconds(lambda leaf: theirs(*leaf.chunk(2)), as_trained=False)
        for name, as_trained in variants.items():
            ratios[name].append(of_lightly / seconds(lambda leaf: nt_xent(leaf, 0.2)[0], as_trained=as_trained))
    for name, found in ratios.items():
        middle, spread = statistics.median(found), f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name} of {2 * batch} views: {middle:.2f} times lightly's ({spread})")
    medians = {name: round(statistics.median(found), 3) for name, found in ratios.items()}
    return {"ntxent_as_trained": medians["ntxent"]} | medians


def peak_memory(name: str, preset: str, batch: int) -> float:
    """MiB that two steps add to a separate process."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory", name, "--presets", preset, "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(name: str, preset: str, batch: int) -> None:
    images = torch.randn(batch, 3, SIZE, SIZE)
    before = psutil.Process().memory_info().rss / 1024  # KiB
    contestant = Contestant(name.split(",")[0], preset, torch.device("cpu"), as_trained="as trained" in name)
    for _ in range(2):
        contestant.step(images)
    status = Path("/proc/self/status").read_text()  # getrusage would give the parent's peak where that was higher
    print((int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) - before) / 1024)


def main() -> None:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(description="Images per second of a pretraining step.")
    parser.add_argument("--presets", nargs="+", default=["tiny"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile our models")
    parser.add_argument("--quick", action="store_true", help="few steps of few images: not a result to quote")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # what a separate process measures
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.batch, arguments.steps = 4, 3
    if arguments.memory:
        print_memory(arguments.memory, arguments.presets[0], arguments.batch)
        return
    device = torch.device(arguments.device)
    print(describe(device))
    has_peers = import_peers()
    results: dict[str, Any] = {"processor": processor(device), "trains_with_onednn": has_fast_products(device)}
    for preset in arguments.presets:
        suffix = "" if preset == arguments.presets[0] else f"_{preset}"
        ratios = mae(preset, arguments)
        for name, key in (("exact", "mae_vs_transformers"), ("partial", "mae_partial_vs_transformers")):
            results[key + suffix] = round(ratios[name], 3)
            results[f"{key}_as_trained{suffix}"] = round(ratios.get(f"{name}, as trained", ratios[name]), 3)
        gc.collect()
        if has_peers:
            ratios = simclr(preset, arguments)
            as_trained = ratios.get("simclr, as trained", ratios["simclr"])
            results[f"simclr_vs_timm_lightly{suffix}"] = round(ratios["simclr"], 3)
            results[f"simclr_vs_timm_lightly_as_trained{suffix}"] = round(as_trained, 3)
            gc.collect()
        if device.type == "cpu":
            memory = {
                name: peak_memory(name, preset, arguments.batch)
                for name in ("transformers", "exact", "exact, as trained", "partial, as trained")
            }
            print(
                f"peak memory of a step, {preset}: "
                + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
            )
            results[f"mae_memory_vs_transformers{suffix}"] = round(
                memory["exact, as trained"] / memory["transformers"], 3
            )
    if has_peers:
        results |= losses(device, 3 if arguments.quick else 25)
    print(json.dumps(results | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
