"""`hf-vlm views RECIPE [--data SOURCE] [--save views.png] [--key value ...]`"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.options import check_positive
from hf_vlm.cli.outputs import prepare_picture


def run(argv: Sequence[str]) -> None:
    """Renders the first images of a pretraining by a recipe, with their views."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm views",
        description="Renders the first images that a pretraining by the recipe would read, where their views are, and "
        "the views as the model gets them.",
        epilog="Every key of the recipe can be overridden: --views.blur_probability 0 "
        "--views.crop_scale '[0.5, 1]' --seed 1",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as simclr/vit_small.yaml")
    parser.add_argument("--data", help="source of the images; by default the recipe's, else the built-in ones")
    parser.add_argument("--num_images", type=int, default=4, help="rows of the picture")
    parser.add_argument("--save", type=Path, default=Path("views.png"), help="the picture to write")
    arguments, overrides = parser.parse_known_args(argv)
    prepare_picture(arguments.save, like="views.png")
    check_positive(arguments, "num_images")

    from hf_vlm.training.preview import sample_first_views
    from hf_vlm.training.recipe import load_recipe
    from hf_vlm.training.run import quiet_libraries
    from hf_vlm.viz.view_sheet import view_sheet

    quiet_libraries()
    recipe = load_recipe(arguments.recipe, overrides)
    recipe["data"] = arguments.data or recipe.get("data") or "scenes"
    recipe["use_cpu"] = True  # no model is run
    sampled = sample_first_views(recipe, arguments.num_images)
    view_sheet(sampled).save(arguments.save)
    print(f"{len(sampled)} images of {recipe['data']} and their views: {arguments.save}")
