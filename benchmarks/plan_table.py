"""Plans of large encoders on large clusters, and of published runs beside what these report: docs/plans.md.

    python benchmarks/plan_table.py --save docs/plans.md [--quick]

Nothing is trained. The last line of stdout is JSON: the largest factor between a published run and its plan.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from hf_vlm.planning.hardware import find_gpu
from hf_vlm.planning.layouts import Cluster
from hf_vlm.planning.recipe import plan_recipe, recipe_cost
from hf_vlm.planning.report import as_count
from hf_vlm.planning.step import StepCost
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.recipe import load_recipe, parse_arguments

RECIPE = "dinov2/vit_small.yaml"
DROPPED = "drop_path_rate: 0.4, drop_path_uniform: true, layerscale_value: 1e-5"
LONG_RUN = "{num_prototypes: 131072, bottleneck_size: 384, separate_heads: true}"
LOCAL_98 = "{num_views: 8, size: 98, crop_scale: [0.05, 0.32]}"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder as it was published, by overrides of the recipe."""

    name: str
    overrides: tuple[str, ...]

    def arguments(self, *overrides: str) -> VisionTrainingArguments:
        return parse_arguments(load_recipe(RECIPE, ["--use_cpu", "true", *self.overrides, *overrides]))


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run of which hardware, batch, length and GPU hours are published."""

    encoder: Encoder
    gpu: str
    num_gpus: int
    batch_size: int
    num_images: float
    gpu_hours: float
    source: str


L16 = Encoder(
    name="ViT-L/16",
    overrides=(
        *("--encoder_preset", "large", "--model_config", "{num_prototypes: 65536}"),
        *("--encoder_config", "{drop_path_rate: 0.3, drop_path_uniform: true, layerscale_value: 1e-5}"),
    ),
)
L14 = Encoder(
    name="ViT-L/14",
    overrides=(
        *("--encoder_preset", "large", "--model_config", LONG_RUN, "--views.local", LOCAL_98),
        *("--encoder_config", f"{{{DROPPED}, patch_size: 14, use_gated_mlp: true, intermediate_size: 2736}}"),
    ),
)
H14 = Encoder(
    name="ViT-H/14",
    overrides=(
        *("--encoder_preset", "huge", "--model_config", LONG_RUN, "--views.local", LOCAL_98),
        *("--encoder_config", f"{{{DROPPED}}}"),
    ),
)
GIANT = Encoder(
    name="ViT-g/14",
    overrides=(
        *("--encoder_preset", "giant", "--model_config", LONG_RUN, "--views.local", LOCAL_98),
        *("--encoder_config", f"{{{DROPPED}}}"),
    ),
)
SEVEN = Encoder(
    name="ViT-7B/16",
    overrides=(
        *("--encoder_preset", "7b", "--encoder_config", f"{{{DROPPED}}}", "--image_size", "256"),
        *("--views.local", "{num_views: 8, size: 112, crop_scale: [0.05, 0.32]}", "--model_config"),
        "{num_prototypes: 262144, head_hidden_size: 8192, bottleneck_size: 512, separate_heads: true}",
    ),
)
TRILLION = Encoder(
    name="1T of experts",
    overrides=(
        *("--encoder_preset", "7b", "--image_size", "256", "--encoder_config"),
        f"{{{DROPPED}, num_experts: 512}}",
        *("--views.local", "{num_views: 8, size: 112, crop_scale: [0.05, 0.32]}", "--model_config"),
        "{num_prototypes: 262144, head_hidden_size: 8192, bottleneck_size: 512, separate_heads: true}",
    ),
)
README = "facebookresearch/dinov2, README.md and dinov2/configs"
PUBLISHED = (
    PublishedRun(
        encoder=L16, gpu="a100", num_gpus=32, batch_size=64, num_images=125e3 * 2048, gpu_hours=32 * 24, source=README
    ),
    PublishedRun(
        encoder=L14,
        gpu="a100",
        num_gpus=96,
        batch_size=32,
        num_images=625e3 * 3072,
        gpu_hours=96 * 3.3 * 24,
        source=README,
    ),
    PublishedRun(
        encoder=GIANT,
        gpu="a100",
        num_gpus=256,
        batch_size=12,
        num_images=625e3 * 3072,
        gpu_hours=22_000,
        source="facebookresearch/dinov2, MODEL_CARD.md; arXiv 2304.07193",
    ),
    PublishedRun(
        encoder=SEVEN,
        gpu="h100",
        num_gpus=256,
        batch_size=16,
        num_images=1e6 * 4096,
        gpu_hours=61_440,
        source="arXiv 2508.10104; facebookresearch/dinov3, dinov3/configs/train",
    ),
)
TABLE = (L14, H14, GIANT, SEVEN, TRILLION)
SIZES, GPU, TOTAL_BATCH, NUM_IMAGES = (64, 256, 1024, 4096), "h100", 4096, 1e9
HEADER = """# Plans of large encoders

Made by `python benchmarks/plan_table.py --save docs/plans.md`, without training anything; `hf-vlm plan` plans your own
recipe. All are DINOv2 with two large and eight small views, products in bfloat16 at an assumed 40 % of the peak FLOP/s
(`--mfu`), and 400 Gbit/s between machines of 8 GPUs (`--network`).

## Published runs

