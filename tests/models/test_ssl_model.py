"""What training asks of every method, and the defaults of what it does not define."""

import pytest
import torch
from tiny import PRETRAINING, TINY, batch, build

from hf_vlm.models.modeling_vlm_vit import TOKENS
from hf_vlm.models.ssl_model import SSLConfig, SSLPreTrainedModel

ROWS = list(dict.fromkeys(TINY[name].row for name in PRETRAINING))
WITH_MASKS = ("mae", "mae_image_losses", "simmim", "dinov2", "ijepa")
OF_TEACHER = ("dinov2", "ijepa")


@pytest.mark.parametrize("name", ROWS)
def test_a_method_answers_what_training_asks(name):
    model = build(name)
    assert isinstance(model, SSLPreTrainedModel)
    assert isinstance(model.config, SSLConfig)
    assert model.default_views
    assert model.trained_encoder is (model.teacher["backbone"] if name in OF_TEACHER else model.backbone)
    masks = model.sample_mask(model.config, (4, 4), 3)
    assert (masks is not None) == (name in WITH_MASKS)
    if masks is not None:
        assert (masks.shape, masks.dtype) == ((3, 16), torch.bool)
        assert 0 < masks.sum() < masks.numel()


@pytest.mark.parametrize("name", ["encoder", "detection", *ROWS])
def test_tokens_do_not_decay_and_a_step_may_follow(name):
    model = build(name)
    names = {key for key, _ in model.named_parameters() if key.rpartition(".")[2] in TOKENS}
    assert any(key.endswith("class_token") for key in names) == (name != "ijepa")
    assert names == {key for key in model.no_weight_decay() if not key.startswith("discriminator.")}
    model.after_encoder_loaded()
    model.after_step(0.5)


@pytest.mark.parametrize("name", ["moco_v3", "dinov2", "ijepa", "mae_image_losses"])
def test_a_teacher_equals_the_student_once_weights_were_loaded(name):
    model = build(name)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1.0)
    model.after_encoder_loaded()
    pairs = zip(model.teacher["backbone"].parameters(), model.backbone.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_teachers_and_frozen_encoders_are_without_regularisation():
    backbone = {"drop_path_rate": 0.5, "attention_dropout": 0.5, "num_hidden_layers": 2}
    model, inputs = build("dinov2", backbone=backbone), batch("dinov2")
    outputs = [model.teacher["backbone"](inputs["pixel_values"][:, 0]).pooler_output for _ in range(2)]
    assert torch.equal(*outputs)
    assert not torch.equal(*(model.backbone(inputs["pixel_values"][:, 0]).pooler_output for _ in range(2)))


def test_only_the_teachers_momentum_follows_the_batch():
    """DINO's centre has a momentum too, which is one per step."""
    fields = {name: build(name).config.batch_scaled_momentum for name in ROWS}
    teachers = {"moco_v3", "dinov2", "ijepa", "mae_image_losses"}
    assert fields == {name: ("momentum",) if name in teachers else () for name in ROWS}
    for name in teachers:
        with pytest.raises(ValueError, match="momentum must be in 0 to 1"):
            build(name, momentum=1.5)


def test_weights_of_a_teacher_are_named(tmp_path):
    assert build("distill", tmp_path).config.external_weights() == [str(tmp_path / "frozen")]
    assert build("mae_frozen_encoder", tmp_path).config.external_weights() == [str(tmp_path / "frozen")]
    assert build("simclr").config.external_weights() == []
