"""Fine-tuning on tiles of images, and the evaluation of the held-out images on tiles."""

import json

import pytest

from hf_vlm.cli.main import main
from hf_vlm.training.run import finetune


@pytest.mark.slow
def test_held_out_images_are_evaluated_tile_by_tile(make_recipe, tmp_path, capsys):
    """The metrics of a run are those of `evaluate --tile`, and other ones than of whole images."""
    recipe = make_recipe("detection", augmentation={"tile": 32}, eval_split="test", max_steps=60, learning_rate=3e-3)
    summary = finetune(recipe)
    metrics = {}
    for name, options in (("tiles", ["--tile", "32"]), ("whole", [])):
        words = ["evaluate", recipe["output_dir"], "--data", "scenes:easy", "--num_examples", "8", *options]
        assert main([*words, "--save", str(tmp_path / f"{name}.json")]) == 0
        metrics[name] = json.loads((tmp_path / f"{name}.json").read_text())
    expected = {name: value for name, value in summary["metrics"].items() if name in ("ap", "ap50", "f1", "ar_100")}
    assert {name: metrics["tiles"][name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert metrics["whole"]["ar_100"] != pytest.approx(expected["ar_100"], abs=1e-4)
