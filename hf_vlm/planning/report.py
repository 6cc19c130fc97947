"""A recipe's plans as text and as plain values."""

from collections.abc import Sequence
from typing import Any

from hf_vlm.planning.layouts import Plan
from hf_vlm.planning.recipe import RecipePlan

__all__ = ["aligned", "as_count", "as_dict", "as_text", "duration"]

GB = 1e9
TITLES = ("layout", "checkpointing", "batch", "memory GB", "fits up to", "images/s", "time", "GPU hours", "MWh")


def as_text(plan: RecipePlan, price: float | None = None) -> str:
    """What the step costs, a table with a row for each plan, and what to choose."""
    cost, cluster = plan.cost, plan.plans[0].cluster
    is_sparse = cost.num_active < cost.num_parameters
    active = f" ({as_count(cost.num_active)} active per token)" if is_sparse else ""
    lines = [
        f"{plan.method}: {as_count(cost.num_parameters)} parameters{active}, {as_count(cost.num_trained)} trained; "
        f"{cost.flops_per_image / 1e9:,.1f} GFLOP per image forward and backward",
        f"{cluster.num_gpus} x {cluster.gpu.name} in {cluster.num_nodes} "
        f"{'nodes' if cluster.num_nodes > 1 else 'node'}, {cluster.gpu.memory / GB:.0f} GB each, {cluster.precision} "
        f"at an assumed {cluster.mfu:.0%} of the peak; {plan.num_images:,} images",
        "",
    ]
    titles = [*TITLES, *(["USD"] if price is not None else [])]
    rows = [_row(plan, one, largest, price) for one, largest in zip(plan.plans, plan.largest)]
    lines += aligned([titles, *rows])
    return "\n".join([*lines, "", _advice(plan)])


def _row(plan: RecipePlan, one: Plan, largest: int, price: float | None) -> list[str]:
    seconds = plan.seconds(one)
    hours = seconds / 3600 * one.cluster.num_gpus
    row = [
        one.layout,
        "yes" if one.checkpointing else "no",
        str(one.batch_size),
        f"{one.total_memory / GB:,.1f}{'' if one.fits else ' (!)'}",
        f"{largest:,}" if largest else "nothing",
        f"{one.images_per_second:,.0f}",
        duration(seconds),
        f"{hours:,.1f}",
        f"{hours * one.cluster.gpu.watts / 1e6:,.3f}",
    ]
    return row if price is None else [*row, f"{hours * price:,.0f}"]


def _advice(plan: RecipePlan) -> str:
    best, cluster = plan.best, plan.plans[0].cluster
    if best is not None:
        slower = "computing" if best.compute_seconds >= best.communication_seconds else "communication"
        checkpointing = " with activation checkpointing" if best.checkpointing else ""
        needed = best.images_per_second / cluster.num_gpus
        return (
            f"Fastest that fits: {best.layout}{checkpointing}, {best.batch_size} images per GPU "
            f"({duration(plan.seconds(best))}; {slower} decides). Reading and decoding {needed:,.0f} images per "
            "second for each GPU is not planned."
        )
    size, one = max(zip(plan.largest, plan.plans), key=lambda pair: pair[0])
    if size:
        checkpointing = " with activation checkpointing" if one.checkpointing else ""
        return f"Nothing fits. The nearest: {one.layout}{checkpointing} with --per_device_train_batch_size {size}."
    short = min(plan.plans, key=lambda one: one.memory_without_images)
    return (
        f"Nothing fits, not even one image: {short.layout} takes {short.memory_without_images / GB:,.0f} GB per GPU "
        "without images. "
        "Take more GPUs, larger ones, or a smaller model."
    )


def as_dict(plan: RecipePlan) -> dict[str, Any]:
    """The plans as plain values: bytes, seconds, FLOPs."""
    return {
        "method": plan.method,
        "num_parameters": plan.cost.num_parameters,
        "num_trained": plan.cost.num_trained,
        "num_active": plan.cost.num_active,
        "flops_per_image": plan.cost.flops_per_image,
        "num_images": plan.num_images,
        "plans": [
            {
                "layout": one.layout,
                "checkpointing": one.checkpointing,
                "batch_size": one.batch_size,
                "largest_batch_size": largest,
                "memory": {name: round(value) for name, value in one.memory.items()},
                "fits": one.fits,
                "images_per_second": round(one.images_per_second, 2),
                "seconds": round(plan.seconds(one), 1),
            }
            for one, largest in zip(plan.plans, plan.largest)
        ],
    }


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def as_count(number: float) -> str:
    """A number in the unit that suits it, as of parameters."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
