import copy
import functools

import pytest

from hf_vlm.data.scenes import render
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
COMMON = {
    "encoder_config": ENCODER,
    "image_size": 32,
    "data": "scenes:easy",
    "num_train_examples": 24,
    "shuffle_block": 16,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0.25,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_probe_examples": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
METHODS = {
    "mae": {"model_config": {"decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}},
    "mae_image_losses": {
        "model_config": {
            "decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            "perceptual_weight": 1.0,
            "momentum": 0.9,
            "adversarial_weight": 0.1,
            "adversarial_start": 0.5,
            "discriminator_size": 8,
        },
    },
    "ijepa": {
        "model_config": {"predictor_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
    },
    "lejepa": {
        "model_config": {"projection_hidden_size": 32, "projection_size": 16, "num_slices": 16},
        "views": {"local": {"num_views": 2, "size": 16, "crop_scale": [0.05, 0.3]}},
    },
    "dinov2": {
        "model_config": {"num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 16},
        "views": {"local": {"num_views": 2, "size": 16, "crop_scale": [0.05, 0.3]}},
    },
    "distill": {},
    "image_text": {
        "text_length": 16,
        "model_config": {
            "projection_size": 16,
            "text_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
    },
    "simmim": {"model_config": {"mask_patch_size": 16}},
    "moco_v3": {"model_config": {"projection_hidden_size": 32, "projection_size": 16}},
    "simclr": {"model_config": {"projection_hidden_size": 32, "projection_size": 16}},
    "classification": {"num_eval_examples": 8},
    "semantic_segmentation": {"num_eval_examples": 8},
    "mask_query_segmentation": {
        "model_config": {"num_queries": 10, "num_query_layers": 1, "mask_feature_size": 16},
        "num_eval_examples": 8,
    },
    "detection": {
        "model_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_decoder_layers": 1,
            "num_queries": 10,
            "neck_num_blocks": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        "num_eval_examples": 8,
    },
}
METHODS["instance_segmentation"] = {
    **METHODS["detection"],
    "model_config": {**METHODS["detection"]["model_config"], "mask_feature_size": 16},
}


def save_teacher(folder):
    VLMViTModel(VLMViTConfig(image_size=32, **ENCODER)).save_pretrained(folder)
    VLMViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return str(folder)


render_scene_once = functools.cache(render.render_scene)


@pytest.fixture(scope="module", autouse=True)
def scenes_are_rendered_once():
    """Runs of few images read each of them many times; rendering them again took a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "render_scene", render_scene_once)
        yield


@pytest.fixture(scope="session")
def make_recipe_in():
    """`make_recipe_in(folder, method, **changes)`: a recipe of seconds, that writes into a folder."""

    def make(folder, kind, **changes):
        recipe = {"method": kind, "output_dir": str(folder / kind), **COMMON, **METHODS[kind], **changes}
        if kind == "distill":
            recipe["model_config"] = {"teacher": save_teacher(folder / "teacher"), **recipe.get("model_config", {})}
        return copy.deepcopy(recipe)

    return make


@pytest.fixture
def make_recipe(make_recipe_in, tmp_path):
    """`make_recipe(method, **changes)`: a recipe of seconds, that writes into the test's folder."""
    return functools.partial(make_recipe_in, tmp_path)
