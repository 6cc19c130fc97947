"""`hf-vlm pretrain RECIPE [--key value ...]`"""

import argparse
from collections.abc import Sequence


def run(words: Sequence[str]) -> None:
    """Pretrains an encoder."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm pretrain",
        description="Pretrains an encoder on unlabelled images by a recipe.",
        epilog="Every key of the recipe can be overridden: --data ./images --max_steps 1000 "
        "--views.blur_probability 0. "
        "--encoder starts from weights, --resume_from_checkpoint last goes on with a run that was stopped.",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as mae/vit_small.yaml")
    arguments, overrides = parser.parse_known_args(words)

    from accelerate import PartialState

    from hf_vlm.deploy.model_card import write_model_card
    from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
    from hf_vlm.training.arguments import load_recipe
    from hf_vlm.training.build import detection_command
    from hf_vlm.training.run import pretrain, quiet_libraries
    from hf_vlm.viz.curves import plot_probes

    quiet_libraries()
    recipe = load_recipe(arguments.recipe, overrides)
    summary = pretrain(recipe, write_card=write_model_card, plot=plot_probes)
    folder = recipe["output_dir"]
    if not PartialState().is_main_process:  # the others are done while it still writes
        return
    print(f"\nThe encoder stands in {folder}: {summary['num_images_seen']:,} images in {summary['seconds']:,.0f} s.")
    print(f"Next: {detection_command(VLMViTConfig.from_pretrained(folder), folder, 'YOUR_LABELLED_IMAGES')}")
