"""Where the time of a detector's training step goes, how matching scales with the batch, and ours vs transformers'.

    python benchmarks/detector_step.py [--quick] [--device cuda]

Batches of 16 images with 20 boxes each, models untrained. Rows: ViT-S/16 at 224 pixels with the heads of
recipes/detection/vit_small.yaml, and the nano recipe at its 192 x 256 pixels. On a CPU time is the process's CPU time
on one thread; on an accelerator it is wall time, synchronised after each part. Matchers of transformers: DETR's, and
Deformable DETR's, whose focal costs equal ours and whose pairs must equal ours. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import describe
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher

from hf_vlm.features.device import to_best_device
from hf_vlm.models import loss_detection
from hf_vlm.models.loss_detection import DetectionTargets, match, matching_cost
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_model
from hf_vlm.training.recipe import load_recipe, parse_arguments

BATCH_SIZE, NUM_BOXES, NUM_CLASSES = 16, 20, 80
ROWS: dict[str, tuple[str, Any]] = {
    "small": ("detection/vit_small.yaml", 224),
    "nano": ("detection/vit_nano_cpu.yaml", [192, 256]),
}


class Stopwatch:
    """Adds up the time of named parts; a part within a part is counted in both."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return run


class Cut:
    """Times a part of a model and cuts the graph after it, so that its backward can be timed separately.

    The output of a cut is a leaf: `backward` continues from the gradients that arrived there.
    """

    def __init__(self, name: str, function: Callable[..., Any], watch: Stopwatch):
        self.name, self.function, self.watch = name, function, watch
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch(self.name):
            out = self.function(*args, **kwargs)
        self.pairs = []
        return self._cut(out)

    def _cut(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            leaf = out.detach().requires_grad_(out.requires_grad)
            self.pairs.append((out, leaf))
            return leaf
        if isinstance(out, list | tuple):
            return type(out)(self._cut(item) for item in out)
        for name, value in out.items():  # a model output
            out[name] = self._cut(value)
        return out

    def backward(self) -> None:
        reached = [(out, leaf.grad) for out, leaf in self.pairs if leaf.grad is not None]
        with self.watch(self.name):
            torch.autograd.backward(*zip(*reached))
        self.pairs = []


class TimedStep:
    """A training step of a detector, each part timed separately."""

    def __init__(self, model: VLMViTForObjectDetection, watch: Stopwatch):
        self.model, self.watch = model, watch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.cuts = {}
        for name in ("backbone", "neck", "proposal_head", "decoder"):
            part: nn.Module = getattr(model, name)
            self.cuts[name] = Cut(name, part.forward, watch)
            part.forward = self.cuts[name]
        self.loss = model.loss_function
        model.loss_function = self._loss

    def _loss(self, logits: Tensor, boxes: Tensor, dense: tuple[Tensor, Tensor], *rest: Any) -> Any:
        """The loss on detached leaves: the backward of the heads runs later."""
        self.heads = [logits, boxes, *dense]
        self.leaves = [part.detach().requires_grad_() for part in self.heads]
        logits, boxes, *dense_leaves = self.leaves
        with self.watch("loss"):
            loss, parts = self.loss(logits, boxes, tuple(dense_leaves), *rest)
        return loss, parts

    def __call__(self, images: Tensor, labels: list[dict[str, Tensor]]) -> None:
        watch = self.watch
        with watch("step"):
            with watch("forward"):
                loss = self.model(images, labels=labels).loss
            with watch("loss"):
                loss.backward()
            with watch("heads"):
                torch.autograd.backward(self.heads, [leaf.grad for leaf in self.leaves])
            for name in ("decoder", "proposal_head", "neck", "backbone"):
                self.cuts[name].backward()
            with watch("optimiser"):
                self.optimizer.step()
                self.optimizer.zero_grad()


def random_labels(batch_size: int, num_classes: int, device: torch.device) -> list[dict[str, Tensor]]:
    return [
        {
            "class_labels": torch.randint(0, num_classes, (NUM_BOXES,), device=device),
            "boxes": torch.rand(NUM_BOXES, 4, device=device) * 0.4 + 0.2,
        }
        for _ in range(batch_size)
    ]


def build(recipe: str, image_size: Any) -> VLMViTForObjectDetection:
    values = load_recipe(recipe) | {"image_size": image_size, "data": "scenes:easy", "use_cpu": True}
    names = [str(index) for index in range(NUM_CLASSES)]
    return build_model(parse_arguments(values), find_model("detection"), class_names=names)


def time_fractions(name: str, device: torch.device, num_steps: int) -> dict[str, float]:
    """Median fractions of the step's time by part, forward plus backward; the loss includes matching."""
    torch.manual_seed(0)
    recipe, image_size = ROWS[name]
    model = to_best_device(build(recipe, image_size), device).train()  # as the trainer does
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.randn(BATCH_SIZE, 3, height, width, device=device)
    labels = random_labels(BATCH_SIZE, NUM_CLASSES, device)
    watch = Stopwatch(device)
    step = TimedStep(model, watch)
    found: list[dict[str, float]] = []
    originals = loss_detection.match, loss_detection.matching_cost
    loss_detection.match = watch.timed("matching", loss_detection.match)
    loss_detection.matching_cost = watch.timed("matching", loss_detection.matching_cost)
    for _ in tqdm(range(num_steps + 2), desc=name):
        watch.seconds.clear()
        step(images, labels)
        found.append(dict(watch.seconds))
    loss_detection.match, loss_detection.matching_cost = originals
    del found[:2]  # warm-up
    seconds = statistics.median(each["step"] for each in found)
    parts = ("matching", "loss", "backbone", "neck", "proposal_head", "decoder", "heads", "optimiser")
    fractions = {part: statistics.median(each[part] / each["step"] for each in found) for part in parts}
    spread = [each["matching"] / each["step"] for each in found]
    print(
        f"{name:<6} {1e3 * seconds:7.0f} ms per step   matching {100 * fractions['matching']:.2f} % "
        f"({100 * min(spread):.2f} to {100 * max(spread):.2f}), "
        + ", ".join(f"{part} {100 * fraction:.1f} %" for part, fraction in fractions.items() if part != "matching")
    )
    return fractions


def contestants(config: VLMViTDetectionConfig) -> dict[str, Callable[..., Any]]:
    """Matchers of logits (batch, queries, labels), boxes (batch, queries, 4) and labels to (image, query, target)."""
    weights = {"class_cost": config.class_cost, "bbox_cost": config.bbox_cost, "giou_cost": config.giou_cost}

    def ours(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> Any:
        targets = DetectionTargets.from_labels(
            labels, batch_size=len(labels), num_labels=NUM_CLASSES, device=logits.device
        )
        matches = match(matching_cost(logits[None], boxes[None], targets, **weights), targets.counts)
        return matches.image, matches.query, matches.target

    def theirs(matcher: nn.Module) -> Callable[..., Any]:
        return lambda logits, boxes, labels: matcher({"logits": logits, "pred_boxes": boxes}, labels)

    return {
        "ours": ours,
        "detr": theirs(HungarianMatcher(**weights)),
        "deformable": theirs(DeformableDetrHungarianMatcher(**weights)),
    }


def matching(device: torch.device, rounds: int) -> dict[str, float]:
    """Median ratios of matching one stage of 300 queries; contestants and sizes alternate within each round."""
    torch.manual_seed(0)
    config = VLMViTDetectionConfig()
    watch, matchers = Stopwatch(device), contestants(config)
    stages = {}
    for factor in (1, 2, 4):
        shape = (factor * BATCH_SIZE, config.num_queries)
        boxes = torch.rand(*shape, 4, device=device) * 0.4 + 0.2
        labels = random_labels(factor * BATCH_SIZE, NUM_CLASSES, device)
        stages[factor] = torch.randn(*shape, NUM_CLASSES, device=device), boxes, labels
    found: list[dict[str, float]] = []
    for _ in tqdm(range(rounds + 1), desc="matching"):
        watch.seconds.clear()
        for factor, stage in stages.items():
            pairs = {}
            for name, matcher in matchers.items():
                with watch(f"{name} {factor}"):
                    pairs[name] = matcher(*stage)
            ours = set(zip(*(part.tolist() for part in pairs["ours"])))
            assert ours == {
                (image, query, target)
                for image, (queries, targets) in enumerate(pairs["deformable"])
                for query, target in zip(queries.tolist(), targets.tolist())
            }
        found.append(dict(watch.seconds))
    del found[0]
    for name in found[0]:
        print(f"matching {name:<13} {1e3 * statistics.median(each[name] for each in found):8.2f} ms")
    return {
        "matching_vs_transformers": ratio(found, "detr 1", "ours 1"),
        "matching_vs_transformers_focal": ratio(found, "deformable 1", "ours 1"),
        "matching_vs_transformers_4x": ratio(found, "detr 4", "ours 4"),
        "matching_2x_over_1x": ratio(found, "ours 2", "ours 1"),
        "matching_4x_over_1x": ratio(found, "ours 4", "ours 1"),
    }


def ratio(found: list[dict[str, float]], over: str, under: str) -> float:
    ratios = [each[over] / each[under] for each in found]
    print(f"{over} / {under}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)


def main() -> None:
    """Prints one line per row and the JSON line."""
    parser = argparse.ArgumentParser(description="Parts of a detector's training step.")
    parser.add_argument("--quick", action="store_true", help="few steps: not a result to quote")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    print(describe(device))
    num_steps, rounds = (3, 5) if arguments.quick else (12, 20)
    fractions = {name: time_fractions(name, device, num_steps) for name in ROWS}
    results = {
        "matching_fraction": max(row["matching"] for row in fractions.values()),
        **{f"matching_fraction_{name}": row["matching"] for name, row in fractions.items()},
        **matching(device, rounds),
    }
    rounded = {name: round(value, 4) for name, value in results.items()}
    print(json.dumps(rounded | {"device": str(device)} | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
