"""A sparse encoder against its dense twin: speed of a training step, and the loss of SimMIM at equal compute.

    python benchmarks/moe.py [--seed 0] [--num_steps 250] [--quick]

The sparse encoder has 8 experts in every layer, of which each token passes one, so that both do the same products.
The speed is that of SimMIM's step (forward, backward, AdamW) of ViT-Ti on 64 images of 64 pixels, dense time / sparse
time, both interleaved on one thread and in CPU time; median of the pairs. The losses are those of narrow encoders (4
layers of 64) on held-out scenes, after the same images in the same order. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from machine import describe, set_products
from torch import Tensor
from tqdm.auto import tqdm

from hf_vlm import SimMIMConfig, SimMIMForPreTraining, VLMViTConfig
from hf_vlm.data.images import first_images
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.image_ops import resize
from hf_vlm.models.expert_layers import num_inactive_parameters

SIDE, PATCH_SIZE, BATCH_SIZE, NUM_EXPERTS = 64, 8, 64, 8
NARROW = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def build(encoder: VLMViTConfig, *, is_sparse: bool, seed: int) -> SimMIMForPreTraining:
    fields = encoder.to_dict()
    if is_sparse:
        layers = list(range(encoder.num_hidden_layers))
        fields |= {"num_experts": NUM_EXPERTS, "sparse_layers": layers, "router_noise": 1.0}
    torch.manual_seed(seed)
    return SimMIMForPreTraining(SimMIMConfig(backbone_config=fields, mask_patch_size=2 * PATCH_SIZE)).train()


def encoder_config(preset: str | None = None) -> VLMViTConfig:
    shape: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH_SIZE, "position_embedding_type": "sincos"}
    return VLMViTConfig(**NARROW, **shape) if preset is None else VLMViTConfig.from_preset(preset, **shape)


def num_parameters(model: SimMIMForPreTraining) -> tuple[int, int]:
    """Number of the encoder's parameters, and of those that a token passes."""
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    return total, total - num_inactive_parameters(model.backbone)


def optimizer_of(model: SimMIMForPreTraining, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, fused=True)


def step(model: SimMIMForPreTraining, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    model(images).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_speed(num_rounds: int, *, as_trained: bool) -> list[float]:
    """Dense time / sparse time of pairs of steps."""
    set_products(as_trained=as_trained)
    models = [build(encoder_config("tiny"), is_sparse=is_sparse, seed=0) for is_sparse in (False, True)]
    (dense, _), (total, active) = map(num_parameters, models)
    print(f"ViT-Ti: dense {dense / 1e6:.2f} M, sparse {total / 1e6:.2f} M ({total / dense:.2f} times), ", end="")
    print(f"{active / 1e6:.2f} M active", flush=True)
    optimizers = [optimizer_of(model, 1e-4) for model in models]
    images, ratios = torch.randn(BATCH_SIZE, 1, 3, SIDE, SIDE), []
    for number in range(num_rounds + 1):  # the first, which allocates, does not count
        seconds = []
        for model, optimizer in zip(models, optimizers):
            started = time.process_time()
            step(model, optimizer, images)
            seconds.append(time.process_time() - started)
        if number:
            ratios.append(seconds[0] / seconds[1])
    return ratios


def scenes(split: str, num_images: int) -> Tensor:
    """Images (n, 1, 3, side, side), normalised."""
    images = [resize(image, (SIDE, SIDE)) for image in first_images(open_source("scenes", split), num_images)]
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - 0.5)[:, None] / 0.25


@torch.inference_mode()
def held_out_loss(model: SimMIMForPreTraining, images: Tensor) -> float:
    """Mean loss on images, the same patches of which are masked for every model; without that of the routers."""
    model.eval()
    torch.manual_seed(0)
    return statistics.mean(model(part).loss.item() for part in images.split(BATCH_SIZE))


def train(model: SimMIMForPreTraining, images: Tensor, num_steps: int, seed: int, what: str) -> None:
    optimizer = optimizer_of(model, 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps, cycle_momentum=False)
    chosen = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(num_steps), desc=what, leave=False, mininterval=5):
        batch = images[torch.randint(0, len(images), (BATCH_SIZE,), generator=chosen)]
        step(model, optimizer, batch.flip(-1) if torch.rand((), generator=chosen) < 0.5 else batch)
        schedule.step()


def main() -> None:
    """Prints what was measured, then JSON."""
    parser = argparse.ArgumentParser(description="A sparse encoder against its dense twin.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe(torch.device("cpu")), flush=True)
    num_rounds, num_steps, num_images = (2, 10, 128) if arguments.quick else (7, arguments.num_steps, 4096)
    ratios = {trained: measure_speed(num_rounds, as_trained=trained) for trained in (False, True)}
    for trained, values in ratios.items():
        products = "as trained" if trained else "torch's products"
        print(
            f"speed, {products}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})", flush=True
        )
    train_images, test_images, losses = scenes("train", num_images), scenes("test", num_images // 8), []
    for what, is_sparse in ("dense", False), ("sparse", True):
        model = build(encoder_config(), is_sparse=is_sparse, seed=arguments.seed)
        started = time.process_time()
        train(model, train_images, num_steps, arguments.seed, what)
        seconds, routing = time.process_time() - started, model.router_metrics
        losses.append(held_out_loss(model, test_images))
        print(f"{what}: loss {losses[-1]:.4f}, {1000 * seconds / num_steps:.0f} ms per step", flush=True)
        print({name: round(value.item(), 3) for name, value in routing.items()}, flush=True)
    speed = round(statistics.median(ratios[True]), 3)
    result = {"speed": speed, "dense_loss": round(losses[0], 4), "sparse_loss": round(losses[1], 4)}
    print(json.dumps({**result, **({"quick": True} if arguments.quick else {})}))


if __name__ == "__main__":
    main()
