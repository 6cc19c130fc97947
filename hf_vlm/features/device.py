"""Where models run, and how matrices are multiplied there."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

__all__ = ["enable_fast_matmul", "to_best_device", "use_fast_cpu_matmul"]

Model = TypeVar("Model", bound=PreTrainedModel)

MAX_ERROR = 2e-6  # relative to the result: float32 gives 2e-7, bfloat16 3e-3
MIN_GAIN = 1.2  # speed-up that the other kernels must reach
ATTENTION = "sdpa_ieee_matmul"

_setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def to_best_device(model: Model, device: str | torch.device | None = None) -> Model:
    """Move a model to a device, by default the accelerator where there is one, with its fastest exact kernels."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model.to(torch.device(device or accelerator or "cpu"))
    if model.device.type == "cpu":
        use_fast_cpu_matmul(model)
    return model


def use_fast_cpu_matmul(model: PreTrainedModel) -> None:
    """Let a model on the CPU multiply by the fastest exact kernels."""
    if enable_fast_matmul() and model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)  # without it, models of text would see padding
        model.set_attn_implementation(ATTENTION)


@functools.cache
def enable_fast_matmul() -> bool:
    """Multiply float32 matrices on the CPU by oneDNN where that is exact and faster; returns whether it does.

    torch uses MKL, which runs at half speed on AMD's processors, unless it may round to bfloat16. Without AMX units
    nothing is rounded even then, and oneDNN's float32 kernels run: 2.2 times as fast. Both are tried on a small
    product, once per process, and the setting is restored where it rounds or gains nothing.
    """
    before = _setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    default_seconds = _seconds(left, right)
    _setting.fp32_precision = "bf16"
    error = ((left @ right).double() - exact).norm() / exact.norm()
    if error <= MAX_ERROR and _seconds(left, right) * MIN_GAIN < default_seconds:
        return True
    _setting.fp32_precision = before
    return False


def _seconds(left: Tensor, right: Tensor) -> float:
    """Time of a product: the shortest of a few, the first of which build the kernel.

    It is that of this thread on the processor: beside other work, a clock would choose by chance.
    """
    times = []
    for _ in range(5):
        started = time.thread_time()
        left @ right
        times.append(time.thread_time() - started)
    return min(times)


@contextlib.contextmanager
def _ieee_matmul() -> Iterator[None]:
    before = _setting.fp32_precision
    _setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        _setting.fp32_precision = before


class _FusedAttention(torch.autograd.Function):
    """Fused attention with the default (IEEE) kernels, forward and backward.

    It multiplies small tiles, for each of which oneDNN would be called again: that is eight times as slow.
    """

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., tuple[Tensor, None]], *inputs: Tensor | None) -> Tensor:
        with torch.enable_grad(), _ieee_matmul():
            ctx.inputs = [
                None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs
            ]
            ctx.output, _ = attend(*ctx.inputs)
        return ctx.output.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        is_wanted = [tensor is not None and tensor.requires_grad for tensor in ctx.inputs]
        with _ieee_matmul():
            gradients = iter(
                torch.autograd.grad(ctx.output, list(itertools.compress(ctx.inputs, is_wanted)), gradient)
            )
        return None, *(next(gradients) if wanted else None for wanted in is_wanted)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers computes for "sdpa": causal where the module is, with masks and their gradients."""
    attend = functools.partial(sdpa_attention_forward, module, **options)
    return _FusedAttention.apply(attend, query, key, value, mask), None
