"""What a training step costs, found by a step on tensors without values: parameters, FLOPs and memory.

Nothing is allocated, so that a laptop can examine a model of any size: its layers are built on the meta device, and
forward and backward run under torch's `FakeTensorMode`, which knows shapes alone.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.models.expert_layers import VLMViTExperts, num_inactive_parameters
from hf_vlm.training.meters import FlopCounter

__all__ = ["ExpertCost", "StepCost", "fake_model", "step_cost"]

CPU = torch.device("cpu")  # has a kernel for every operation; none runs
BATCHES = (2, 4)  # sizes of the batches that are tried: what differs is of the images, the rest is of the step


@dataclass(frozen=True, kw_only=True)
class ExpertCost:
    """What of a step's cost is that of sparse experts.

    Attributes:
        num_experts: Number of experts of a layer.
        num_parameters: Number of their weights, of all layers, those of a teacher too.
        num_trained: Number of those that are trained.
        num_layer_parameters: Number of those of the layer that has most.
        routed_per_image: Numbers that an image's tokens bring to experts and back, in the forward and backward pass.
    """

    num_experts: int
    num_parameters: int
    num_trained: int
    num_layer_parameters: int
    routed_per_image: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of a step, before it is divided among ranks; memory in bytes.

    Attributes:
        num_parameters: Number of all weights, those of a teacher too.
        num_trained: Number of those that are trained.
        num_active: Number of those that a token passes: without the experts that are not chosen for it.
        num_layer_parameters: Number of weights of the largest layer that repeats.
        flops_per_image: FLOPs of forward and backward, two per multiply-add, of an image with all its views.
        activations_per_image: What is kept of an image for the backward pass.
        checkpointed_per_image: The same with activation checkpointing: what enters each layer, and one whole layer.
        copies: What is kept for the backward pass whatever the number of images: weights in another precision.
        moments: The moments of a step that may be its fullest: bytes of the gradients of weights, which grow in the
            backward pass, and all bytes of an image, which shrink.
        experts: What of it is that of experts; None for a dense encoder.
        optimizer_width: Bytes of the optimiser's state per trained weight: of AdamW two averages in float32.
    """

    num_parameters: int
    num_trained: int
    num_active: int
    num_layer_parameters: int
    flops_per_image: float
    activations_per_image: float
    checkpointed_per_image: float
    copies: float
    moments: tuple[tuple[float, float], ...]
    experts: ExpertCost | None = None
    optimizer_width: float = 8.0

    def without(self, experts: ExpertCost) -> "StepCost":
        """The same step but for the weights of its experts."""
        return replace(
            self,
            num_parameters=self.num_parameters - experts.num_parameters,
            num_trained=self.num_trained - experts.num_trained,
            num_layer_parameters=self.num_layer_parameters - experts.num_layer_parameters,
            experts=None,
        )


@dataclass
class SavedTensors:
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Attributes:
        known: Addresses of the storages that are not to be counted, at first those of the weights.
    """

    known: set[int]
    total: int = 0
    in_layers: int = 0
    into_layers: int = 0
    largest_layer: int = 0
    depth: int = 0
    before: int = field(default=0, init=False)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.known.discard, storage._cdata)  # another may get the address
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


class LiveTensors(TorchDispatchMode):
    """Notes when each storage is allocated and freed, within the context and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.changes: list[tuple[int, bool]] = []  # number of a storage, whether it is allocated or freed
        self._alive: dict[int, int] = {}  # number of each storage by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = len(self.sizes)
            self.changes.append((len(self.sizes), True))
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        self.changes.append((self._alive.pop(address), False))

    def timeline(self, kept: Collection[Tensor]) -> list[tuple[int, int]]:
        """Bytes that are there after each change: of tensors that are kept at the end, and of all others."""
        numbers = {self._alive.get(tensor.untyped_storage()._cdata) for tensor in kept}
        found, sums = [], [0, 0]
        for number, is_allocated in self.changes:
            sums[number not in numbers] += self.sizes[number] if is_allocated else -self.sizes[number]
            found.append((sums[0], sums[1]))
        return found


