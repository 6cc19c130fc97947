"""`hf-vlm probe [RECIPE] --data SOURCE --encoder RUN [--protocols knn lora ...] [--num_seeds 3] [--key value ...]`"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.outputs import prepare_picture
from hf_vlm.cli.recipes import help_if_asked, read_recipe, split_recipe

FOLDER = "runs/probe"  # not the recipe's, where a classifier to use may be


def run(argv: Sequence[str]) -> None:
    """Prints the accuracies of an encoder by several protocols as a table, and as JSON in the last line."""
    options = argparse.ArgumentParser(prog="hf-vlm probe", add_help=False, allow_abbrev=False)  # --seed is a key
    options.add_argument("--protocols", nargs="+", help="some of knn, linear, attentive, lora and full; default: all")
    options.add_argument("--num_seeds", type=int, default=1, help="runs of what is trained, by seeds from --seed on")
    options.add_argument("--plot", type=Path, help="picture of the accuracies")
    parser = argparse.ArgumentParser(
        prog="hf-vlm probe",
        parents=[options],
        description="What an encoder is worth to a classifier, in one table: kNN and a linear classifier on frozen "
        "features, a query that attends to its frozen tokens (attentive), updates of low rank (lora) and all of its "
        "weights trained (full), each with the same labelled images.",
        epilog="Every key of the recipe can be overridden: --max_steps 300 --eval_split test --seed 1. "
        f"The runs are in --output_dir, by default {FOLDER}.",
    )
    help_if_asked(parser, argv, example="classification/vit_nano_cpu.yaml", fits="labels, encoder and machine")
    arguments, words = options.parse_known_args(argv)
    if arguments.plot is not None:
        prepare_picture(arguments.plot, like="accuracies.png", option="--plot")

    import numpy as np

    from hf_vlm.training.protocols import PROTOCOLS, evaluate_protocols
    from hf_vlm.training.run import quiet_libraries
    from hf_vlm.viz.accuracies import plot_accuracies

    quiet_libraries()
    named, overrides = split_recipe(words)
    words = [*([] if named is None else [named]), "--output_dir", FOLDER, *overrides]
    recipe, _ = read_recipe(words, command="probe")
    accuracies = dict(
        evaluate_protocols(recipe, arguments.protocols or tuple(PROTOCOLS), num_seeds=arguments.num_seeds)
    )
    width = max(map(len, accuracies))
    for name, values in accuracies.items():
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{name:<{width}}  {np.mean(values):.4f}{spread}")
    if arguments.plot is not None:
        plot_accuracies(arguments.plot, accuracies)
        print(f"Accuracies: {arguments.plot}")
    print(json.dumps(accuracies))
