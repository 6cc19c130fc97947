"""Encoders of transformers give the same features as ours, and come back bit for bit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_families import FAMILIES, find_family
from hf_vlm.models.convert_vlm_vit import (
    from_transformers,
    load_ours,
    load_transformers,
    read_config,
    to_transformers,
)
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 48}
# (family, fields of its configuration, sizes of images beside the square one of the configuration)
LARGER, WIDE, SMALLER = (48, 48), (32, 56), (16, 24)
CASES = {
    "vit": ("vit", MLP, (LARGER, WIDE, SMALLER)),
    "vit without biases": ("vit", MLP | {"qkv_bias": False, "hidden_act": "relu"}, ()),
    "vit of another shape": ("vit", MLP | {"image_size": [32, 48], "patch_size": [8, 4], "num_channels": 5}, ()),
    "deit": ("deit", MLP, (LARGER, WIDE, SMALLER)),
    "vit_mae": ("vit_mae", MLP | {"mask_ratio": 0.0}, (LARGER, WIDE, SMALLER)),
    "dinov2": ("dinov2", {"mlp_ratio": 3}, (LARGER, WIDE, SMALLER)),
    "dinov2 gated": ("dinov2", {"use_swiglu_ffn": True, "hidden_act": "gelu"}, (WIDE,)),
    "dinov2_with_registers": ("dinov2_with_registers", {"num_register_tokens": 3}, (LARGER, WIDE, SMALLER)),
    "dinov2_with_registers gated": ("dinov2_with_registers", {"use_swiglu_ffn": True, "qkv_bias": False}, ()),
    "dinov3_vit": ("dinov3_vit", MLP | {"num_register_tokens": 2, "rope_theta": 50.0}, (LARGER, WIDE, SMALLER)),
    "dinov3_vit gated": ("dinov3_vit", MLP | {"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}, (WIDE,)),
    "dinov3_vit without biases": (
        "dinov3_vit",
        MLP | dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), False),
        (),
    ),
    "siglip": ("siglip_vision_model", MLP, (LARGER, WIDE, SMALLER)),
}


@torch.no_grad()
def randomise(model):
    """All weights away from the zeros and ones of a fresh model, which hide a missing bias or gain."""
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.8 if parameter.ndim == 1 else 0.0))
    return model.eval()


def original(case):
    """A random encoder of transformers, without a pooler."""
    name, fields, sizes = CASES[case]
    torch.manual_seed(0)
    family = FAMILIES[name]
    return randomise(family.model_class(family.model_class.config_class(**SIZE | fields), **family.options)), sizes


def features_of(theirs, images):
    """Features of the original, with positions resized, and in MAE's case without shuffled patches."""
    options = {}
    if tuple(images.shape[2:]) != (32, 32) and theirs.config.model_type in (
        "vit",
        "deit",
        "vit_mae",
        "siglip_vision_model",
    ):
        options["interpolate_pos_encoding"] = not isinstance(theirs.config.image_size, list)
    if theirs.config.model_type == "vit_mae":
        num_patches = images.shape[2] * images.shape[3] // 64
        options["noise"] = torch.arange(num_patches).expand(len(images), -1).float()
    with torch.no_grad():
        return theirs(images, **options).last_hidden_state


