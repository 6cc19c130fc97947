"""Probes: the quality of features during training, on a few fixed images, with or without labels."""

import contextlib
import functools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.views import ViewTransform
from hf_vlm.features.accuracy import classify
from hf_vlm.features.extraction import encode, eval_transform_for
from hf_vlm.metrics import alignment, effective_rank, feature_std, mean_cosine, uniformity
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.trainer import VisionTrainer

__all__ = ["Probe", "build_probe", "last_probe"]

logger = logging.getLogger(__name__)

PREFIX = "probe_"
NUM_PROBES = 10  # per run, unless the recipe sets probe_steps
MAX_COST = 1 / 30  # fraction of a run's cost that these may take
SEED = 0  # of the images and their views: the same in all runs, so that runs can be compared
MAX_BATCH = 64  # images encoded at a time


@dataclass(frozen=True)
class ProbeTransform:
    """Two views of each image as in training and, for a labelled image, the plain view."""

    views: ViewTransform
    plain: Transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        transformed = {"views": self.views(example, rng)["pixel_values"]}  # (2, C, H, W)
        return {**transformed, **self.plain(example, rng)} if example.get("label", -1) >= 0 else transformed


class Probe(TrainerCallback):
    """Logs statistics of the encoder's features on fixed images: at the start, every N steps, and at the end.

    `probe_effective_rank`, `probe_feature_std`, `probe_mean_cosine` and `probe_uniformity` use one view of
    each image, `probe_alignment` two; `probe_knn` and `probe_linear` use the plain labelled images, each half
    classified by the other half; `probe_seconds` is the duration. Statistics of features that are not finite are NaN.

    Training continues as if there were no probes: random states, modes and model state are preserved. One process
    encodes and the others wait, except for a sharded encoder, which all ranks must run.

    Args:
        trainer: Trainer whose log receives the metrics.
        images: Stream of images, transformed by a [`ProbeTransform`].
        num_examples: Number of images.
        every: Number of steps between probes.
    """

    def __init__(self, trainer: VisionTrainer, images: ExampleStream, *, num_examples: int, every: int) -> None:
        self.trainer = trainer
        self.images = images
        self.num_examples = num_examples
        self.every = every

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # a resumed run was probed where it stopped
            self._probe(args, state, control, model)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._probe(args, state, control, model)

    def _probe(self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        metrics: dict[str, float] = {}
        with self.trainer.excluded_from_timing(), preserved_randomness(args.device):
            if state.is_world_process_zero or any(isinstance(each, DTensor) for each in model.parameters()):
                metrics = self._measure(args, state, model)
            if args.world_size > 1:  # all ranks must log the same, for they decide by it
                shared = [metrics]
                dist.broadcast_object_list(shared, src=0)
                metrics = shared[0]
        if metrics:
            should_log = control.should_log
            self.trainer.log({PREFIX + name: value for name, value in metrics.items()})
            control.should_log = should_log  # `log` resets it, but the Trainer's own entry is still due

    def _measure(self, args: Any, state: TrainerState, model: nn.Module) -> dict[str, float]:
        started = time.perf_counter()
        is_shown = state.is_world_process_zero and not args.disable_tqdm
        try:
            first, second, plain, labels = self._encode(
                model, min(args.train_batch_size, MAX_BATCH), is_shown=is_shown
            )
            metrics = {**feature_statistics(first, second), **accuracy(plain, labels)}
        except Exception as error:  # a failing probe must not end the training
            logger.warning("Step %d is not probed: %s", state.global_step, error)
            return {}
        return {**metrics, "seconds": round(time.perf_counter() - started, 2)}

    def _encode(self, model: Any, batch_size: int, *, is_shown: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of both views (n, D) each, of the plain images with a label (m, D), and the labels (m,)."""
        features_of = encoding(model)
        first, second, plain, labels = list[Tensor](), list[Tensor](), list[Tensor](), list[int]()
        bar = tqdm(total=self.num_examples, desc="Probing", leave=False, delay=5, disable=not is_shown or None)
        examples = islice(self.images, self.num_examples)
        with bar:
            while batch := list(islice(examples, batch_size)):
                views = torch.stack([example["views"] for example in batch])  # (batch, 2, C, H, W)
                first.append(features_of(views[:, 0]))
                second.append(features_of(views[:, 1]))
                if labelled := [example for example in batch if "label" in example]:
                    plain.append(features_of(torch.stack([example["pixel_values"] for example in labelled])))
                    labels += [example["label"] for example in labelled]
                bar.update(len(batch))
        if not first:
            raise ValueError("none of its images can be read.")
        return torch.cat(first), torch.cat(second), torch.cat(plain) if plain else first[0][:0], torch.tensor(labels)


def encoding(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from images to pooled features of the trained encoder."""
    # A sharded model gathers its weights only for what it knows as a method that runs forward; others need nothing.
    model.encode_for_probe = functools.partial(encode, model.trained_encoder)
    register_fsdp_forward_method(model, "encode_for_probe")
    return model.__dict__.pop("encode_for_probe")  # type: ignore[no-any-return]


def feature_statistics(features: Tensor, others: Tensor) -> dict[str, float]:
    """Label-free statistics of features (n, D) of one view of each image, and their alignment with another view."""
    if not (features.isfinite().all() and others.isfinite().all()):
        names = ("effective_rank", "feature_std", "mean_cosine", "alignment", "uniformity")
        return dict.fromkeys(names, math.nan)
    return {
        "effective_rank": effective_rank(features),
        "feature_std": feature_std(features),
        "mean_cosine": mean_cosine(features),
        "alignment": alignment(features, others),
        "uniformity": uniformity(features),
    }


def accuracy(features: Tensor, labels: Tensor) -> dict[str, float]:
    """kNN and linear accuracy of features (n, D) with labels (n,), each half by the other; empty if too few."""
    halves = [(features[start::2], labels[start::2]) for start in (0, 1)]
    if any(len(half_labels.unique()) < 2 for _, half_labels in halves) or not features.isfinite().all():
        return {}
    there, back = classify(*halves[0], *halves[1]), classify(*halves[1], *halves[0])
    total = len(labels)
    return {name: (there[name] * (total // 2) + back[name] * (total - total // 2)) / total for name in there}


@contextlib.contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Leaves the global random states as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def build_probe(
    trainer: VisionTrainer,
    transform: ViewTransform,
    processor: VLMViTImageProcessor,
    source: Source,
) -> Probe:
    """The probe of a run on `source` with the views of `transform`; ValueError where its data cannot be opened."""
    args = trainer.args
    views = ViewTransform(
        [transform.views[0], transform.views[-1]],
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
    )
    images = ExampleStream(
        open_probe_source(args, source).dataset,
        ProbeTransform(views, eval_transform_for(processor)),
        seed=SEED,
        repeat=False,
        block_size=args.num_probe_examples,
        max_bad_fraction=1.0,  # training checks the data
    )
    return Probe(trainer, images, num_examples=args.num_probe_examples, every=probe_interval(args))


def open_probe_source(args: VisionTrainingArguments, source: Source) -> Source:
    """The images to probe on: `eval_split` of `probe_data`, or else of the data; `train_split` where there is none.

    `source` is that of training, so that its images are not listed a second time.
    """
    data, format = (args.probe_data, None) if args.probe_data else (args.data, args.format)
    try:
        return open_source(
            data,
            args.eval_split,
            format=format,
            num_samples=args.num_eval_examples,
            object_masks=False,
            allow_outside=args.allow_outside,
        )
    except ValueError as error:
        # A copy (one shard of one) with its own position: iterating changes that of a stream.
        if args.probe_data:
            images = open_source(data, args.train_split, allow_outside=args.allow_outside, object_masks=False)
        else:
            images = replace(source, dataset=source.dataset.shard(num_shards=1, index=0))
        logger.info("Probes use images of the split %r: %s", args.train_split, error)
        return images


def probe_interval(args: VisionTrainingArguments) -> int:
    """Steps between probes: `probe_steps` of the recipe, or else ten per run, fewer where they are expensive.

    A probed image is encoded twice, a training image once, with a backward pass of twice the cost: about the same.
    """
    if args.probe_steps:
        return args.probe_steps
    num_images = args.train_batch_size * args.gradient_accumulation_steps  # per step, of this process
    affordable = math.ceil(args.num_probe_examples / num_images / MAX_COST)
    return max(math.ceil(args.max_steps / NUM_PROBES), affordable)


def last_probe(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of the last probe of a run, with its step; empty where there was none."""
    entries = [entry for entry in log_history if PREFIX + "effective_rank" in entry]
    return {name: value for name, value in (entries[-1] if entries else {}).items() if name != "epoch"}