Planned with the published encoder, views, batch per GPU, number of GPUs and images; the fastest layout that fits.

"""
EXPLAINED = """
The factor is published / planned GPU hours. MFU is what the published run reached by our count: FLOPs of its images,
without what is computed twice, of the peak in bfloat16. What the plan leaves out makes it too low: reading and
decoding, evaluations, checkpoints, restarts, and element-wise work of the losses. The 7B's factor is below 1 for two
reasons: DINOv3's blocks multiplied in 8 bits (fp8_enabled), at up to twice the speed, and only parts of its layers
were computed again, where the plan counts a third more for whole layers. So GPU hours of a plan are good within the
factor below, and better with an MFU of your own: train a hundred steps, and see `hf-vlm plan RECIPE --against RUN`.
"""


def hours(encoder: Encoder, cost: StepCost, cluster: Cluster, batch_size: int, num_images: float) -> list[str] | None:
    """Cells of the fastest plan that fits, with its GPU hours first; None where nothing fits."""
    args = encoder.arguments(
        *("--per_device_train_batch_size", str(batch_size), "--images_to_see", str(int(num_images)))
    )
    plan = plan_recipe(args, cluster, cost=cost)
    best = plan.best
    if best is None:
        return None
    seconds = plan.seconds(best)
    return [
        f"{seconds / 3600 * cluster.num_gpus:.0f}",
        best.layout + (", checkpointing" if best.checkpointing else ""),
        f"{best.total_memory / 1e9:.0f}",
        f"{best.images_per_second:,.0f}",
        f"{seconds / 86400:.1f}",
        "computing" if best.compute_seconds >= best.communication_seconds else "communication",
    ]


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Writes the tables."""
    parser = argparse.ArgumentParser(description="Plans of large encoders on large clusters.")
    parser.add_argument("--save", type=Path, help="Markdown file to write; by default it is printed")
    parser.add_argument("--quick", action="store_true", help="the smallest published run alone")
    options = parser.parse_args()
    runs = PUBLISHED[:1] if options.quick else PUBLISHED
    costs: dict[str, StepCost] = {}

    def cost_of(encoder: Encoder) -> StepCost:
        if encoder.name not in costs:
            costs[encoder.name] = recipe_cost(encoder.arguments("--max_steps", "1"), "bf16")
        return costs[encoder.name]

    rows, factors = [], []
    for run in runs:
        cost, cluster = cost_of(run.encoder), Cluster(gpu=find_gpu(run.gpu), num_gpus=run.num_gpus)
        cells = hours(run.encoder, cost, cluster, run.batch_size, run.num_images)
        if cells is None:
            raise SystemExit(f"{run.encoder.name}: the published run does not fit by its plan")
        factors.append(run.gpu_hours / float(cells[0]))
        done, possible = run.num_images * cost.flops_per_image, run.gpu_hours * 3600 * cluster.gpu.peak("bf16")
        where = f"{run.num_gpus} x {cluster.gpu.name}, {run.batch_size} each"
        rows.append(
            [
                *(run.encoder.name, where, f"{run.num_images / 1e6:,.0f} M", f"{cost.flops_per_image / 1e9:,.0f}"),
                *(cells[1], cells[2], f"{float(cells[0]):,.0f}", f"{run.gpu_hours:,.0f}", f"{factors[-1]:.2f}"),
                *(f"{done / possible:.0%}", run.source),
            ]
        )
    titles = ["encoder", "GPUs, images", "images", "GFLOP per image", "layout", "GB per GPU", "GPU hours planned"]
    titles += ["published", "factor", "MFU", "source"]
    text = [HEADER, table(titles, rows), EXPLAINED]
    text.append(f"\nLargest factor: {max(max(factor, 1 / factor) for factor in factors):.2f}.\n")
    if not options.quick:
        rows = []
        for encoder in TABLE:
            for num_gpus in SIZES:
                cost, size = cost_of(encoder), TOTAL_BATCH // num_gpus
                cells = hours(encoder, cost, Cluster(gpu=find_gpu(GPU), num_gpus=num_gpus), size, NUM_IMAGES)
                name = f"{encoder.name} ({as_count(cost.num_parameters)} with teacher and heads)"
                if cells is None:
                    rows.append([name, f"{num_gpus:,}", str(size), "nothing fits", *[""] * 5])
                else:
                    rows.append([name, f"{num_gpus:,}", str(size), *cells[1:5], f"{float(cells[0]):,.0f}", cells[5]])
        titles = [
            "encoder",
            "GPUs",
            "images per GPU",
            "layout",
            "GB per GPU",
            "images/s",
            "days",
            "GPU hours",
            "decides",
        ]
        text.append(
            f"\n## One billion images on {find_gpu(GPU).name}s, {TOTAL_BATCH:,} images per step\n\n"
            "The fastest layout that fits, all images of a step at once. With a batch that does not grow, more GPUs\n"
            "have fewer images each, until communication decides. The last encoder is the 7B with 512 experts in\n"
            "every second layer, of which a token passes one; `ep` divides them among 512 GPUs, others among all.\n\n"
        )
        text.append(table(titles, rows))
    written = "".join(text)
    if options.save:
        options.save.write_text(written)
    else:
        print(written)
    print(json.dumps({"largest_factor": round(max(max(factor, 1 / factor) for factor in factors), 3)}))


if __name__ == "__main__":
    main()