def fullest_moments(fewer: list[tuple[int, int]], more: list[tuple[int, int]]) -> tuple[tuple[float, float], ...]:
    """The moments of a step, by timelines of two batches of `BATCHES` images, that are not below another in both."""
    per_image = [(b[1] - a[1]) / (BATCHES[1] - BATCHES[0]) for a, b in zip(fewer, more, strict=True)]
    moments: list[tuple[float, float]] = []
    for (gradients, _), size in sorted(zip(more, per_image), key=lambda moment: (-moment[1], -moment[0][0])):
        if not moments or gradients > moments[-1][0]:
            moments.append((gradients, size))
    return tuple(moments)


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


class GroupedProducts(TorchDispatchMode):
    """Products of experts, which torch gives shapes in bfloat16 alone."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.ops.aten._grouped_mm.default:
            return function(*args, **(kwargs or {}))
        operands = [*args, *(kwargs or {}).values()]
        first, second, offsets = operands
        groups = offsets.shape if first.ndim == second.ndim == 2 else ()
        return first.new_empty(*groups, first.shape[-2], second.shape[-1])


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
    (fewer_flops, fewer, fewer_timeline, fewer_routed), (more_flops, more, more_timeline, more_routed) = found
    added = BATCHES[1] - BATCHES[0]
    per_image = (more.total - fewer.total) / added
    layers = repeated_layers(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    return StepCost(
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_active=num_parameters - num_inactive_parameters(model),
        num_layer_parameters=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        flops_per_image=(more_flops - fewer_flops) / added,
        activations_per_image=per_image,
        checkpointed_per_image=(more.checkpointed - fewer.checkpointed) / added,
        copies=max(0.0, fewer.total - per_image * BATCHES[0]),
        moments=fullest_moments(fewer_timeline, more_timeline),
        experts=_expert_cost(model, (more_routed - fewer_routed) / added),
    )


def _expert_cost(model: nn.Module, routed_per_image: float) -> ExpertCost | None:
    layers = [module for module in model.modules() if isinstance(module, VLMViTExperts)]
    if not layers:
        return None
    sizes = [[weight.numel() for weight in layer.parameters()] for layer in layers]
    return ExpertCost(
        num_experts=layers[0].num_experts,
        num_parameters=sum(map(sum, sizes)),
        num_trained=sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.requires_grad),
        num_layer_parameters=max(map(sum, sizes)),
        routed_per_image=routed_per_image,
    )


@contextlib.contextmanager
def _count_routed(model: nn.Module) -> Iterator[list[int]]:
    """A list that receives, of each call of experts, how many numbers go to them and come back.

    A token goes once to each of its experts, and its output comes back; in the backward pass gradients do the same.
    """
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, index, _ = inputs
        counts.append((4 if torch.is_grad_enabled() else 2) * index.numel() * tokens.shape[-1])

    hooks = [
        module.register_forward_pre_hook(count) for module in model.modules() if isinstance(module, VLMViTExperts)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _run(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    num_images: int,
    mode: FakeTensorMode,
    dtype: torch.dtype,
) -> tuple[int, SavedTensors, list[tuple[int, int]], int]:
    """FLOPs and saved tensors of a step on a batch, its timeline of gradients and all else beside the weights, and how
    many numbers go to experts and back.
    """
    saved = SavedTensors({weight.untyped_storage()._cdata for weight in model.parameters()})
    counter, live = FlopCounter(), LiveTensors()
    torch.manual_seed(0)  # masks of sampled sizes are the same in each batch
    dtypes = {"input_ids": torch.int64}
    with mode, GroupedProducts():
        with live:
            batch = {name: torch.empty(num_images, *shape, dtype=dtypes.get(name)) for name, shape in shapes.items()}
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        try:
            with counter, live, saved.watching(model), _count_routed(model) as routed, autocast:
                model(**batch).loss.backward()
        except Exception as error:  # whatever an operation says that needs values
            raise ValueError(
                f"A step of {type(model).__name__} cannot be planned without values: {error!r}"
            ) from error
    timeline = live.timeline([weight.grad for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    if counter.problem:
        raise ValueError(f"A step of {type(model).__name__} cannot be planned: {counter.problem}")
    return counter.get_total_flops(), saved, timeline, sum(routed)
