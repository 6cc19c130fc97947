"""The plans of a recipe: what its step costs, and how long the run takes on a cluster under each layout."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_vlm.models.ssl_model import SSLPreTrainedModel
from hf_vlm.planning.layouts import Cluster, Plan, largest_batch, layouts_for, make_plan
from hf_vlm.planning.step import StepCost, step_cost
from hf_vlm.registry import find_model
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import build_config, build_encoder_config, build_processor
from hf_vlm.training.data import view_transform
from hf_vlm.training.meters import DTYPES

__all__ = ["RecipePlan", "input_shapes", "plan_recipe", "recipe_cost"]

EIGHT_BITS = ("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit")
ADAMW_8BIT = 2 * (1 + 4 / 256)  # bytes per weight: two averages, with a float32 scale for 256 values of each


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """The plans of a recipe on a cluster, one for each layout with and without activation checkpointing.

    Attributes:
        method: Method of the recipe.
        cost: Cost of a step.
        plans: The plans.
        largest: Images per GPU that fit under each plan.
        num_images: Number of images to see in the run.
    """

    method: str
    cost: StepCost
    plans: tuple[Plan, ...]
    largest: tuple[int, ...]
    num_images: int

    @property
    def best(self) -> Plan | None:
        """The plan that fits and takes least time; of equal ones the first, which is the simplest."""
        fitting = [plan for plan in self.plans if plan.fits and plan.batch_size]
        return max(fitting, key=lambda plan: round(plan.images_per_second, 3), default=None)

    def seconds(self, plan: Plan) -> float:
        return self.num_images / plan.images_per_second


def plan_recipe(
    args: VisionTrainingArguments, cluster: Cluster, *, search: bool = False, cost: StepCost | None = None
) -> RecipePlan:
    """Plans a recipe of pretraining.

    Args:
        args: The recipe; its batch is that of each GPU.
        cluster: The GPUs.
        search: Take the largest power of two that fits as batch of each plan, in place of the recipe's.
        cost: `recipe_cost`, where it is known already.

    Raises:
        ValueError: The recipe is none of pretraining, or does not say how many images are seen.
    """
    entry = find_model(args.method)
    if not issubclass(entry.model_class, SSLPreTrainedModel):
        raise ValueError(f"method: {args.method} needs labels, and plans are of pretraining alone.")
    num_images = _num_images(args, cluster.num_gpus)
    cost = cost or recipe_cost(args, cluster.precision)
    found: list[tuple[Plan, int]] = []
    accumulates = args.gradient_accumulation_steps > 1
    for checkpointing in (False, True):
        for layout in layouts_for(cost, cluster):
            ways = {"checkpointing": checkpointing, "accumulates": accumulates}
            largest = largest_batch(cost, cluster, layout, **ways)
            size = 2 ** (largest.bit_length() - 1) if search and largest else args.per_device_train_batch_size
            found.append((make_plan(cost, cluster, layout, size, **ways), largest))
    plans, largest_batches = zip(*found)
    return RecipePlan(
        method=args.method,
        cost=cost,
        plans=plans,
        largest=largest_batches,
        num_images=num_images,
    )


def recipe_cost(args: VisionTrainingArguments, precision: str) -> StepCost:
    """Cost of a step of a recipe with products in a precision (bf16, fp16, tf32 or fp32), on any cluster."""
    entry = find_model(args.method)
    cost = step_cost(entry.model_class, build_config(args, entry), input_shapes(args), DTYPES[precision])
    return replace(cost, optimizer_width=ADAMW_8BIT) if args.optim in EIGHT_BITS else cost


def input_shapes(args: VisionTrainingArguments) -> Mapping[str, tuple[int, ...]]:
    """Shape of each input of the recipe's model without the axis of the batch: (views, channels, height, width)."""
    entry, num_channels = find_model(args.method), build_encoder_config(args).num_channels
    processor = build_processor(args, entry.processor_class, num_channels)
    views = view_transform(args, entry.model_class.default_views, processor)
    shapes: dict[str, tuple[int, ...]] = {"pixel_values": (len(views.views), num_channels, *views.views[0].size)}
    if views.local_views:
        shapes["local_pixel_values"] = (len(views.local_views), num_channels, *views.local_views[0].size)
    if "text" in entry.model_class.input_modalities:
        shapes["input_ids"] = (args.text_length,)
    return shapes


def _num_images(args: VisionTrainingArguments, num_gpus: int) -> int:
    if args.images_to_see == "auto" or args.budget is not None:
        raise ValueError("A plan needs to know how many images are seen: give --images_to_see or --max_steps.")
    if args.images_to_see is not None:
        return int(args.images_to_see)
    return args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * num_gpus
