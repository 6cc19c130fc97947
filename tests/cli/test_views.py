"""`hf-vlm views` as a user types it."""

import numpy as np
import pytest
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.training.preview import sample_first_views
from hf_vlm.training.recipe import load_recipe
from hf_vlm.viz.view_sheet import view_sheet

SMALL = ["--image_size", "32", "--encoder_preset", "nano", "--shuffle_block", "16"]


def test_the_picture_is_that_of_the_recipe_with_its_overrides(tmp_path, capsys):
    picture = tmp_path / "pictures" / "views.png"
    overrides = [
        *SMALL,
        "--views.blur_probability",
        "0",
        "--views.local",
        "{num_views: 2, size: 16}",
        "--data",
        "scenes:easy",
    ]
    words = ["views", "simclr/vit_small.yaml", "--num_images", "2", "--save", str(picture), *overrides]
    assert main(words) == 0
    assert f"2 images of scenes:easy and their views: {picture}" in capsys.readouterr().out
    recipe = load_recipe("simclr/vit_small.yaml", overrides) | {"use_cpu": True}
    with Image.open(picture) as shown:
        np.testing.assert_array_equal(shown, view_sheet(sample_first_views(recipe, 2)))


def test_without_data_the_built_in_images_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["views", "mae/vit_small.yaml", "--num_images", "1", *SMALL]) == 0
    assert "1 images of scenes and their views: views.png" in capsys.readouterr().out
    assert (tmp_path / "views.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simclr/vit_smal.yaml"], "no recipe simclr/vit_smal.yaml; did you mean 'simclr/vit_small.yaml'?"),
        (["simclr/vit_small.yaml", "--views.blur_probabilty", "0"], "did you mean 'blur_probability'"),
        (["simclr/vit_small.yaml", "--data", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["simclr/vit_small.yaml", "--num_images", "0"], "--num_images 0: it must be above 0"),
        (["simclr/vit_small.yaml", "--save", "views"], "--save views: name a picture file, such as views.png"),
        (["detection/vit_small.yaml"], "no pretraining method 'detection'"),
    ],
)
def test_what_a_user_mistypes_is_said_in_a_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["views", *words]) == 2
    assert message in capsys.readouterr().err
