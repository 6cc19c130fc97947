"""The segmenter: its loss against a loop, what the head reads, and what is trained of it."""

import math

import pytest
import torch
from tiny import batch, build, perturb
from torch.nn import functional as F

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_semantic_segmentation import (
    VLMViTForSemanticSegmentation,
    VLMViTSemanticSegmentationConfig,
    segmentation_loss,
)

NAME = "semantic_segmentation"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 1}, "num_labels is 1, but must be 2 to 255"),
        ({"num_labels": 256}, "num_labels is 256"),
        ({"num_labels": None, "id2label": {0: "road"}}, "num_labels is 1"),
        ({"num_feature_layers": 3}, "num_feature_layers is 3, but must be 1 to 2"),
        ({"num_feature_layers": 0}, "num_feature_layers is 0"),
    ],
)
def test_bad_configurations_are_named(fields, words):
    encoder = VLMViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=words):
        VLMViTSemanticSegmentationConfig(**{"backbone_config": encoder, "num_labels": 3, **fields})


def interpolated(logits, y, x, height, width):
    """Logits (classes, rows, columns) at a pixel of an output, by hand: bilinear between the centres of the cells."""
    _, rows, columns = logits.shape
    row = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
    column = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
    top, left = int(row), int(column)
    down, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    v, h = row - top, column - left
    above = (1 - h) * logits[:, top, left] + h * logits[:, top, right]
    below = (1 - h) * logits[:, down, left] + h * logits[:, down, right]
    return ((1 - v) * above + v * below).tolist()


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 3, 2, generator=generator)
    labels = torch.randint(4, (2, 7, 5), generator=generator)
    labels[0, :3] = labels[1, 2, 2] = 255
    losses = []
    for image, classes in zip(logits.double(), labels.tolist()):
        for y in range(7):
            for x in range(5):
                if classes[y][x] != 255:
                    values = interpolated(image, y, x, 7, 5)
                    losses.append(math.log(sum(map(math.exp, values))) - values[classes[y][x]])
    assert len(losses) == 54
    expected = pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for integers in (torch.uint8, torch.int64):
        assert segmentation_loss(logits, labels.to(integers)).item() == expected
    assert segmentation_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_without_labelled_pixels_the_loss_is_zero_with_gradients():
    model, inputs = build(NAME), batch(NAME)
    loss = model(**{**inputs, "labels": torch.full_like(inputs["labels"], 255)}).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(2, 8, 8), r"of the shape \(2, 8, 8\) and the type torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"of the shape \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), r"of the shape \(2, 1, 8, 8\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        segmentation_loss(torch.zeros(2, 3, 4, 4), labels)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
def test_logits_are_those_of_the_normalised_tokens_of_the_last_layers(num_layers):
    encoder = {"num_hidden_layers": 3, "num_register_tokens": 2}
    model = build(NAME, backbone=encoder, num_feature_layers=num_layers)
    perturb(model)
    images = torch.randn(2, 3, 32, 48)
    states = model(images, output_hidden_states=True).hidden_states[-num_layers:]
    tokens = torch.cat([model.backbone.norm(state)[:, 3:] for state in states], dim=-1).double()  # (2, 24, width)
    # In training the statistics are those of all patches of the batch.
    norm = model.feature_norm
    centered = tokens - tokens.mean((0, 1))
    normalised = centered / (centered.square().mean((0, 1)) + norm.eps).sqrt()
    features = normalised * norm.weight.double() + norm.bias.double()
    expected = features @ model.classifier.weight.double().T + model.classifier.bias.double()
    expected = expected.unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(images).logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = build(NAME)
    inputs = batch(NAME, 2)
    classes = torch.randint(3, (2, 4, 4))  # one for each patch
    inputs["labels"] = F.interpolate(classes[:, None].float(), (32, 32), mode="nearest")[:, 0].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    first = None
    for _ in range(60):
        loss = model(**inputs).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs["pixel_values"]).logits.argmax(1), classes)
    assert loss.item() < 0.5 * first


def test_a_frozen_encoder_is_not_trained_also_after_loading(tmp_path):
    model = build(NAME, backbone={"drop_path_rate": 0.5}, freeze_encoder=True)
    model.save_pretrained(tmp_path)
    for tested in (model, VLMViTForSemanticSegmentation.from_pretrained(tmp_path).train()):
        trained = {name for name, p in tested.named_parameters() if p.requires_grad}
        assert trained == {"feature_norm.weight", "feature_norm.bias", "classifier.weight", "classifier.bias"}
        assert tested.feature_norm.training
        assert not tested.backbone.training  # no stochastic depth
        tested(**batch(NAME)).loss.backward()
        assert tested.classifier.weight.grad.any()
    assert all(p.requires_grad for p in build(NAME).parameters())


def test_save_and_load(tmp_path):
    model = build(NAME, num_feature_layers=2)
    perturb(model)
    model(**batch(NAME))  # moves the running statistics
    model.eval().save_pretrained(tmp_path)
    loaded = VLMViTForSemanticSegmentation.from_pretrained(tmp_path)
    images = batch(NAME)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(images).logits, loaded(images).logits)
    with pytest.raises(ValueError, match="num_labels is 1"):
        VLMViTForSemanticSegmentation.from_pretrained(tmp_path, num_labels=1)
