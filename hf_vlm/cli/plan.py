"""`hf-vlm plan`"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_vlm.cli.options import check_positive
from hf_vlm.cli.outputs import prepare_picture

if TYPE_CHECKING:
    from hf_vlm.planning.comparison import MeasuredRun
    from hf_vlm.planning.recipe import RecipePlan


def run(argv: Sequence[str]) -> None:
    """Prints what a recipe of pretraining costs on a cluster; ValueError where it cannot be planned."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm plan",
        description="What a recipe of pretraining costs before it is run, on any machine: parameters, FLOPs, memory "
        "of each GPU, time, energy and price under each way of dividing the model.",
        epilog="Any key of the recipe may be given too, as --images_to_see 100000000 or --encoder_preset 7b.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as mae/vit_small.yaml")
    parser.add_argument("--gpu", default="h200", help="a100, h100, h200 (by default), b200, l4, l40s, t4, mi300x, ...")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (8)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="number of those in one machine (8)")
    parser.add_argument("--network", type=float, default=400, help="Gbit/s of each GPU to other machines (400)")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "tf32", "fp32"), default="bf16", help="of the products"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak FLOP/s that is reached (0.4)")
    parser.add_argument("--price", type=float, help="US dollars per hour of a GPU")
    parser.add_argument("--search", action="store_true", help="the largest batches that fit, not the recipe's")
    parser.add_argument("--save", type=Path, metavar="FILE.png", help="a picture of the memory")
    parser.add_argument("--against", type=Path, metavar="RUN", help="compare the plan with what this run has come to")
    parser.add_argument("--layout", choices=("ddp", "hsdp", "fsdp2", "ep"), default="ddp", help="of that run (ddp)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, overrides = parser.parse_known_args(argv)
    check_positive(options, "gpus", "gpus_per_node", "network", "price")
    check_positive(options, "mfu", most=1)

    from hf_vlm.planning.comparison import read_run
    from hf_vlm.planning.hardware import find_gpu
    from hf_vlm.planning.layouts import Cluster
    from hf_vlm.planning.recipe import plan_recipe
    from hf_vlm.planning.report import as_dict, as_text
    from hf_vlm.training.recipe import load_recipe, parse_arguments
    from hf_vlm.viz.memory import plot_memory

    if options.save:
        prepare_picture(options.save, like="memory.png")
    cluster = Cluster(
        gpu=find_gpu(options.gpu),
        num_gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        network=options.network * 1e9 / 8,
        precision=options.precision,
        mfu=options.mfu,
    )
    args = parse_arguments(load_recipe(options.recipe, overrides))
    run = read_run(options.against) if options.against else None
    plan = plan_recipe(args, cluster, search=options.search)
    if run is not None:
        print_comparison(plan, run, options.layout, checkpointing=args.activation_checkpointing, as_json=options.json)
        return
    print(json.dumps(as_dict(plan), indent=2) if options.json else as_text(plan, options.price))
    if options.save:
        bars = {
            f"{one.layout}{', checkpointing' if one.checkpointing else ''}, {one.batch_size} images": one.memory
            for one in plan.plans
        }
        plot_memory(options.save, bars, cluster.gpu.memory)


def print_comparison(
    plan: "RecipePlan", run: "MeasuredRun", layout: str, *, checkpointing: bool, as_json: bool
) -> None:
    """Prints the plan of a layout beside what a run has come to; ValueError where they cannot be compared."""
    from hf_vlm.planning.comparison import compare, comparison_as_text

    names = [(one.layout, one.checkpointing) for one in plan.plans]
    if (layout, checkpointing) not in names:
        raise ValueError(f"--layout {layout}: one GPU has no other layout than ddp.")
    found = compare(plan, plan.plans[names.index((layout, checkpointing))], run)
    if as_json:
        print(json.dumps({name: {"plan": planned, "run": measured} for name, (planned, measured) in found.items()}))
    else:
        print(comparison_as_text(found, run))
