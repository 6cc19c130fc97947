"""`hf-vlm finetune RECIPE [--key value ...]`"""

import argparse
from collections.abc import Sequence

from hf_vlm.cli.recipes import help_if_asked, read_recipe


def run(argv: Sequence[str]) -> None:
    """Fine-tunes a model for the recipe's task."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm finetune",
        description="Fine-tunes a model on labelled images by a recipe, from a pretrained encoder or from scratch.",
        epilog="Every key of the recipe can be overridden: --data ./coco --encoder runs/pretrain --max_steps 2000. "
        "--resume_from_checkpoint last resumes a run that was stopped, and auto begins or resumes it.",
    )
    help_if_asked(parser, argv, example="detection/vit_small.yaml", fits="labels, encoder and machine")

    from accelerate import PartialState

    from hf_vlm.deploy.push import write_hub_files
    from hf_vlm.registry import find_model
    from hf_vlm.tasks import TASKS
    from hf_vlm.training.run import finetune, quiet_libraries

    quiet_libraries()
    recipe, source = read_recipe(argv, command="finetune")
    metrics = finetune(recipe, source, write_card=write_hub_files)["metrics"]
    folder = recipe["output_dir"]
    task = TASKS[find_model(recipe["method"]).task]
    headline = ", ".join(f"{label} {metrics[name]:.3f}" for name, label in task.headline.items() if name in metrics)
    print0 = PartialState().print  # once, not by every rank
    print0(f"\nThe model is in {folder}: {headline} on held-out images.")
    print0(f"Next: hf-vlm predict {folder} PHOTO.jpg --save out.png")