def assert_same_features(ours, theirs, size):
    images = torch.randn(2, theirs.config.num_channels, *size)
    with torch.no_grad():
        found = ours.eval()(images).last_hidden_state
    expected = features_of(theirs, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_originals(case):
    theirs, sizes = original(case)
    ours = from_transformers(theirs).model
    for size in (ours.config.image_hw, *sizes):
        assert_same_features(ours, theirs, size)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same(case):
    """Theirs, ours, theirs: the same features to the bit. Ours, theirs, ours: the same weights to the bit."""
    theirs, sizes = original(case)
    ours = from_transformers(theirs).model
    back = to_transformers(ours, CASES[case][0]).model.eval()
    back.config.mask_ratio = 0.0  # MAE alone has one
    for size in (ours.config.image_hw, *sizes):
        images = torch.randn(2, ours.config.num_channels, *size)
        assert torch.equal(features_of(back, images), features_of(theirs, images))
    again = from_transformers(back).model
    assert again.config.to_dict() == ours.config.to_dict()
    expected, found = ours.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pixels_beyond_the_last_whole_patch_are_left_out():
    """As of siglip-so400m-patch14-384, whose grid of 27 x 27 patches covers 378 pixels."""
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**SIZE | MLP | {"image_size": 38, "vision_use_head": False})
    theirs = randomise(transformers.SiglipVisionModel(config))
    ours = from_transformers(theirs).model.eval()
    assert ours.config.image_hw == (32, 32)
    images = torch.randn(2, 3, 38, 38)
    with torch.no_grad():
        found, expected = ours(images[:, :, :32, :32]), theirs(images)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=1e-4)


def test_what_is_folded_filled_and_dropped_is_named():
    deit = from_transformers(original("deit")[0])
    assert deit.loaded == "39 of 39 weights"
    assert deit.folded == [
        "embeddings.position_embeddings[0] into embeddings.cls_token",
        "embeddings.position_embeddings[1] into embeddings.distillation_token",
    ]
    assert (deit.filled, deit.dropped) == ([], [])
    dinov3 = from_transformers(original("dinov3_vit")[0])
    assert dinov3.filled == ["model.layer.*.attention.k_proj.bias = 0"]
    assert dinov3.dropped == ["mask_token"]
    assert dinov3.folded == []
    assert from_transformers(original("siglip")[0]).dropped == ["head"]
    back = to_transformers(dinov3.model, "dinov3_vit")
    assert back.dropped == ["layers.*.attention.key.bias = 0"]
    assert back.filled == ["embeddings.mask_token = 0"]


def whole_model(name):
    """A model around an encoder, as most checkpoints are; (model, its encoder, what of it is dropped)."""
    torch.manual_seed(0)
    vision = SIZE | MLP
    if name == "siglip":
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9} | MLP
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
        model = transformers.SiglipModel(config)
        return model, model.vision_model, ["head", "logit_bias", "logit_scale", "text_model"]
    if name == "vit_mae":
        decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        fields = vision | {f"decoder_{key}": value for key, value in decoder.items()} | {"mask_ratio": 0.0}
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**fields))
        return model, model.vit, ["decoder"]
    if name == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**vision))
        return model, model, ["pooler"]
    if name == "deit":
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**vision))
        return model, model.deit, ["cls_classifier", "distillation_classifier"]
    if name == "vit masked":
        model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**vision, encoder_stride=8))
        return model, model.vit, ["decoder", "mask_token"]
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZE, use_swiglu_ffn=True))
    return model, model.dinov2, ["classifier", "mask_token"]


@pytest.mark.parametrize("name", ["siglip", "vit_mae", "vit", "deit", "vit masked", "dinov2"])
def test_checkpoints_of_whole_models_load(name, tmp_path):
    model, encoder, dropped = whole_model(name)
    randomise(model).save_pretrained(tmp_path)
    if name == "dinov2":  # on disk the two halves of SwiGLU are one weight
        weights = load_file(tmp_path / "model.safetensors")
        assert weights["dinov2.encoder.layer.0.mlp.weights_in.weight"].shape == (2 * 88, 32)
    conversion = load_transformers(str(tmp_path))
    assert conversion.dropped == dropped
    assert_same_features(conversion.model, encoder, (32, 32))


def test_half_precision_becomes_float32(tmp_path):
    theirs, _ = original("vit")
    theirs.bfloat16().save_pretrained(tmp_path)
    ours = load_transformers(str(tmp_path)).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_features(ours, theirs.float(), (32, 32))


def encoder(**fields):
    torch.manual_seed(0)
    return randomise(VLMViTModel(VLMViTConfig(**SIZE | fields)))


