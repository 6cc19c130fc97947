"""A plan beside what a run has come to."""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from hf_vlm.data.io.parsing import parse_json
from hf_vlm.planning.layouts import Plan
from hf_vlm.planning.recipe import RecipePlan
from hf_vlm.planning.report import aligned, duration
from hf_vlm.registry import find_model
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.provenance import RUN_FILE
from hf_vlm.training.run import PRETRAINING_MODEL_FOLDER

__all__ = ["MeasuredRun", "compare", "comparison_as_text", "read_run"]

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """The cost of a run by its folder; None for what is not recorded there.

    Attributes:
        method: Its method.
        device: Name of its accelerator, or `cpu`.
        num_processes: Number of its processes, one for each device.
        batch_size: Images per step, of all devices.
        num_parameters: Number of the saved weights that are parameters of the model.
        num_images: Number of images that were seen.
        seconds: From its start to its end, with evaluations and saves.
        flops_per_image: Counted on its first batch.
        images_per_second: Median over its log.
        mfu: Median over its log.
        memory: Peak of what was allocated on a device, in bytes.
    """

    method: str
    device: str
    num_processes: int
    batch_size: int
    num_parameters: int | None
    num_images: int
    seconds: float
    flops_per_image: float | None
    images_per_second: float | None
    mfu: float | None
    memory: float | None


def read_run(folder: str | Path) -> MeasuredRun:
    """The cost of a run of pretraining, from its folder.

    Raises:
        ValueError: There is no record of a run, or one without what is compared.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {RUN_FILE}, the record of a run: name the folder of a run of pretraining."
        )
    try:
        run = parse_json((folder / RUN_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RUN_FILE} cannot be read: {error}") from error
    needed = ("method", "device", "num_processes", "batch_size", "num_images_seen", "seconds")
    missing = [name for name in needed if name not in run] if isinstance(run, Mapping) else list(needed)
    if missing:
        raise ValueError(
            f"{folder / RUN_FILE} does not record {', '.join(missing)}: it was not trained here, or by an "
            "earlier version. Train a few steps with this one."
        )
    log = read_log(folder / "log.jsonl")

    def logged(name: str) -> list[float]:
        return [entry[name] for entry in log if name in entry]

    flops, memory = logged("total_flos"), logged("peak_memory_gib")
    on_gpu = run["device"] != "cpu"  # of a CPU the whole process is measured, with libraries and data
    return MeasuredRun(
        **{name: run[name] for name in ("method", "device", "num_processes", "batch_size", "seconds")},
        num_parameters=_num_parameters(folder, run["method"]),
        num_images=run["num_images_seen"],
        flops_per_image=flops[-1] / run["num_images_seen"] if flops and flops[-1] and run["num_images_seen"] else None,
        images_per_second=_median(logged("images_per_second")),
        mfu=_median(logged("mfu")),
        memory=max(memory) * 2**30 if memory and on_gpu else None,
    )


def _num_parameters(folder: Path, method: str) -> int | None:
    """Number of the weights in the saved files that are parameters, and not buffers."""
    if (folder / PRETRAINING_MODEL_FOLDER).is_dir():
        folder = folder / PRETRAINING_MODEL_FOLDER
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return None
    entry = find_model(method)
    with torch.device("meta"):
        model = entry.model_class(entry.config_class.from_pretrained(folder))
    names = {name for name, _ in model.named_parameters()}
    count = 0
    for path in files:
        with safe_open(path, framework="np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in names & set(weights.keys()))
    return count


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def compare(plan: RecipePlan, one: Plan, run: MeasuredRun) -> dict[str, tuple[float, float | None]]:
    """What is planned and what was measured, by name; the latter None where the run has not logged it.

    Speed and memory are compared where the run was on the planned GPUs; on a CPU they are not planned.

    Args:
        plan: Plans of the run's recipe.
        one: That of the run's layout.
        run: The run.

    Raises:
        ValueError: The run is of another method, or of other or more GPUs than planned.
    """
    if run.method != plan.method:
        raise ValueError(f"The run is of {run.method}, but the plan of {plan.method}: plan the run's recipe.yaml.")
    found: dict[str, tuple[float, float | None]] = {
        "parameters": (plan.cost.num_parameters, run.num_parameters),
        "GFLOP per image": (plan.cost.flops_per_image / 1e9, run.flops_per_image and run.flops_per_image / 1e9),
        "images": (plan.num_images, run.num_images),
    }
    if run.device == "cpu":
        return found
    cluster = one.cluster
    if run.num_processes != cluster.num_gpus or not re.search(rf"\b{cluster.gpu.name}\b", run.device):
        raise ValueError(
            f"The run was on {run.num_processes} x {run.device}, but the plan is for {cluster.num_gpus} x "
            f"{cluster.gpu.name}: give --gpus and --gpu as the run had them."
        )
    peak = cluster.gpu.peak(cluster.precision)
    return found | {
        "images per step": (one.batch_size * cluster.num_gpus, run.batch_size),
        "images/s": (one.images_per_second, run.images_per_second),
        "MFU": (one.images_per_second * plan.cost.flops_per_image / (cluster.num_gpus * peak), run.mfu),
        "seconds": (plan.seconds(one), run.seconds),
        "memory GB": (one.total_memory / GB, run.memory and run.memory / GB),
    }


def comparison_as_text(found: Mapping[str, tuple[float, float | None]], run: MeasuredRun) -> str:
    """A table of plan, run and their ratio."""
    rows = [["", "plan", "run", "run / plan"]]
    for name, (planned, measured) in found.items():
        if measured is None:
            rows.append([name, _number(planned), "not logged", ""])
        else:
            rows.append([name, _number(planned), _number(measured), f"{measured / planned:.3f}" if planned else ""])
    lines = [f"The run: {run.num_processes} x {run.device}, {run.num_images:,} images in {duration(run.seconds)}.", ""]
    lines += aligned(rows)
    if run.device == "cpu":
        lines += ["", "It was on a CPU, of which neither speed nor memory is planned."]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:,.4g}"
