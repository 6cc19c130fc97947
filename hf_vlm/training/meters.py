"""Training throughput: images per second, waiting for data, model FLOPs utilisation (MFU) and peak memory."""

import contextlib
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_vlm.training.arguments import VisionTrainingArguments

logger = logging.getLogger(__name__)

MAX_DATA_WAIT_FRACTION = 0.2  # fraction of the time above which waiting for data is worth a warning

# Dense matrix TFLOP/s of accelerators by the precision of the products, at boost clock, from the makers' data sheets.
# Where a sheet gives the rate with 2:4 sparsity, this is half of it. More special names come first.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},  # NVIDIA A100 data sheet
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},  # NVIDIA H100 PCIe product brief
    "H100 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},  # NVIDIA H100 data sheet
    "H100": {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67},  # SXM; NVIDIA H100 data sheet
    "H200 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},  # NVIDIA H200 data sheet
    "H200": {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67},  # SXM; NVIDIA H200 data sheet
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},  # NVIDIA HGX B200 data sheet, an eighth of it
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},  # NVIDIA L4 data sheet
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},  # NVIDIA L40S data sheet
    "A10G": {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 35},  # NVIDIA A10G data sheet (AWS G5)
    "T4": {"fp16": 65, "fp32": 8.1},  # NVIDIA T4 data sheet
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},  # NVIDIA Ada white paper, fp32 sums
    "MI300X": {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4},  # AMD Instinct MI300X data sheet
}
UNLISTED_CHIPS = re.compile(r"\b(MIG|Laptop|4090 D)\b")  # have the name of a listed accelerator, but not its rate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}

# Operations of these name spaces either have a formula or multiply no matrices.
KNOWN_NAMESPACES = ("aten", "prim", "c10d", "_c10d_functional", "fsdp", "profiler")


class ThroughputMeter:
    """Speed and memory of a training log entry: `images_per_second`, `data_wait`, `mfu`, `peak_memory_gib`.

    `mfu` is model FLOPs / (time x peak FLOP/s of the device), on this rank. Model FLOPs are those of the matrix
    products, convolutions and attention of forward and backward, two per multiply-add. Element-wise work, the
    optimiser and recomputation (activation checkpointing, fused attention's backward) do not count. They are counted
    once, before the first training step, which is never part of a timed interval.

    Attributes:
        num_flops: Number of FLOPs of forward and backward of a batch on this rank; 0 where unknown.
    """

    def __init__(self, args: VisionTrainingArguments):
        self.args = args
        self._last_log = (0.0, 0)
        self._wait_seconds = 0.0
        self._warned_of_waiting = False
        self._has_counted = False
        self.num_flops = 0
        self._peak_flops = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what runs inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what runs inside from the measured time."""
        started = time.perf_counter()
        yield
        since, step = self._last_log
        self._last_log = since + time.perf_counter() - started, step

    def count(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Counts the FLOPs of forward and backward once; later calls, and those without gradients, do nothing.

        It runs an extra pass, which preserves random states and buffers: under the counter some gradients round
        differently, and a compiled model would not run compiled.
        """
        if self._has_counted or not torch.is_grad_enabled():
            return
        self._has_counted = True
        device, counter = self.args.device, FlopCounter()
        buffers = [buffer.clone() for buffer in model.buffers()]
        devices = [] if device.type == "cpu" else [device]
        try:
            with torch.random.fork_rng(devices, device_type=device.type), counter:
                model(**inputs).loss.backward()
        except Exception as error:  # an unusual model, or labels that the step itself will complain about
            counter.problem = f"counting failed: {error!r}"
        model.zero_grad()
        torch.clear_autocast_cache()  # of weights that this pass has cast, whose graph is gone
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if counter.problem:
            logger.warning("mfu is not logged: %s", counter.problem)
            return
        self.num_flops = counter.get_total_flops()
        self._peak_flops = peak_flops(device, precision(self.args, next(model.parameters()).dtype))

    def metrics(self, step: int) -> dict[str, float]:
        """Metrics since the last call; for the first interval, which includes one-time set-up, memory only."""
        (since, last_step), now, waited = self._last_log, time.perf_counter(), self._wait_seconds
        self._last_log, self._wait_seconds = (now, step), 0.0
        memory = peak_memory_gib(self.args.device)
        metrics = {} if memory is None else {"peak_memory_gib": round(memory, 3)}
        if not last_step:
            return metrics
        seconds = now - since
        num_batches = (step - last_step) * self.args.gradient_accumulation_steps  # of this rank
        num_images = num_batches * self.args.train_batch_size * self.args.num_data_ranks
        metrics |= {
            "images_per_second": round(num_images / seconds, 2),
            "data_wait": round(waited / seconds, 4),
        }
        if self.num_flops:
            metrics["mfu"] = round(num_batches * self.num_flops / seconds / self._peak_flops, 4)
        self._warn_of_waiting(waited / seconds)
        return metrics

    def _warn_of_waiting(self, fraction: float) -> None:
        if fraction > MAX_DATA_WAIT_FRACTION and not self._warned_of_waiting:
            self._warned_of_waiting = True
            logger.warning(
                "Training waits for data %.0f %% of the time. %s", 100 * fraction, remedy_for_waiting(self.args)
            )


