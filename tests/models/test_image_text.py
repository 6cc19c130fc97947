"""Pairs of images and texts: losses against loops in float64, a locked encoder, and what inference reads."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import batch, build
from torch import nn

from hf_vlm.models.modeling_image_text import CosineScale, contrastive_loss


def embeddings(seed, num_rows=5):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, 7, generator=generator, dtype=torch.float64), dim=1)


def scale(loss_type, factor=3.0, bias=-1.5):
    module = CosineScale(loss_type).double()
    with torch.no_grad():
        module.log_scale.fill_(math.log(factor))
        if loss_type == "sigmoid":
            module.bias.fill_(bias)
    return module


def test_the_sigmoid_loss_is_that_of_each_pair_by_itself():
    images, texts = embeddings(0), embeddings(1)
    expected = 0.0
    for i, image in enumerate(images.tolist()):
        for j, text in enumerate(texts.tolist()):
            logit = 3.0 * sum(a * b for a, b in zip(image, text)) - 1.5
            expected -= math.log(1 / (1 + math.exp(-logit if i == j else logit)))
    assert contrastive_loss(images, texts, scale("sigmoid")).item() == pytest.approx(expected / 5, rel=1e-12)


def test_the_softmax_loss_chooses_among_texts_and_among_images():
    images, texts = embeddings(0), embeddings(1)
    logits = [[3.0 * sum(a * b for a, b in zip(image, text)) for text in texts.tolist()] for image in images.tolist()]
    expected = 0.0
    for own in range(5):
        row, column = logits[own], [line[own] for line in logits]
        expected += sum(math.log(sum(map(math.exp, line))) - line[own] for line in (row, column)) / 2
    assert contrastive_loss(images, texts, scale("softmax")).item() == pytest.approx(expected / 5, rel=1e-12)


def test_factor_and_bias_start_as_in_siglip_and_clip():
    siglip, clip = build("image_text").cosine_scale, build("image_text_softmax").cosine_scale
    assert (siglip.log_scale.exp().item(), siglip.bias.item()) == (pytest.approx(10), -10)
    assert build("image_text", initial_bias=-4).cosine_scale.bias.item() == -4
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not hasattr(clip, "bias")


def test_the_factor_of_the_softmax_stays_within_a_hundred():
    for name, expected in (("image_text_softmax", 100.0), ("image_text", 1000.0)):
        model = build(name)
        nn.init.constant_(model.cosine_scale.log_scale, math.log(1000))
        model.after_step(0.5)
        assert model.cosine_scale.log_scale.exp().item() == pytest.approx(expected)


def test_a_locked_encoder_is_the_same_to_the_bit_after_training():
    model = build("image_text", backbone={"drop_path_rate": 0.5, "num_hidden_layers": 2}, lock_encoder=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model.train()(**batch("image_text")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not {key for key in changed if key.startswith("backbone.")}
    assert {key.split(".")[0] for key in changed} == {
        *("extra_blocks", "extra_norm", "text_model", "image_projection", "text_projection", "cosine_scale")
    }
    assert not model.backbone.training  # else layers would be dropped at random


@torch.no_grad()
def test_images_are_read_from_their_class_token_and_the_mean_of_their_patches():
    model, inputs = build("image_text_softmax").eval(), batch("image_text_softmax")
    images = inputs["pixel_values"][:, 0]
    tokens = model.backbone(images).last_hidden_state
    expected = F.normalize(model.image_projection(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)), dim=1)
    torch.testing.assert_close(model.get_image_features(images), expected)
    without = build("image_text", backbone={"use_class_token": False}).eval()
    assert without.image_projection.in_features == 32  # the mean alone


@torch.no_grad()
def test_any_number_of_texts_may_be_compared_with_images():
    """As in zero-shot classification; padding changes nothing."""
    model = build("image_text").eval()
    images, texts = batch("image_text", 2)["pixel_values"][:, 0], batch("image_text", 3)
    texts.pop("pixel_values")
    output = model(images, **texts)
    assert output.loss is None
    expected = model.get_image_features(images) @ model.get_text_features(**texts).T * 10 - 10
    torch.testing.assert_close(output.logits_per_image, expected)
    short = {key: value[:, :4] for key, value in texts.items()}
    torch.testing.assert_close(model(images, **short).logits_per_image, expected)
    with pytest.raises(ValueError, match="In training each image needs its text, but there are 2 and 3"):
        model.train()(images, **texts)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("model_type", ["clip_text_model", "roberta"])
def test_any_text_model_of_transformers_will_do(model_type, pooling):
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {"model_type": model_type, "vocab_size": 32, **fields}
    model = build("image_text", text_config=text_config, text_pooling=pooling).eval()
    inputs = batch("image_text")
    output = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    pooled = output.last_hidden_state[:, :4].mean(dim=1) if pooling == "mean" else output.pooler_output
    expected = F.normalize(model.text_projection(pooled), dim=1)
    torch.testing.assert_close(model(**inputs).text_embeds, expected)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="loss_type must be sigmoid or softmax, but is 'hinge'"):
        build("image_text", loss_type="hinge")
    for model_type in ("bort", "siglip_text_model", "bart"):
        with pytest.raises(ValueError, match=f"model_type '{model_type}', which is no encoder of texts"):
            build("image_text", text_config={"model_type": model_type})
    fields = {"hidden_size": 16, "vocab_size": 32, "num_hidden_layers": 1, "n_heads": 2, "hidden_dim": 32, "dim": 16}
    distilbert = {"model_type": "distilbert", **fields}
    with pytest.raises(ValueError, match="DistilBertModel gives no vector per text"):
        build("image_text", text_config=distilbert, text_pooling="pooler")(**batch("image_text"))
    assert build("image_text", text_config=distilbert)(**batch("image_text")).loss.isfinite()
    with pytest.raises(ValueError, match="text_pooling must be mean or pooler, but is 'max'"):
        build("image_text", text_pooling="max")
