"""Memory and time of a step under each way of dividing a model among the GPUs of a cluster.

What is assumed and not measured: communication overlaps with computation, so that the slower of the two decides; and
the fraction of the peak FLOP/s that training reaches, `Cluster.mfu`.

Memory is that of a step's fullest moment. The backward pass frees activations while it makes gradients, so that the
larger of the two counts; gradients that are summed over several batches are there from the first one on: both count.
"""

from dataclasses import dataclass

from hf_vlm.planning.hardware import Gpu
from hf_vlm.planning.step import ExpertCost, StepCost

__all__ = ["LAYOUTS", "Cluster", "Plan", "largest_batch", "layouts_for", "make_plan"]

LAYOUTS = ("ddp", "hsdp", "fsdp2", "ep")
FP32 = 4  # bytes per weight: weights, gradients and their sums are float32
GATHERED_LAYERS = 2  # of FSDP: the layer that is computed, and the next one, which is being fetched
RESERVED = 2e9  # bytes of a GPU that are not the model's: its context, libraries, fragments
RECOMPUTED = 4 / 3  # FLOPs with activation checkpointing: forward is a third of them, and runs twice


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and how they are connected.

    Attributes:
        gpu: The accelerator.
        num_gpus: Number of GPUs in all.
        gpus_per_node: Number of those in one machine.
        network: Bytes per second of each GPU to other machines, in one direction.
        precision: Of the products: bf16, fp16, tf32 or fp32.
        mfu: Fraction of the peak FLOP/s that training reaches.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    network: float = 50e9
    precision: str = "bf16"
    mfu: float = 0.4

    @property
    def node_size(self) -> int:
        return min(self.gpus_per_node, self.num_gpus)

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def product_width(self) -> float:
        """Bytes of a weight in the products."""
        return FP32 if self.precision in ("fp32", "tf32") else FP32 / 2

    @property
    def ring(self) -> float:
        """Bytes per second around all GPUs: its slowest link decides."""
        return self.network if self.num_nodes > 1 else self.gpu.link


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout of a model with a batch size, and what it comes to.

    Attributes:
        layout: `ddp`, every GPU holds all; `fsdp2`, weights, gradients and optimiser divided among all GPUs; `hsdp`,
            among those of a node; `ep`, experts among as many GPUs as a layer has experts, all else as `fsdp2`.
        checkpointing: Whether activations are computed again in the backward pass.
        batch_size: Images per GPU and step.
        memory: Bytes on each GPU by what they hold, in the fullest moment of a step.
        memory_without_images: Bytes on each GPU whatever the batch.
        compute_seconds: Of a step.
        communication_seconds: Of a step.
        cluster: The GPUs.
    """

    layout: str
    checkpointing: bool
    batch_size: int
    memory: dict[str, float]
    memory_without_images: float
    compute_seconds: float
    communication_seconds: float
    cluster: Cluster

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.cluster.gpu.memory

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.batch_size * self.cluster.num_gpus / self.step_seconds


def layouts_for(cost: StepCost, cluster: Cluster) -> tuple[str, ...]:
    """The layouts that a model can be divided by: experts need a sparse one, and all but `ddp` several GPUs."""
    if cluster.num_gpus == 1:
        return ("ddp",)
    return tuple(layout for layout in LAYOUTS if layout != "ep" or cost.experts is not None)


def make_plan(
    cost: StepCost,
    cluster: Cluster,
    layout: str,
    batch_size: int,
    *,
    checkpointing: bool = False,
    accumulates: bool = False,
) -> Plan:
    """Memory and time of a layout.

    Args:
        cost: Cost of a step.
        cluster: The GPUs.
        layout: One of `LAYOUTS`.
        batch_size: Images per GPU and step.
        checkpointing: Whether activations are computed again in the backward pass.
        accumulates: Whether gradients are summed over several batches.

    Raises:
        ValueError: There is no such layout of this model.
    """
    if layout not in layouts_for(cost, cluster):
        raise ValueError(f"layout: there is no {layout!r} here, but {', '.join(layouts_for(cost, cluster))}.")
    weights, trained = _held(cost, cluster, layout)
    gradients = FP32 * trained
    moments = _moments(cost, trained, checkpointing=checkpointing, accumulates=accumulates)
    flops = batch_size * cost.flops_per_image * (RECOMPUTED if checkpointing else 1.0)
    fixed = {
        "weights": FP32 * weights,
        "optimiser": cost.optimizer_width * trained,
        **_working(cost, cluster, layout),
        "reserved": RESERVED,
    }
    return Plan(
        layout=layout,
        checkpointing=checkpointing,
        batch_size=batch_size,
        memory={**fixed, "activations and gradients": max(held + batch_size * image for held, image in moments)},
        memory_without_images=sum(fixed.values()) + gradients,
        compute_seconds=flops / (cluster.gpu.peak(cluster.precision) * cluster.mfu),
        communication_seconds=_communication(cost, cluster, layout, batch_size, checkpointing=checkpointing),
        cluster=cluster,
    )


def _held(cost: StepCost, cluster: Cluster, layout: str) -> tuple[float, float]:
    """Numbers of weights, and of those that are trained, that a GPU holds while no layer is at work."""
    if layout == "ep" and cost.experts is not None:
        experts, size = cost.experts, _expert_gpus(cost.experts, cluster)
        of_all, of_trained = _held(cost.without(experts), cluster, "fsdp2")
        return of_all + experts.num_parameters / size, of_trained + experts.num_trained / size
    shards = {"ddp": 1, "hsdp": cluster.node_size}.get(layout, cluster.num_gpus)
    return cost.num_parameters / shards, cost.num_trained / shards


def _expert_gpus(experts: ExpertCost, cluster: Cluster) -> int:
    """Number of GPUs that the experts of a layer are divided among: each has some, or its own alone."""
    return min(cluster.num_gpus, experts.num_experts)


def _working(cost: StepCost, cluster: Cluster, layout: str) -> dict[str, float]:
    """Bytes on each GPU of what a layout needs beside what it holds."""
    if layout == "ddp":
        return {"copies": cost.copies, "buckets": FP32 * cost.num_trained if cluster.num_gpus > 1 else 0.0}
    if layout == "ep" and cost.experts is not None:  # experts stay where they are, and have copies for the products
        width = cluster.product_width if cluster.product_width < FP32 else 0.0
        copies = width * cost.experts.num_trained / _expert_gpus(cost.experts, cluster)
        return {**_working(cost.without(cost.experts), cluster, "fsdp2"), "copies": copies}
    return {"gathered": GATHERED_LAYERS * (cluster.product_width + FP32) * cost.num_layer_parameters}


def _communication(cost: StepCost, cluster: Cluster, layout: str, batch_size: int, *, checkpointing: bool) -> float:
    """Seconds of a step's communication, by the bytes that a ring sends from each GPU."""

    def around(size: int, num_bytes: float, speed: float) -> float:
        return num_bytes * (size - 1) / size / speed

    if layout == "ep" and cost.experts is not None:
        experts, size = cost.experts, _expert_gpus(cost.experts, cluster)
        routed = batch_size * cluster.product_width * experts.routed_per_image * (1.5 if checkpointing else 1.0)
        link = cluster.gpu.link if size <= cluster.node_size else cluster.network
        return (
            _communication(cost.without(experts), cluster, "fsdp2", batch_size, checkpointing=checkpointing)
            + around(size, routed, link)  # from each GPU to all others
            + around(cluster.num_gpus // size, 2 * FP32 * experts.num_trained / size, cluster.network)
        )
    gradients = FP32 * cost.num_trained
    gathering = 2 * cluster.product_width * cost.num_parameters  # weights, for the forward and the backward pass
    if layout == "ddp":
        return around(cluster.num_gpus, 2 * gradients, cluster.ring)  # an all-reduce is a scatter and a gather
    if layout == "fsdp2":
        return around(cluster.num_gpus, gathering + gradients, cluster.ring)
    inside = around(cluster.node_size, gathering + gradients, cluster.gpu.link)
    between = around(cluster.num_nodes, 2 * gradients / cluster.node_size, cluster.network)
    return inside + between


def largest_batch(
    cost: StepCost, cluster: Cluster, layout: str, *, checkpointing: bool, accumulates: bool = False
) -> int:
    """Images per GPU that fit; 0 where not even one does."""
    empty = make_plan(cost, cluster, layout, 0, checkpointing=checkpointing, accumulates=accumulates)
    free = cluster.gpu.memory - empty.total_memory + empty.memory["activations and gradients"]
    _, trained = _held(cost, cluster, layout)
    moments = _moments(cost, trained, checkpointing=checkpointing, accumulates=accumulates)
    if not empty.fits:
        return 0
    return int(min((free - held) // image for held, image in moments if image > 0))


def _moments(cost: StepCost, trained: float, *, checkpointing: bool, accumulates: bool) -> list[tuple[float, float]]:
    """The moments of a step that may be its fullest: bytes of gradients on a GPU, and bytes of an image.

    Args:
        trained: Number of trained weights that a GPU holds; gradients are taken to come at one pace on all.
    """
    saved = cost.activations_per_image - cost.checkpointed_per_image if checkpointing else 0.0
    gradients, share = FP32 * trained, trained / cost.num_trained
    moments = [(gradients if accumulates else held * share, max(0.0, image - saved)) for held, image in cost.moments]
    return [*moments, (gradients, 0.0)]
