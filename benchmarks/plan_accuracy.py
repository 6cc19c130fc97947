"""How exact the plans of `hf-vlm plan` are: parameters, FLOPs and memory, each against what does not share its code.

    python benchmarks/plan_accuracy.py [--device cuda] [--quick]

- Parameters and FLOPs of the encoder of every preset, by sums over its layers that are written out below.
- FLOPs of whole methods, by torch's own counter over a real step whose attention is written in matrix products. Plans
  count a step without values, with formulas of their own for fused attention.
- Memory: the peak that torch's allocator reports over two real steps with AdamW, against the plan without its reserve
  for the context of a GPU.

The last line of stdout is JSON: the largest relative error of each.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from machine import describe
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_vlm.models.configuration_vlm_vit import PRESETS, VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.planning.hardware import GPUS
from hf_vlm.planning.layouts import RESERVED, Cluster, make_plan
from hf_vlm.planning.recipe import input_shapes
from hf_vlm.planning.step import StepCost, step_cost
from hf_vlm.registry import ModelEntry, find_model
from hf_vlm.training.build import build_config
from hf_vlm.training.recipe import load_recipe, parse_arguments


@dataclass(frozen=True)
class Step:
    """A step whose memory is measured: a recipe with overrides, its batch, and whether layers are checkpointed."""

    recipe: str
    overrides: tuple[str, ...]
    batch_size: int
    checkpointing: bool = False

    def __str__(self) -> str:
        ways = ", checkpointing" if self.checkpointing else ""
        return f"{self.recipe} {' '.join(self.overrides[1::2])}, {self.batch_size} images{ways}"


NANO = ("--encoder_preset", "nano", "--image_size", "64")
STEPS = (  # the first ones are those of --quick: more of gradients, more of activations
    Step("mae/vit_nano_cpu.yaml", NANO, 2),
    Step("mae/vit_nano_cpu.yaml", NANO, 128),
    Step("simclr/vit_small.yaml", NANO, 32),
    Step("simclr/vit_small.yaml", NANO, 64, checkpointing=True),
    Step("lejepa/vit_nano_cpu.yaml", NANO, 16),
    Step("moco_v3/vit_nano_cpu.yaml", NANO, 32),
    Step("dinov2/vit_nano_cpu.yaml", NANO, 8),
    Step("simmim/vit_nano_cpu.yaml", NANO, 64),
    Step("mae/vit_small.yaml", ("--encoder_preset", "tiny", "--image_size", "96"), 32),
    Step("simclr/vit_small.yaml", ("--encoder_preset", "small", "--image_size", "64"), 8),
)
NUM_QUICK = 4


class EncoderWithLoss(VLMViTModel):
    """The encoder alone, as a method whose loss is the mean of its tokens."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        output = super().forward(pixel_values)
        output.loss = output.last_hidden_state.mean()
        return output


def written_out(config: VLMViTConfig) -> tuple[int, int]:
    """Parameters of an encoder, and FLOPs of forward and backward of one image, by sums over its layers."""
    dim, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    rows, columns = config.grid_hw
    tokens = rows * columns + config.num_prefix_tokens
    num_up = 2 if config.use_gated_mlp else 1
    products = 4 * dim * dim + (num_up + 1) * dim * inner
    biases = (4 if config.qkv_bias else 1) * dim + num_up * inner + dim
    scales = 0 if config.layerscale_value is None else 2 * dim
    positions = rows * columns if config.position_embedding_type == "learned" else 0
    positions += config.num_prefix_tokens
    parameters = (
        config.patch_dim * dim + dim + positions * dim + depth * (products + biases + 4 * dim + scales) + 2 * dim
    )
    # Forward, and backward twice that; of the first product there is no gradient of the pixels. Two FLOPs per
    # multiply-add; attention has two products of tokens x tokens x dim.
    flops = 6 * depth * (tokens * products + 2 * tokens * tokens * dim) + 4 * rows * columns * config.patch_dim * dim
    return parameters, flops


