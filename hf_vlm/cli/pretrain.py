"""`hf-vlm pretrain RECIPE [--key value ...]`"""

import argparse
from collections.abc import Sequence

from hf_vlm.cli.recipes import help_if_asked, read_recipe
from hf_vlm.cli.remote import add_remote_options, run_remote, split_remote


def run(argv: Sequence[str]) -> None:
    """Pretrains an encoder, or a whole detector or instance segmenter."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm pretrain",
        description="Pretrains an encoder, or a whole detector or instance segmenter, on unlabelled images.",
        epilog="Every key of the recipe can be overridden: --data ./images --max_steps 1000 "
        "--views.blur_probability 0. "
        "--encoder starts from weights, --resume_from_checkpoint last resumes a run that was stopped, and auto begins "
        "or resumes it.",
    )
    add_remote_options(parser)
    help_if_asked(parser, argv, example="mae/vit_small.yaml", fits="data, encoder and machine")
    options, argv = split_remote(argv)
    if options.on:
        run_remote(options, argv)
        return

    from accelerate import PartialState

    from hf_vlm.deploy.next_steps import finetune_command
    from hf_vlm.deploy.push import write_hub_files
    from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
    from hf_vlm.registry import find_model
    from hf_vlm.tasks import TASKS
    from hf_vlm.tasks.detection import DETECTION
    from hf_vlm.training.run import pretrain, quiet_libraries
    from hf_vlm.viz.contact_sheet import render_pseudo_labels
    from hf_vlm.viz.curves import plot_probes

    quiet_libraries()
    recipe, source = read_recipe(argv, command="pretrain")
    summary = pretrain(
        recipe, source, write_card=write_hub_files, plot=plot_probes, render_labels=render_pseudo_labels
    )
    folder = recipe["output_dir"]
    if not PartialState().is_main_process:  # the others are done while it still writes
        return
    entry = find_model(recipe["method"])
    task = TASKS.get(entry.task)  # None of an encoder
    what = "encoder" if entry.task_in_use == "pretraining" else "model"
    print(f"\nThe {what} is in {folder}: {summary['num_images_seen']:,} images in {summary['seconds']:,.0f} s.")
    if entry.task_in_use == "zero-shot-image-classification":
        print(f"Next: hf-vlm embed {folder} --data YOUR_IMAGES --save index.parquet, then hf-vlm search")
        return
    encoder = VLMViTConfig.from_pretrained(folder)
    print(f"Next: {finetune_command(task or DETECTION, encoder, folder, 'YOUR_LABELLED_IMAGES')}")
