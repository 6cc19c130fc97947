"""The segmenter with queries: what it reads, what its queries see in training, and what is trained of it."""

import copy

import pytest
import torch
from tiny import batch, build, perturb
from torch.nn import functional as F

from hf_vlm.features.device import ATTENTION, use_fast_cpu_matmul
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_mask_query_segmentation import (
    MaskAnnealing,
    MaskQueries,
    VLMViTForMaskQuerySegmentation,
    VLMViTMaskQuerySegmentationConfig,
)

NAME = "mask_query_segmentation"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 1000}, "num_labels is 1000, but must be 2 to 255"),
        ({"num_labels": None, "id2label": {0: "road"}}, "num_labels is 1"),
        ({"num_query_layers": 3}, "num_query_layers is 3, but must be 1 to 2, the number of the encoder's layers"),
        ({"num_queries": 0}, "num_queries is 0, but must be at least 1"),
    ],
)
def test_bad_configurations_are_named(fields, words):
    encoder = VLMViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=words):
        VLMViTMaskQuerySegmentationConfig(
            **{"backbone_config": encoder, "num_labels": 3, "num_query_layers": 1, **fields}
        )


def test_scores_of_classes_are_those_of_the_queries_where_their_masks_are():
    class_logits, queries, pixels = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 6, 7)
    found = MaskQueries(class_logits, queries, pixels).class_map()
    expected = torch.zeros(2, 4, 6, 7, dtype=torch.float64)
    for image in range(2):
        for query in range(3):
            scores = class_logits[image, query].double().softmax(0)[:4]
            mask = sum(w * m for w, m in zip(queries[image, query].double(), pixels[image].double())).sigmoid()
            expected[image] += scores[:, None, None] * mask
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_queries_join_the_last_layers_without_positions(positions):
    """Patches that see no query are as in the encoder alone; the order of queries, unlike that of patches, is free."""
    encoder = {"num_hidden_layers": 3, "num_register_tokens": 2, "position_embedding_type": positions}
    model = build(NAME, backbone=encoder, num_query_layers=2).eval()
    perturb(model)
    images = torch.randn(2, 3, 32, 48)
    logits = model(images).logits
    assert logits.shape == (2, 3, 8, 12)  # a fourth of the image
    order = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(model)
    other.head.query_tokens.copy_(model.head.query_tokens[:, order])
    torch.testing.assert_close(other(images).logits, logits, rtol=1e-4, atol=1e-5)
    states = model(images, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [27, 27, 32, 32]
    expected = model.backbone(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[:2], expected[:2])
    assert not torch.allclose(states[2][:, 5:], expected[2])  # patches see the queries, too
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(images).hidden_states, states)


def attention_of_a_step(model, inputs):
    """Attention weights (batch, heads, tokens, tokens) of each layer of a training step."""
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def test_queries_see_the_patches_within_their_masks_until_it_is_annealed_away():
    model, inputs = build(NAME, backbone={"num_hidden_layers": 3}, num_query_layers=2), batch(NAME, 2)
    perturb(model)
    free = attention_of_a_step(model, inputs)
    assert all((weights > 0).all() for weights in free)  # no training has named its progress
    model.after_step(0.01)
    masked = attention_of_a_step(model, inputs)
    tokens, positions = model.backbone.embed(inputs["pixel_values"])
    tokens = model.backbone.layers[0](tokens, positions)
    tokens = torch.cat([model.head.query_tokens.expand(2, -1, -1), tokens], dim=1)
    normed = model.backbone.norm(tokens)
    patches = normed[:, 6:].transpose(1, 2).unflatten(2, (4, 4))
    _, queries, pixels = model.head(normed[:, :5], patches)
    masks = F.interpolate(torch.einsum("bqc,bcyx->bqyx", queries, pixels), (4, 4), mode="bilinear")
    is_inside = masks.flatten(2) > 0
    assert 0 < is_inside.float().mean() < 1
    for weights in masked[1].unbind(1):
        assert torch.equal(weights[:, :5, 6:] > 0, is_inside)
        assert (weights[:, :5, :6] > 0).all()
        assert (weights[:, 5:] > 0).all()
    model.after_step(1.0)
    torch.testing.assert_close(attention_of_a_step(model, inputs), free)
    model.after_step(0.01)
    model.eval()
    torch.testing.assert_close(attention_of_a_step(model, inputs), free)


def test_the_fraction_of_masked_queries_falls_layer_by_layer():
    """As the steps of EoMT's configurations have it: sixths of the training for four layers."""
    annealing = MaskAnnealing(4)
    assert annealing.fractions.tolist() == [0, 0, 0, 0]
    for step in range(0, 39121, 163):
        annealing.set_progress(step / 39120)
        expected = []
        for start in (6520, 13040, 19560, 26080):
            done = (step - start) / 6520
            expected.append(1.0 if done < 0 else 0.0 if done >= 1 else (1 - done) ** 0.9)
        assert annealing.fractions.tolist() == pytest.approx(expected, abs=1e-4)