def encoder_errors(presets: list[str]) -> Iterator[tuple[str, float, float]]:
    """Relative errors of parameters and FLOPs of each preset."""
    for preset in presets:
        config = VLMViTConfig.from_preset(preset)
        cost = step_cost(EncoderWithLoss, config, {"pixel_values": (3, *config.image_hw)}, torch.float32)
        parameters, flops = written_out(config)
        yield preset, _error(cost.num_parameters, parameters), _error(cost.flops_per_image, flops)


def planned(step: Step, dtype: torch.dtype) -> tuple[ModelEntry, Any, dict[str, tuple[int, ...]], StepCost]:
    """Model, configuration and inputs of a step, and its planned cost."""
    args = parse_arguments(load_recipe(step.recipe, ["--max_steps", "2", "--use_cpu", "true", *step.overrides]))
    entry = find_model(args.method)
    config, shapes = build_config(args, entry), dict(input_shapes(args))
    return entry, config, shapes, step_cost(entry.model_class, config, shapes, dtype)


def run_steps(
    entry: ModelEntry, config: Any, shapes: dict[str, tuple[int, ...]], step: Step, device: torch.device
) -> None:
    """Two steps of training; what they allocate is gone afterwards."""
    torch.manual_seed(0)
    model = entry.model_class(config).to(device).train()
    if step.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    for _ in range(2):
        batch = {name: torch.randn(step.batch_size, *shape, device=device) for name, shape in shapes.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del batch, loss


def measured_peak(device: torch.device, *arguments: Any) -> float:
    """Largest number of allocated bytes over two steps, by the allocator's own reports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_steps(*arguments, device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_steps(*arguments, device)
    reports = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(reports, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def counted_flops(entry: ModelEntry, config: Any, shapes: dict[str, tuple[int, ...]]) -> float:
    """FLOPs per image of a real step by torch's counter, the attention as matrix products."""
    model = entry.model_class(config).train()
    model.set_attn_implementation("eager")
    counts = []
    for size in (2, 4):  # what differs is of the images, the rest is of the step
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            model(**{name: torch.randn(size, *shape) for name, shape in shapes.items()}).loss.backward()
        counts.append(counter.get_total_flops())
        model.num_steps_behind = 0
    return (counts[1] - counts[0]) / 2


def _error(found: float, expected: float) -> float:
    return abs(found - expected) / expected


def main() -> None:
    """Prints each plan beside what it is compared with, and the largest errors."""
    parser = argparse.ArgumentParser(description="How exact the plans of hf-vlm plan are.")
    parser.add_argument("--device", default="cpu", help="device of the real steps, whose memory is measured")
    parser.add_argument("--quick", action="store_true", help="few presets and steps: not a result to quote")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(describe(device))
    largest = {"params_error": 0.0, "flops_error": 0.0, "memory_error": 0.0}

    def note(name: str, error: float) -> str:
        largest[name] = max(largest[name], error)
        return f"{error:.3%}"

    for preset, params, flops in encoder_errors(["nano", "tiny"] if arguments.quick else list(PRESETS)):
        print(f"{preset}: parameters {note('params_error', params)}, FLOPs {note('flops_error', flops)}", flush=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cluster = replace(Cluster(gpu=GPUS["h100"], num_gpus=1), precision="bf16" if device.type == "cuda" else "fp32")
    seen: set[tuple[Any, ...]] = set()
    for step in STEPS[: NUM_QUICK if arguments.quick else None]:
        entry, config, shapes, cost = planned(step, dtype)
        if (step.recipe, step.overrides) not in seen:
            seen.add((step.recipe, step.overrides))
            flops = counted_flops(entry, config, shapes)
            error = note("flops_error", _error(cost.flops_per_image, flops))
            print(f"{step}: {cost.flops_per_image / 1e9:.4f} GFLOP planned, {flops / 1e9:.4f} counted: {error}")
        plan = make_plan(cost, cluster, "ddp", step.batch_size, checkpointing=step.checkpointing)
        memory, peak = plan.total_memory - RESERVED, measured_peak(device, entry, config, shapes, step)
        error = note("memory_error", _error(memory, peak))
        print(f"{step}: {memory / 1e6:.1f} MB planned, {peak / 1e6:.1f} measured: {error}", flush=True)
    print(json.dumps({name: round(error, 5) for name, error in largest.items()}))


if __name__ == "__main__":
    main()
