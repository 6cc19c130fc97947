"""Where models run, and how matrices are multiplied there."""

import functools
import time
from typing import Any, TypeVar

import torch
from transformers.modeling_utils import PreTrainedModel

__all__ = ["allow_fast_matmul", "place", "suit_cpu"]

Model = TypeVar("Model", bound=PreTrainedModel)

MAX_ERROR = 2e-6  # relative to the result: float32 gives 2e-7, bfloat16 3e-3
MIN_GAIN = 1.2  # as many times faster must the other kernels be


def place(model: Model, device: str | torch.device | None = None) -> Model:
    """Move a model to a device, by default the accelerator where there is one, with the kernels that suit it there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model.to(torch.device(device or accelerator or "cpu"))
    if model.device.type == "cpu":
        suit_cpu(model)
    return model


def suit_cpu(model: PreTrainedModel) -> None:
    """Choose the fastest exact kernels for a model on the CPU.

    The fused attention does not go with the fast products (it would call them for each head of each image), so it is
    left for plain attention.
    """
    if allow_fast_matmul() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


@functools.cache
def allow_fast_matmul() -> bool:
    """Multiply float32 matrices on the CPU by oneDNN where that is exact and faster; returns whether it is so.

    torch takes MKL, which runs at half speed on AMD's processors, unless it may round to bfloat16. Where there are no
    AMX units nothing is rounded even so, and oneDNN's float32 kernels come in: 2.2 times as fast. Both are tried here
    on a small product, once a process, and the setting is left as it was where it rounds or gains nothing.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    usual = _seconds(left, right)
    setting.fp32_precision = "bf16"
    error = ((left @ right).double() - exact).norm() / exact.norm()
    if error <= MAX_ERROR and _seconds(left, right) * MIN_GAIN <= usual:
        return True
    setting.fp32_precision = before
    return False


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Time of a product: the least of a few, the first of which make the kernel."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return min(times)