def test_some_of_the_queries_are_masked():
    model, inputs = build(NAME, num_queries=200), batch(NAME, 4)
    perturb(model)
    model.after_step(0.5)  # of the one layer: a half, to the power of 0.9
    (weights,) = attention_of_a_step(model, inputs)[1:]
    is_masked = (weights[:, 0, :200, 201:] == 0).any(-1)
    assert abs(is_masked.float().mean() - 0.5**0.9) < 0.06


def test_attention_that_takes_no_masks_is_refused():
    model, inputs = build(NAME, backbone={"num_hidden_layers": 1}), batch(NAME)
    model.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"The attention 'flash_attention_2' takes no masks: train with .* sdpa"):
        model(**inputs)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_all_attention_with_masks_is_the_same(monkeypatch, drop_path_rate):
    """Of torch, plain, and with the fast kernels of CPUs; of the samples that a layer is computed for."""
    monkeypatch.setattr("hf_vlm.features.device.enable_fast_matmul", lambda: True)
    model, inputs = build(NAME, backbone={"drop_path_rate": drop_path_rate}), batch(NAME)
    perturb(model)
    model.after_step(0.01)
    losses, gradients = [], []
    for implementation in ("sdpa", "eager", ATTENTION):
        one = copy.deepcopy(model)
        if implementation == ATTENTION:
            use_fast_cpu_matmul(one)
        else:
            one.set_attn_implementation(implementation)
        assert one.config._attn_implementation == implementation
        torch.manual_seed(0)
        losses.append(one(**inputs).loss)
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    for loss, gradient in zip(losses[1:], gradients[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 128])
def test_new_masks_are_neither_flat_nor_sure_of_themselves(width):
    """From flat ones, as a deviation of 0.02 gives, narrow heads hardly learn."""
    model = build(NAME, backbone={"hidden_size": width}, mask_feature_size=64, num_queries=50).eval()
    (found,) = model._stages(torch.randn(4, 3, 32, 32), all_stages=False, output_attentions=None)
    masks = torch.einsum("bqc,bcyx->bqyx", found.queries, found.pixels)
    assert 0.1 < masks.std() < 1


def test_overfits_one_batch():
    torch.manual_seed(0)
    model, inputs = build(NAME), batch(NAME, 2, with_choices=False)
    classes = torch.randint(3, (2, 4, 4))  # one for each patch
    inputs["labels"] = F.interpolate(classes[:, None].float(), (32, 32), mode="nearest")[:, 0].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step((step + 1) / 60)
    assert loss < 6  # of 17
    with torch.no_grad():
        logits = model.eval()(inputs["pixel_values"]).logits
    found = F.interpolate(logits, (32, 32), mode="bilinear").argmax(1)
    assert (found == inputs["labels"]).float().mean() > 0.95


def test_a_frozen_encoder_is_not_trained_also_after_loading(tmp_path):
    """The head learns through the frozen layers that its queries go through."""
    model = build(NAME, backbone={"drop_path_rate": 0.5}, freeze_encoder=True)
    model.save_pretrained(tmp_path)
    for tested in (model, VLMViTForMaskQuerySegmentation.from_pretrained(tmp_path).train()):
        trained = {name for name, p in tested.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in tested.named_parameters() if name.startswith("head.")}
        assert not tested.backbone.training
        tested(**batch(NAME)).loss.backward()
        assert tested.head.query_tokens.grad.any()


def test_progress_is_saved(tmp_path):
    model, inputs = build(NAME), batch(NAME)
    perturb(model)
    model.after_step(0.4)
    model.save_pretrained(tmp_path)
    loaded = VLMViTForMaskQuerySegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded.annealing.fractions, model.annealing.fractions)
    assert 0 < loaded.annealing.fractions < 1
    assert loaded.bfloat16().annealing.fractions.dtype == torch.float32
    with torch.no_grad():
        images = inputs["pixel_values"]
        again = VLMViTForMaskQuerySegmentation.from_pretrained(tmp_path).eval()
        assert torch.equal(model.eval()(images).logits, again(images).logits)
    with pytest.raises(ValueError, match="num_labels is 1"):
        VLMViTForMaskQuerySegmentation.from_pretrained(tmp_path, num_labels=1)


@pytest.mark.parametrize(("patch_size", "scale"), [(4, 2), (8, 2), (14, 2), (16, 4), (32, 8)])
def test_masks_have_a_fourth_of_the_images_size(patch_size, scale):
    backbone = {"patch_size": patch_size, "image_size": 4 * patch_size}
    model = build(NAME, backbone=backbone).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 4 * patch_size, 4 * patch_size)).logits
    assert logits.shape == (1, 3, 4 * scale, 4 * scale)
