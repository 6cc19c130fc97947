"""Whether continued pretraining keeps the features of an encoder that is good already: kNN before, during and after.

    python benchmarks/continued_pretraining.py [--data CIFAR10] [--start simclr] [--num_steps 1000] [--patch_size 4]

An encoder is trained by SimCLR or on the labels, saved in the layout of transformers' DINOv2, converted back as by
`hf-vlm convert`, and pretrained further without labels on the same images. Variants: `continued` first trains the
heads alone, then the encoder too, at a low rate that falls with depth and with rising weight decay; `plain` is the
recipe for a random encoder. Accuracies are those of kNN on the mean patch token, in percent. The last line of stdout
is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mae_quality import BATCH_SIZE, SIDE, augment, features, load, train
from torch import Tensor

from hf_vlm import VLMViTConfig, VLMViTImageProcessor, VLMViTModel
from hf_vlm.features.loading import quiet_transformers
from hf_vlm.metrics import knn_accuracy
from hf_vlm.models.convert_vlm_vit import convert_checkpoint
from hf_vlm.training.run import pretrain, quiet_libraries

Labelled = tuple[Tensor, Tensor]

VARIANTS: dict[str, dict[str, Any]] = {
    "continued": {
        "frozen_encoder_steps": 0.1,
        "layer_decay": 0.75,
        "encoder_lr_multiplier": 0.13,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
    },
    "plain": {"weight_decay": 0.05},
}
RECIPE: dict[str, Any] = {  # SimCLR's, its learning rate scaled by the square root of the batch size
    "method": "simclr",
    "encoder_preset": "nano",
    "model_config": {"projection_hidden_size": 512},
    "image_size": SIDE,
    "views": {"blur_probability": 0.0},  # of little use on images this small
    "learning_rate": 5e-4 * (BATCH_SIZE / 256) ** 0.5,
    "adam_beta2": 0.95,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 3.0,
    "per_device_train_batch_size": BATCH_SIZE,
    "logging_steps": 50,
    "save_strategy": "steps",
    "seed": 0,
}


def train_on_labels(labelled: Labelled, num_steps: int, patch_size: int, folder: Path) -> None:
    """Trains an encoder to classify images by its class token and mean patch token, and saves it."""
    images, labels = labelled
    encoder = VLMViTModel(
        VLMViTConfig.from_preset("nano", image_size=SIDE, patch_size=patch_size, layerscale_value=1.0)
    )
    head = torch.nn.Linear(2 * encoder.config.hidden_size, int(labels.max()) + 1)
    encoder.train()

    def loss() -> Tensor:
        chosen = torch.randint(0, len(images), (BATCH_SIZE,))
        tokens = encoder(augment(images[chosen])).last_hidden_state
        return F.cross_entropy(head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)), labels[chosen])

    train([encoder, head], loss, num_steps, 1e-3, "Training on labels")
    encoder.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    VLMViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)


def first_encoder(
    arguments: argparse.Namespace, recipe: dict[str, Any], labelled: Labelled, num_steps: int, folder: Path
) -> Path:
    """Trains the initial encoder, saves it in DINOv2's layout, and returns the folder of the one converted back."""
    first, patch_size = folder / "first", arguments.patch_size
    if arguments.start == "labels":
        train_on_labels(labelled, num_steps, patch_size, first)
    else:
        own = {"data": arguments.data, "output_dir": str(first), "max_steps": num_steps, "save_strategy": "no"}
        pretrain(recipe | own | {"encoder_config": {"patch_size": patch_size, "layerscale_value": 1.0}})
    convert_checkpoint(str(first), folder / "dinov2", to="dinov2")
    convert_checkpoint(str(folder / "dinov2"), folder / "encoder")
    return folder / "encoder"


def knn(folder: Path, reference: Labelled, test: Labelled) -> float:
    """kNN accuracy of the encoder in a folder, in percent; the folder may be a pretraining checkpoint."""
    with quiet_transformers():  # they report the heads of a checkpoint as unexpected
        encoder = VLMViTModel.from_pretrained(folder)
    accuracy = knn_accuracy(features(encoder, reference[0]), reference[1], features(encoder, test[0]), test[1])
    return round(100 * accuracy, 2)


def main() -> None:
    """Prints each kNN accuracy when it is computed, then JSON."""
    parser = argparse.ArgumentParser(description="kNN accuracy before, during and after continued pretraining.")
    parser.add_argument("--data", default="scenes:easy", help="labelled images with the splits train and test")
    parser.add_argument("--num_steps", type=int, default=1000, help="steps of continued pretraining")
    parser.add_argument("--every", type=int, default=200, help="steps between two measurements")
    parser.add_argument(
        "--start", default="simclr", choices=["simclr", "labels"], help="what trains the first encoder"
    )
    parser.add_argument("--num_start_steps", type=int, default=1000, help="steps that train the first encoder")
    parser.add_argument("--num_images", type=int, default=10_000, help="labelled images, the reference set of kNN")
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--quick", action="store_true", help="hardly trained: not a result to quote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    num_steps, every, num_start_steps = arguments.num_steps, arguments.every, arguments.num_start_steps
    num_images, changes = arguments.num_images, {}
    if arguments.quick:
        num_steps, every, num_start_steps, num_images = 20, 10, 30, 1_000
        changes = {"per_device_train_batch_size": 32}
    torch.manual_seed(0)
    labelled = load(arguments.data, "train", num_images)
    test = load(arguments.data, "test", num_images // 2)
    with tempfile.TemporaryDirectory() as temporary:
        encoder = first_encoder(arguments, RECIPE | changes, labelled, num_start_steps, Path(temporary))
        before = knn(encoder, labelled, test)
        print(f"start      kNN {before:.2f}", flush=True)
        results: dict[str, Any] = {"start": before, "steps": list(range(every, num_steps + 1, every))}
        for variant in arguments.variants:
            folder = Path(temporary) / variant
            recipe = RECIPE | changes | VARIANTS[variant]
            recipe |= {"encoder": str(encoder), "encoder_preset": None}
            recipe |= {"data": arguments.data, "output_dir": str(folder), "max_steps": num_steps, "save_steps": every}
            pretrain(recipe)
            results[variant] = []
            for step in results["steps"]:
                results[variant].append(knn(folder / f"checkpoint-{step}", labelled, test))
                print(f"{variant:<10} step {step:<6} kNN {results[variant][-1]:.2f}", flush=True)
    print(json.dumps(results | {"data": arguments.data} | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
