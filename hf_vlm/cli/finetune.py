"""`hf-vlm finetune RECIPE [--key value ...]`"""

import argparse
from collections.abc import Sequence


def run(words: Sequence[str]) -> None:
    """Fine-tunes a detector."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm finetune",
        description="Fine-tunes a detector on labelled images by a recipe, from a pretrained encoder or from none.",
        epilog="Every key of the recipe can be overridden: --data ./coco --encoder runs/pretrain --max_steps 2000.",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as detection/vit_small.yaml")
    arguments, overrides = parser.parse_known_args(words)

    from accelerate import PartialState

    from hf_vlm.deploy.model_card import write_model_card
    from hf_vlm.training.arguments import load_recipe
    from hf_vlm.training.run import finetune, quiet_libraries

    quiet_libraries()
    recipe = load_recipe(arguments.recipe, overrides)
    summary = finetune(recipe, write_card=write_model_card)
    metrics, folder = summary["metrics"], recipe["output_dir"]
    say = PartialState().print  # once, not by every rank
    say(f"\nThe detector stands in {folder}: AP {metrics['ap']:.3f}, AP50 {metrics['ap50']:.3f} on held-out images.")
    say(f"Next: hf-vlm predict {folder} PHOTO.jpg --save out.png")
