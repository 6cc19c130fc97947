"""`hf-vlm convert SOURCE OUTPUT_DIR [--to dinov2]`"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.options import Parser


def run(argv: Sequence[str]) -> None:
    """Converts an encoder of transformers to one of ours, or back, and reports what happened to its weights."""
    parser = Parser(
        prog="hf-vlm convert",
        description="Converts an encoder of transformers (ViT, DeiT, ViT-MAE, DINOv2, DINOv3, SigLIP), alone or in a "
        "whole model, to one of hf_vlm with the same features; with --to an encoder of hf_vlm to the layout of one of "
        "these families.",
    )
    parser.add_argument("source", help="folder or Hub id of a checkpoint in safetensors")
    parser.add_argument("output_dir", type=Path, help="folder to write encoder and image processor into")
    parser.add_argument(
        "--to", help="vit, deit, vit_mae, dinov2, dinov2_with_registers, dinov3_vit or siglip_vision_model"
    )
    arguments = parser.parse_args(argv)
    source, folder = arguments.source, arguments.output_dir
    if folder.exists() and (not folder.is_dir() or Path(source).resolve() == folder.resolve()):
        raise ValueError(f"{folder}: name another folder for the converted encoder")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already (config.json): name another folder, or delete it")

    import hf_vlm.registry  # noqa: F401  marks the code for being saved beside the weights
    from hf_vlm.features.loading import quiet_transformers
    from hf_vlm.models.convert_vlm_vit import convert_checkpoint
    from hf_vlm.training.provenance import write_origins
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    with quiet_transformers():
        conversion = convert_checkpoint(source, folder, to=arguments.to)
    write_origins(folder, source)
    print("\n".join(f"{name:<8} {text}" for name, text in conversion.rows().items()))
    print(f"\nThe encoder is in {folder}. The licence of {source} goes with its weights.")
    if arguments.to is None:
        # Continued pretraining that keeps the features as good as they are: heads first, then small steps.
        options = ["--frozen_encoder_steps", "0.1", "--layer_decay", "0.75", "--encoder_lr_multiplier", "0.13"]
        words = ["hf-vlm", "pretrain", "simclr/vit_small.yaml", "--data", "YOUR_IMAGES", "--encoder", str(folder)]
        print(f"Next: {shlex.join([*words, *options])}")