class FlopCounter(FlopCounterMode):
    """Counts the model FLOPs of what runs inside; `problem` holds the reason where the count cannot be used."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        # torch counts the scores that fused backwards compute again, and nothing of the CPU's fused attention.
        backwards = (
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )
        formulas: dict[Any, Any] = dict.fromkeys(backwards, attention_backward_flops)
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = attention_flops
        formulas[aten._grouped_mm] = grouped_mm_flops
        formulas[torch.ops.transformers.grouped_mm_fallback] = grouped_mm_flops
        formulas[torch.ops.transformers.grouped_mm_fallback_backward] = grouped_mm_backward_flops
        super().__init__(display=False, custom_mapping=formulas)
        self.problem = ""

    def __exit__(self, *exception: Any) -> Any:
        result = super().__exit__(*exception)
        if not self.problem and not self.get_total_flops():
            self.problem = "no matrix product was seen in a step."
        return result

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        # In the backward pass gradients are switched on only where activation checkpointing runs the forward again.
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            return out
        name = str(getattr(func_packet, "_qualified_op_name", func_packet))
        if func_packet not in self.flop_registry and name.split("::")[0] not in KNOWN_NAMESPACES:
            self.problem = f"there is no formula for the FLOPs of {name}."
        try:
            return super()._count_flops(func_packet, out, args, kwargs)
        except Exception as error:  # whatever a formula makes of an unusual call, training continues
            self.problem = f"the FLOPs of {name} cannot be counted: {error!r}"
            return out


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the scores and of the weighted sums, by the shapes of query, key and value."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the backward pass: two matrix products for each of the forward's."""
    return 2 * sdpa_flop_count(query, key, value)


def grouped_mm_flops(first: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of products of groups of rows with the matrix of each, or, in the backward pass, of groups of columns."""
    return int(2 * first[-2] * first[-1] * second[-1])  # of shapes


def grouped_mm_backward_flops(first: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the gradients of rows and of matrices."""
    return 2 * grouped_mm_flops(first, second)


def precision(args: VisionTrainingArguments, dtype: torch.dtype) -> str:
    """Precision of the matrix products: bf16, fp16, tf32 or fp32."""
    if args.bf16 or dtype == torch.bfloat16:
        return "bf16"
    if args.fp16 or dtype == torch.float16:
        return "fp16"
    return "tf32" if args.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of a device: from `PEAK_TFLOPS`, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return listed_peak(name, precision) or measured_peak(device, DTYPES[precision])


def listed_peak(name: str, precision: str) -> float | None:
    """Peak FLOP/s of an accelerator by its name, where `PEAK_TFLOPS` knows it."""
    if UNLISTED_CHIPS.search(name):
        return None
    row = next((row for chip, row in PEAK_TFLOPS.items() if re.search(rf"\b{chip}\b", name)), {})
    return row[precision] * 1e12 if precision in row else None


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products, on training's threads; measured once per process."""
    size = 1024 if device.type == "cpu" else 4096
    matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)  # uses no random numbers
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > 1:  # where bf16 is emulated, a product takes seconds
            break
    return 2 * size**3 / min(seconds)


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak memory so far, allocated on the accelerator or, on a CPU, by this process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # not every accelerator keeps statistics
            return torch.accelerator.max_memory_allocated(device) / 2**30
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20  # bytes there, KiB elsewhere


def remedy_for_waiting(args: VisionTrainingArguments) -> str:
    """Advice on how to wait less for data."""
    num_cores = max((os.cpu_count() or 1) // args.world_size, 1)  # of this rank, if all ranks share this machine
    if args.dataloader_num_workers < num_cores - 1 or not args.dataloader_num_workers:
        return f"Raise dataloader_num_workers (now {args.dataloader_num_workers}; {num_cores} CPU cores per process)."
    return (
        "All CPU cores prepare images already: store images at about the model's input size (Parquet or "
        "WebDataset reads faster than single files), choose cheaper views, or use more cores."
    )


__all__ = ["FlopCounter", "ThroughputMeter", "listed_peak", "measured_peak", "peak_memory_gib", "remedy_for_waiting"]