def test_an_encoder_of_ours_may_take_another_layout():
    """Sin-cos positions become a table, an absent LayerScale ones; the features stay the same."""
    ours = encoder(position_embedding_type="sincos")
    for name in ("vit", "vit_mae", "dinov2"):
        theirs = to_transformers(ours, name).model.eval()
        if name == "vit_mae":
            theirs.config.mask_ratio = 0.0
        assert_same_features(ours, theirs, (32, 32))
    gated = encoder(use_gated_mlp=True, hidden_act="silu", intermediate_size=88, num_register_tokens=2)
    assert_same_features(gated, to_transformers(gated, "dinov2_with_registers").model.eval(), (32, 32))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "vit",
            {"num_register_tokens": 2, "layerscale_value": 0.1},
            "layerscale_value 0.1, num_register_tokens 2",
        ),
        ("vit", {"use_gated_mlp": True}, "use_gated_mlp"),
        ("vit", {"position_embedding_type": "rope"}, "position_embedding_type rope"),
        ("vit", {"norm_type": "rmsnorm"}, "norm_type rmsnorm"),
        ("vit", {"use_qk_norm": True}, "use_qk_norm"),
        ("vit", {"num_experts": 2}, "num_experts 2"),
        ("deit", {}, "num_register_tokens 0"),
        ("dinov2", {"image_size": [32, 48]}, "a grid of 4 x 6 patches"),
        ("dinov2", {"intermediate_size": 100}, "intermediate_size 100"),
        ("dinov2", {"use_gated_mlp": True}, "hidden_act gelu of a gated MLP"),
        ("dinov2", {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 90}, "intermediate_size 90"),
        ("dinov3_vit", {}, "position_embedding_type learned"),
        ("siglip", {}, "use_class_token True"),
        (
            "siglip",
            {"use_class_token": False, "patch_size": [8, 4], "image_size": [32, 16]},
            "patches of 8 x 4 pixels",
        ),
        ("convnext", {}, "'convnext' cannot be converted. There are: vit, deit"),
    ],
)
def test_what_does_not_fit_a_layout_is_named(name, fields, words):
    with pytest.raises(ValueError, match=words):
        to_transformers(encoder(**fields), name)


def test_wrong_sources_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder with a model nor one on the Hub"):
        load_transformers("nowhere/at-all")
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        load_transformers(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="'resnet' cannot be converted"):
        load_transformers(str(tmp_path))
    with pytest.raises(ValueError, match=r"no encoder of hf_vlm, but of type 'resnet'"):
        load_ours(str(tmp_path), "vit")
    with pytest.raises(ValueError, match="Give the encoder alone, a Dinov2Model, not a Dinov2Backbone"):
        from_transformers(transformers.Dinov2Backbone(transformers.Dinov2Config(**SIZE)))

    theirs, _ = original("vit")
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded.*model\.safetensors"):
        load_transformers(str(tmp_path))


def test_missing_weights_are_an_error(tmp_path):
    theirs, _ = original("vit")
    state = {name: value for name, value in theirs.state_dict().items() if "layernorm_after" not in name}
    theirs.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of the encoder: layers\.\*\.layernorm_after\.bias"):
        load_transformers(str(tmp_path))


def test_an_encoder_within_a_method_of_ours_is_converted(tmp_path):
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = randomise(MAEForPreTraining(MAEConfig(backbone_config=SIZE, decoder_config=decoder)))
    model.save_pretrained(tmp_path)
    conversion = load_ours(str(tmp_path), "vit")
    assert_same_features(model.backbone, conversion.model.eval(), (32, 32))
    assert not conversion.dropped  # the decoder is no part of an encoder
    with pytest.raises(ValueError, match="is an encoder of hf_vlm already"):
        load_transformers(str(tmp_path))


def test_aliases_are_families():
    assert find_family("siglip") is find_family("siglip_vision_model")


def test_models_within_a_folder_without_one_are_named(tmp_path):
    """As where a run ended between two rounds."""
    VLMViTConfig(**SIZE).save_pretrained(tmp_path / "round-1")
    with pytest.raises(ValueError, match=r"there is no config\.json\. There are models in .*round-1\.$"):
        read_config(str(tmp_path))
