import math

import pytest
import torch

from hf_vlm.registry import find_model
from hf_vlm.training.build import build_config
from hf_vlm.training.recipe import (
    LAUNCHERS,
    find_recipe,
    load_recipe,
    parse_arguments,
    shipped_folder,
)

RECIPES = [path for path in sorted(shipped_folder("recipes").glob("*/*.yaml")) if path.parent.name not in LAUNCHERS]


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_numbers_and_overrides(tmp_path):
    path = write(
        tmp_path,
        "max_steps: 10\nlearning_rate: 1e-4\nviews: {blur_probability: 0.5}\n"
        "warmup_steps: 0.05\nseed: 3\nsave_strategy: no\n",
    )
    recipe = load_recipe(
        path, ["--learning-rate", "5e-4", "--views.blur_probability", "0", "--views.flip_probability=1", "--data", "x"]
    )
    assert recipe == {
        "max_steps": 10,
        "learning_rate": 5e-4,
        "views": {"blur_probability": 0, "flip_probability": 1},
        "warmup_steps": 0.05,
        "seed": 3,
        "save_strategy": "no",
        "data": "x",
    }
    args = parse_arguments(recipe)
    assert args.get_warmup_steps(100) == 5
    assert args.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (
            "max_steps: 1\nlerning_rate: 1",
            [],
            "Unknown key 'lerning_rate' in .*yaml, line 2; did you mean 'learning_rate'",
        ),
        ("max_steps: 1", ["--encodr", "x"], "Unknown key 'encodr' in the command line; did you mean 'encoder'"),
        ("max_steps: 1\n5: 5", [], "Unknown key 5 in the recipe."),
        ("max_steps: many", [], "max_steps in .* must be int, but is 'many'"),
        ("max_steps: true", [], "must be int"),
        ("max_steps: 1\nlearning_rate: [1]", [], "must be float"),
        ("- a\n- b", [], "must be a mapping"),
        ("max_steps: 1", ["--views", "0"], "views in .* must be a mapping, but is 0"),
        ("max_steps: 1", ["--learning_rate.x", "1"], "learning_rate .*must be float"),
        ("learning_rate: 0.1", ["--learning_rate.x", "1"], "--learning_rate.x: learning_rate is no mapping"),
        (
            "max_steps: 1",
            ["--image_size", "224x224"],
            r"must be a number of pixels or \[height, width\], but is '224x",
        ),
        ("max_steps: 1", ["--image_size", "[1, 2, 3]"], "must be a number of pixels"),
        ("max_steps: 1", ["--image_size", "0"], "must be a number of pixels"),
        ("a: [", [], "not valid YAML"),
        ("max_steps: 1", ["--data"], "--data needs a value"),
        ("max_steps: 1", ["data", "x"], "Expected --key value"),
        ("max_steps: 1", ["--max-steps", "*5"], r"--max_steps takes no text, and '\*5' is not valid YAML"),
        ("max_steps: 1", ["--views", "{blur: 1"], r"--views takes no text, and '\{blur: 1' is not valid YAML"),
        ("max_steps: 1", ["--dta", "*.tar"], "Unknown key 'dta'.*did you mean 'data'"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(tmp_path, text, overrides, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write(tmp_path, text), overrides)


def test_a_folder_named_by_a_year_and_a_size_in_a_list(tmp_path):
    recipe = load_recipe(write(tmp_path, "max_steps: 1"), ["--data", "2024", "--image_size", "[64]"])
    assert (recipe["data"], recipe["image_size"]) == ("2024", 64)


def test_shares_of_a_run_become_steps(tmp_path):
    text = "images_to_see: auto\nsave_steps: 0.05\neval_steps: 0.1\nper_device_train_batch_size: 4\nuse_cpu: true"
    args = parse_arguments(load_recipe(write(tmp_path, text)))
    args.set_steps_for(1000)
    assert (args.save_steps, args.eval_steps) == (math.ceil(args.max_steps / 20), math.ceil(args.max_steps / 10))


def test_values_that_are_no_yaml_are_text(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "max_steps: 1"),
        [
            "--data",
            "*.parquet",
            "--encoder={a,b}/c",
            "--output-dir",
            "%x",
            "--views.kind",
            "@y",
            "--format=parquet",
        ],
    )
    assert recipe == {
        "max_steps": 1,
        "data": "*.parquet",
        "encoder": "{a,b}/c",
        "output_dir": "%x",
        "views": {"kind": "@y"},
        "format": "parquet",
    }


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(ValueError, match=r"no recipe nowhere\.yaml.*mae/vit_small\.yaml"):
        find_recipe("nowhere.yaml")


