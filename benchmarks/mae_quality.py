"""What partial decoding costs in quality: MAE encoders after the same number of images, on small labelled images.

    python benchmarks/mae_quality.py --data CIFAR10 [--seeds 3] [--num_images 100000] [--quick]

Variants: exact MAE; a third of the masked patches predicted by the same decoder; a third by a cross-attention decoder;
and a random encoder. Each is evaluated by kNN on its frozen features and by fine-tuning on 5,000 labels.
The last line of stdout is JSON: means over the seeds, accuracies in percent.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_vlm import MAEConfig, MAEForPreTraining, VLMViTConfig, VLMViTModel
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.image_ops import resize
from hf_vlm.features.device import use_fast_cpu_matmul
from hf_vlm.metrics import knn_accuracy

SIDE = 32
BATCH_SIZE = 128
VARIANTS: dict[str, dict[str, Any] | None] = {
    "exact": {},
    "partial": {"prediction_ratio": 1 / 3},
    "partial_cross": {"prediction_ratio": 1 / 3, "use_cross_attention": True},
    "random": None,
}


def load(source: str, split: str, num_images: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) uint8 and labels (n,)."""
    images, labels = [], []
    stream = open_source(source, split, num_samples=num_images)
    for example in tqdm(stream, desc=f"Reading {split}", total=num_images, leave=False):
        images.append(resize(decode_image(example["image"])[0], (side, side)))
        labels.append(example["label"])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5) / 0.25


def augment(images: Tensor) -> Tensor:
    """Images flipped at random and shifted by up to four pixels, each image independently."""
    padded, within = F.pad(normalise(images), (4, 4, 4, 4), mode="reflect"), torch.arange(images.shape[-1])
    rows = torch.randint(0, 9, (len(images), 1)) + within  # (n, side)
    columns = torch.randint(0, 9, (len(images), 1)) + within
    columns = torch.where(torch.rand(len(images), 1) < 0.5, columns.flip(1), columns)
    n = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[n, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(modules: list[torch.nn.Module], loss_of: Any, num_steps: int, learning_rate: float, what: str) -> float:
    """Minimises `loss_of()`; returns CPU seconds per step."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.process_time()
    for _ in tqdm(range(num_steps), desc=what, leave=False, mininterval=5):
        loss_of().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - started) / num_steps


def pretrain(options: dict[str, Any] | None, images: Tensor, num_images: int, what: str) -> tuple[VLMViTModel, float]:
    encoder = VLMViTConfig.from_preset("nano", image_size=SIDE, patch_size=4, position_embedding_type="sincos")
    if options is None:
        return VLMViTModel(encoder), 0.0
    decoder = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = MAEForPreTraining(MAEConfig(backbone_config=encoder, decoder_config=decoder, **options)).train()
    use_fast_cpu_matmul(model)

    def loss() -> Tensor:
        return model(augment(images[torch.randint(0, len(images), (BATCH_SIZE,))])).loss

    seconds = train([model], loss, num_images // BATCH_SIZE, 1e-3, what)
    return model.backbone, seconds


def features(encoder: VLMViTModel, images: Tensor) -> Tensor:
    encoder.eval()
    with torch.inference_mode():
        return torch.cat([encoder(part).last_hidden_state[:, 1:].mean(1) for part in normalise(images).split(500)])


def finetune(encoder: VLMViTModel, data: dict[str, tuple[Tensor, Tensor]], num_steps: int, what: str) -> float:
    images, labels = data["labelled"]
    head = torch.nn.Linear(encoder.config.hidden_size, int(labels.max()) + 1)
    encoder.train()

    def loss() -> Tensor:
        chosen = torch.randint(0, len(images), (BATCH_SIZE,))
        pooled = encoder(augment(images[chosen])).last_hidden_state[:, 1:].mean(1)
        return F.cross_entropy(head(pooled), labels[chosen])

    train([encoder, head], loss, num_steps, 1e-3, what)
    predicted = head(features(encoder, data["test"][0]).clone()).argmax(1)
    return (predicted == data["test"][1]).float().mean().item()


def main() -> None:
    """Prints one row per run, then means and standard deviations, then JSON."""
    parser = argparse.ArgumentParser(description="Quality of MAE with partial decoding.")
    parser.add_argument("--data", required=True, help="labelled images with the splits train and test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=100_000, help="images seen in pretraining")
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_seen, num_steps, sizes = arguments.num_images, 200, (50_000, 5_000)
    if arguments.quick:
        num_seen, num_steps, sizes = 2_000, 5, (1_000, 200)
    images, labels = load(arguments.data, "train", sizes[0])
    data = {"labelled": (images[: sizes[1]], labels[: sizes[1]]), "test": load(arguments.data, "test", sizes[1])}
    reference = images[: 2 * sizes[1]], labels[: 2 * sizes[1]]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(arguments.seeds):
        for variant, options in VARIANTS.items():
            torch.manual_seed(seed)
            encoder, seconds = pretrain(options, images, num_seen, f"{variant}, seed {seed}")
            knn = knn_accuracy(
                features(encoder, reference[0]), reference[1], features(encoder, data["test"][0]), data["test"][1]
            )
            torch.manual_seed(seed)
            tuned = finetune(encoder, data, num_steps, f"{variant}, seed {seed}: fine-tuning")
            for name, value in {"knn": 100 * knn, "finetuned": 100 * tuned, "ms_per_step": 1000 * seconds}.items():
                found[variant][name].append(value)
            print(
                f"seed {seed} {variant:<14} kNN {knn:.4f}  fine-tuned {tuned:.4f}  {1000 * seconds:.0f} ms per step",
                flush=True,
            )
    means = {}
    for variant, metrics in found.items():
        means[variant] = {name: round(statistics.mean(values), 2) for name, values in metrics.items()}
        spread = {name: f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f}" for name, v in metrics.items()}
        print(f"{variant:<14} {spread}")
    print(json.dumps({**means, "seeds": arguments.seeds, **({"quick": True} if arguments.quick else {})}))


if __name__ == "__main__":
    main()
