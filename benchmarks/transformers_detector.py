"""transformers' D-FINE from random weights, in as many seconds as our detector takes: an arm of `label_efficiency.py`.

    python benchmarks/transformers_detector.py detection/vit_nano_cpu.yaml --data D --output_dir runs/dfine [--key ...]

The words are those of `hf-vlm finetune`, whose run it is compared with. Steps of both are timed alternately on one
core, with reading and augmenting their images, and D-FINE is trained for as many steps as fit into the seconds of
ours. What both share: images, their order, augmentation, number of queries, warm-up and cosine. What is D-FINE's own:
architecture, denoising queries, loss, image processor (no normalisation), and the official settings of D-FINE-N
(https://github.com/Peterande/D-FINE, configs/dfine/dfine_hgnetv2_n_coco.yml), but for:

- a third level of features, of stride 8 as in D-FINE-S: images are a third to a sixth of 640 pixels wide;
- as many queries as ours has rather than 300, which is faster;
- batches of 8, as steps are what it has few of, and learning rates by the square root of that (8e-4 at 128);
- no moving average of the weights: at its official warm-up it would be over the last few of these steps.

`output_dir` holds the model, and `run.json` with the metrics on `eval_split`, the seconds and the images seen.
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from detection_arm import Arm, open_arm
from machine import set_products
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    RTDetrImageProcessorPil,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.features.device import to_best_device
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_model
from hf_vlm.training.data import train_stream

LEARNING_RATE, BACKBONE_RATE, OFFICIAL_BATCH_SIZE = 8e-4, 0.5, 128
BATCH_SIZE = 8
WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.1
NUM_TIMED = 4  # steps of each that are timed, after one to warm up


def hgnet_b0(out_features: list[str]) -> HGNetV2Config:
    """The backbone of D-FINE-N."""
    channels = [64, 256, 512, 1024]
    return HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, *channels[:-1]],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=channels,
        hidden_sizes=channels,
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        out_features=out_features,
    )


def dfine_config(num_queries: int, class_names: list[str]) -> DFineConfig:
    """D-FINE-N, with features of strides 8, 16 and 32."""
    backbone = hgnet_b0(["stage2", "stage3", "stage4"])
    return DFineConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=backbone.stage_out_channels[1:],
        feat_strides=[8, 16, 32],
        encode_proj_layers=[2],
        encoder_hidden_dim=128,
        encoder_ffn_dim=512,
        hidden_expansion=0.34,
        depth_mult=0.5,
        d_model=128,
        decoder_in_channels=[128, 128, 128],
        decoder_ffn_dim=512,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        num_queries=num_queries,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
    )


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Parameters by rate and weight decay, as in the official recipe: none for norms and biases."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(("backbone" in name, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate * (BACKBONE_RATE if of_backbone else 1.0),
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
        }
        for (of_backbone, decays), parameters in groups.items()
    ]


def transform_like(processor: RTDetrImageProcessorPil, arm: Arm, *, train: bool) -> DetectionTransform:
    """The transform that augments as ours does, and gives the pixels that the image processor would give."""
    assert (processor.do_rescale, processor.do_normalize) == (True, False)
    return DetectionTransform.from_dict(
        arm.args.augmentation,
        size=arm.args.image_hw,
        train=train,
        image_mean=0.0,
        image_std=1.0,
        num_classes=len(arm.class_names),
    )


def batches(arm: Arm, transform: DetectionTransform, size: int) -> Iterator[dict[str, Any]]:
    stream = train_stream(arm.args, arm.source, transform)
    return iter(DataLoader(stream, size, collate_fn=collate_detection))


class Learner:
    """A model, its optimiser and its batches."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, stream: Iterator[dict[str, Any]]):
        self.model, self.optimizer, self.stream = model.train(), optimizer, stream

    def step(self) -> float:
        """Trains on a batch; returns the processor time, in seconds, with that of reading and augmenting it."""
        started = time.process_time()
        self.model(**next(self.stream)).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def relative_cost(arm: Arm, transform: DetectionTransform) -> float:
    """Processor time of a step of D-FINE relative to one of ours."""
    ours = to_best_device(build_model(arm.args, find_model(arm.args.method), class_names=arm.class_names))
    theirs = DFineForObjectDetection(dfine_config(ours.config.num_queries, arm.class_names))
    sizes = arm.args.per_device_train_batch_size, BATCH_SIZE
    learners = [
        Learner(model, torch.optim.AdamW(model.parameters(), fused=True), batches(arm, transform, size))
        for model, size in zip((ours, theirs), sizes)
    ]
    seconds = [[learner.step() for learner in learners] for _ in range(NUM_TIMED + 1)][1:]
    return statistics.median(theirs / ours for ours, theirs in seconds)


def train(arm: Arm, transform: DetectionTransform, num_steps: int) -> DFineForObjectDetection:
    """D-FINE, trained from random weights."""
    set_seed(arm.args.seed)
    model = DFineForObjectDetection(dfine_config(arm.args.model_config["num_queries"], arm.class_names))
    rate = LEARNING_RATE * math.sqrt(BATCH_SIZE / OFFICIAL_BATCH_SIZE)
    optimizer = torch.optim.AdamW(parameter_groups(model, rate), fused=True)
    learner = Learner(model, optimizer, batches(arm, transform, BATCH_SIZE))
    schedule = get_cosine_schedule_with_warmup(learner.optimizer, math.ceil(0.05 * num_steps), num_steps)
    for step in range(num_steps):
        learner.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {num_steps}", flush=True)
    return model.eval()


def main() -> None:
    """Trains, evaluates and saves."""
    arm = open_arm(sys.argv[1:])
    args = arm.args
    set_products(as_trained=True)
    height, width = args.image_hw
    processor = RTDetrImageProcessorPil(size={"height": height, "width": width})
    augment = transform_like(processor, arm, train=True)
    cost = relative_cost(arm, augment)
    num_steps = max(1, round(args.max_steps / cost))
    started = time.perf_counter()
    model = train(arm, augment, num_steps)
    seconds = time.perf_counter() - started
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    arm.finish(
        model,
        processor,
        transform_like(processor, arm, train=False),
        num_steps=num_steps,
        num_images_seen=num_steps * BATCH_SIZE,
        seconds=round(seconds, 1),
        relative_cost=round(cost, 2),
    )


if __name__ == "__main__":
    main()
