"""What a benchmark ran on: the processor, and the matrix products that training takes there."""

import platform
import re
from pathlib import Path

import torch

from hf_vlm.features.device import enable_fast_matmul

DEFAULT_PRODUCTS: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def processor(device: torch.device) -> str:
    """Name of the accelerator, or of the CPU as the system gives it, with its generation and vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    given = dict(re.findall(r"^(.+?)\s*: (.+)$", info.read_text(), re.MULTILINE)) if info.is_file() else {}
    if "model name" not in given:
        return platform.processor() or platform.machine()
    generation = f"family {given.get('cpu family')}, model {given.get('model')}"
    return f"{given['model name']} ({generation}, {torch.backends.cpu.get_cpu_capability()})"


def has_fast_products(device: torch.device) -> bool:
    """Whether training changes the matrix products: by its own trial, on the CPU alone."""
    return device.type == "cpu" and enable_fast_matmul()


def set_products(*, as_trained: bool) -> None:
    """Multiply matrices on the CPU by torch's default kernels, or by those that the trial of training has chosen."""
    products = "bf16" if as_trained and enable_fast_matmul() else DEFAULT_PRODUCTS
    torch.backends.mkldnn.matmul.fp32_precision = products  # type: ignore[attr-defined]


def describe(device: torch.device) -> str:
    """One line for the output."""
    if device.type != "cpu":
        return processor(device)
    return f"{processor(device)}; training multiplies by " + (
        "oneDNN, which its trial found faster and exact" if has_fast_products(device) else "torch's default kernels"
    )
