"""The preview shows the images that a run reads first, with its views."""

import numpy as np
import pytest
import torch

from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.training.preview import sample_first_views
from hf_vlm.training.run import pretrain
from hf_vlm.training.trainer import VisionTrainer


@pytest.mark.parametrize(("method", "num_views"), [("simclr", 2), ("mae", 1)])
def test_views_are_those_of_the_first_batch(make_recipe, monkeypatch, method, num_views):
    batches = []
    training_step = VisionTrainer.training_step

    def kept(self, model, inputs, *args, **kwargs):
        batches.append(inputs["pixel_values"].clone())
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VisionTrainer, "training_step", kept)
    recipe = make_recipe(method, max_steps=1)
    pretrain(recipe)
    drawn = sample_first_views(recipe, 4)
    processor = VLMViTImageProcessor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    expected = ((batches[0] * std + mean) * 255).permute(0, 1, 3, 4, 2)  # (4, views, H, W, C)
    np.testing.assert_allclose(np.array([image.views for image in drawn]), expected, atol=1e-3)
    assert expected.shape[1] == num_views


def test_masks_are_whole_patches_of_the_method_s_share(make_recipe):
    recipe = make_recipe("mae")
    recipe["model_config"]["mask_ratio"] = 0.5
    for image in sample_first_views(recipe, 3):
        (mask,) = image.masks
        patches = mask.reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64)
        assert (patches.all(axis=1) | ~patches.any(axis=1)).all()
        assert mask.mean() == 0.5
    assert sample_first_views(make_recipe("simclr"), 1)[0].masks == []


def test_boxes_are_where_the_views_come_from(make_recipe):
    views = {
        "flip_probability": 0,
        "jitter": [0, 0, 0, 0],
        "grayscale_probability": 0,
        "blur_probability": 0,
        "local": {"num_views": 2, "size": 8},
    }
    for image in sample_first_views(make_recipe("simclr", views=views), 5):
        assert len(image.boxes) == 4
        for (top, left, height, width), view in zip(image.boxes, [*image.views, *image.local_views]):
            cut = image.image[top : top + height, left : left + width]
            np.testing.assert_allclose(cut.mean((0, 1)), view.mean((0, 1)), atol=6)


def test_what_cannot_be_drawn_is_explained(make_recipe):
    with pytest.raises(ValueError, match="no pretraining method 'detection'"):
        sample_first_views(make_recipe("detection"), 1)
    with pytest.raises(ValueError, match=r"'blur_probabilty' of views.*'blur_probability'"):
        sample_first_views(make_recipe("simclr", views={"blur_probabilty": 0}), 1)
    with pytest.raises(ValueError, match="mask_ratio"):
        sample_first_views(make_recipe("mae", model_config={"mask_ratio": 2.0}), 1)
