"""What a training step costs, found by a step on tensors without values: parameters, FLOPs and memory.

Nothing is allocated, so that a laptop can examine a model of any size: its layers are built on the meta device, and
forward and backward run under torch's `FakeTensorMode`, which knows shapes alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.training.meters import FlopCounter

__all__ = ["StepCost", "fake_model", "step_cost"]

CPU = torch.device("cpu")  # has a kernel for every operation; none runs
BATCHES = (2, 4)  # sizes of the batches that are tried: what differs is of the images, the rest is of the step


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of a step, before it is divided among ranks; memory in bytes.

    Attributes:
        num_parameters: Number of all weights, those of a teacher too.
        num_trained: Number of those that are trained.
        num_layer_parameters: Number of weights of the largest layer that repeats.
        flops_per_image: FLOPs of forward and backward, two per multiply-add, of an image with all its views.
        activations_per_image: What is kept of an image for the backward pass.
        checkpointed_per_image: The same with activation checkpointing: what enters each layer, and one whole layer.
        copies: What is kept for the backward pass whatever the number of images: weights in another precision.
    """

    num_parameters: int
    num_trained: int
    num_layer_parameters: int
    flops_per_image: float
    activations_per_image: float
    checkpointed_per_image: float
    copies: float


@dataclass
class SavedTensors:
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Attributes:
        known: Storages that are counted elsewhere: those of the weights. Kept alive, or their addresses would be given
            to others.
    """

    known: dict[int, Any]
    total: int = 0
    in_layers: int = 0
    into_layers: int = 0
    largest_layer: int = 0
    depth: int = 0
    before: int = field(default=0, init=False)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage
            self.total += storage.nbytes()
            self.in_layers += storage.nbytes() if self.depth else 0
        return tensor

    def enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.depth, self.before = self.depth + 1, self.in_layers
        if torch.is_grad_enabled():
            storages = [value.untyped_storage() for value in inputs if isinstance(value, Tensor)]
            self.into_layers += sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def leave(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.depth -= 1
        self.largest_layer = max(self.largest_layer, self.in_layers - self.before)

    @property
    def checkpointed(self) -> int:
        """Bytes that would be kept if the layers were run again in the backward pass."""
        return self.total - self.in_layers + self.into_layers + self.largest_layer

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        layers = repeated_layers(model)
        hooks = [layer.register_forward_pre_hook(self.enter) for layer in layers]
        hooks += [layer.register_forward_hook(self.leave) for layer in layers]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that activation checkpointing runs again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def fake_model(model_class: type[PreTrainedModel], config: Any, mode: FakeTensorMode) -> PreTrainedModel:
    """A model in training mode whose weights have shapes and no values."""
    with torch.device("meta"):
        model = model_class(config)
    known: dict[int, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = FakeTensor(mode, tensor.detach(), CPU)
        return known[id(tensor)]

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(fake(weight), requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model.train()


def step_cost(
    model_class: type[PreTrainedModel], config: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> StepCost:
    """The cost of a step of a pretraining method.

    Args:
        model_class: Model whose `forward` returns a loss.
        config: Its configuration.
        shapes: Shape of each argument of `forward` without the axis of the batch.
        dtype: Type of the products: float32, or a narrower one by autocast.

    Raises:
        ValueError: The step depends on values, not on shapes alone, or its FLOPs cannot be counted.
    """
    mode = FakeTensorMode()
    model = fake_model(model_class, config, mode)
    found = [_run(model, shapes, num_images, mode, dtype) for num_images in BATCHES]
    (fewer_flops, fewer), (more_flops, more) = found
    added = BATCHES[1] - BATCHES[0]
    per_image = (more.total - fewer.total) / added
    layers = repeated_layers(model)
    return StepCost(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_layer_parameters=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        flops_per_image=(more_flops - fewer_flops) / added,
        activations_per_image=per_image,
        checkpointed_per_image=(more.checkpointed - fewer.checkpointed) / added,
        copies=max(0.0, fewer.total - per_image * BATCHES[0]),
    )


def _run(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    num_images: int,
    mode: FakeTensorMode,
    dtype: torch.dtype,
) -> tuple[int, SavedTensors]:
    """FLOPs and saved tensors of a step on a batch."""
    saved = SavedTensors({weight.untyped_storage()._cdata: weight for weight in model.parameters()})
    counter = FlopCounter()
    torch.manual_seed(0)  # masks of sampled sizes are the same in each batch
    with mode:
        dtypes = {"input_ids": torch.int64}
        batch = {name: torch.empty(num_images, *shape, dtype=dtypes.get(name)) for name, shape in shapes.items()}
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        try:
            with counter, saved.watching(model), autocast:
                model(**batch).loss.backward()
        except Exception as error:  # whatever an operation says that needs values
            raise ValueError(
                f"A step of {type(model).__name__} cannot be planned without values: {error!r}"
            ) from error
    model.zero_grad()
    if counter.problem:
        raise ValueError(f"A step of {type(model).__name__} cannot be planned: {counter.problem}")
    return counter.get_total_flops(), saved