def test_steps_are_needed():
    with pytest.raises(ValueError, match="needs max_steps"):
        parse_arguments({})


def test_values_that_transformers_refuses_are_errors_of_the_user():
    with pytest.raises(ValueError, match="cosin"):
        parse_arguments({"max_steps": 1, "lr_scheduler_type": "cosin"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_recipes_are_valid(path, tmp_path):
    args = parse_arguments(load_recipe(path) | {"output_dir": str(tmp_path)})
    assert args.learning_rate < 0.1
    header = path.read_text().split("\nmethod:")[0]
    assert "arXiv" in header or "paper" in header or "demo" in header
    assert "Command:" in header
    assert "Cost:" in header


def test_views_are_made_on_the_device_where_it_is_an_accelerator(monkeypatch):
    for chosen, device, expected in (
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("device", "cpu", True),
        ("workers", "cuda", False),
    ):
        args = parse_arguments({"max_steps": 1, "use_cpu": True, "views_on": chosen})
        monkeypatch.setattr(type(args), "device", torch.device(device))
        assert args.makes_views_on_device is expected
        monkeypatch.undo()
    with pytest.raises(ValueError, match="views_on must be auto, device or workers, but is 'gpu'"):
        parse_arguments({"max_steps": 1, "views_on": "gpu"})
    with pytest.raises(ValueError, match=r"set model_config\.label_smoothing instead"):
        parse_arguments({"max_steps": 1, "label_smoothing_factor": 0.1})


def test_the_length_follows_the_images_and_the_batch():
    shape = {"use_cpu": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    args = parse_arguments({"images_to_see": 1000, **shape})
    assert (args.total_batch_size, args.max_steps) == (32, 32)
    args = parse_arguments({"images_to_see": "auto", "frozen_encoder_steps": 0.1, **shape})
    args.set_steps_for(50_000)
    assert args.max_steps == 50_000 * 1000 / 32
    args = parse_arguments({"images_to_see": "auto", "frozen_encoder_steps": 200, **shape})
    args.set_steps_for(50_000)
    assert args.num_frozen_encoder_steps == 200
    with pytest.raises(ValueError, match="frozen_encoder_steps"):
        parse_arguments({"images_to_see": "auto", "frozen_encoder_steps": 200, **shape}).set_steps_for(4)
    with pytest.raises(ValueError, match="gives only when read"):
        parse_arguments({"images_to_see": "auto", "data": "tars", **shape}).set_steps_for(None)
    for wrong in ({}, {"max_steps": 5, "images_to_see": 10}, {"images_to_see": "many"}, {"images_to_see": 0}):
        with pytest.raises(ValueError, match="images_to_see"):
            parse_arguments({**shape, **wrong})


def test_a_length_given_as_an_override_replaces_the_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: mae\nimages_to_see: auto\n")
    assert load_recipe(path, ["--max_steps", "7"]) == {"method": "mae", "max_steps": 7}
    path.write_text("method: mae\nmax_steps: 7\n")
    assert load_recipe(path, ["--images_to_see", "1e6"]) == {"method": "mae", "images_to_see": 1e6}


def test_the_learning_rate_follows_the_batch():
    shape = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 64, "learning_rate": 1e-3}
    assert parse_arguments(shape).scaled_learning_rate == 1e-3
    assert parse_arguments({**shape, "reference_batch_size": 256}).scaled_learning_rate == pytest.approx(5e-4)
    linear = parse_arguments({**shape, "reference_batch_size": 256, "batch_scaling": "linear"})
    assert linear.scaled_learning_rate == pytest.approx(2.5e-4)
    with pytest.raises(ValueError, match="batch_scaling"):
        parse_arguments({**shape, "batch_scaling": "log"})


def test_the_teachers_momentum_follows_the_batch():
    recipe = {
        "method": "dinov2",
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 64,
        "encoder_preset": "nano",
        "model_config": {"momentum": 0.99},
    }
    entry = find_model("dinov2")
    assert build_config(parse_arguments(recipe), entry).momentum == 0.99
    scaled = build_config(parse_arguments({**recipe, "reference_batch_size": 256}), entry)
    assert scaled.momentum == pytest.approx(0.99**0.25)
