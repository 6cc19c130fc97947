import json
import math

import pytest
import torch

from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.ssl_masks import random_masking
from hf_vlm.models.vit_layers import sincos_positions

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "position_embedding_type": "sincos",
}
DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(**fields):
    torch.manual_seed(0)
    return MAEForPreTraining(MAEConfig(backbone_config=BACKBONE, decoder_config=DECODER, **fields))


def naive_patches(images):
    return [
        [image[:, r : r + 8, c : c + 8].reshape(-1) for r in range(0, 32, 8) for c in range(0, 32, 8)]
        for image in images
    ]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_equals_a_naive_version(norm_pix_loss):
    """Encode visible patches alone, fill in mask tokens, decode all in image order, compare where masked."""
    model = build(norm_pix_loss=norm_pix_loss).eval()
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    output = model(images, noise=noise)
    decoder, total, count = model.decoder, 0.0, 0
    for image, patches, values in zip(images, naive_patches(images), noise):
        order = sorted(range(16), key=lambda i: float(values[i]))
        visible, masked = order[:4], order[4:]
        encoded = model.backbone(image[None], visible_indices=torch.tensor([visible])).last_hidden_state[0]
        tokens = decoder.embed(encoded)
        positions = sincos_positions(32, (4, 4))
        grid = [None] * 16
        for rank, patch in enumerate(visible):
            grid[patch] = tokens[1 + rank] + positions[patch]
        for patch in masked:
            grid[patch] = decoder.mask_token[0, 0] + positions[patch]
        hidden = torch.stack([tokens[0], *grid])[None]
        for layer in decoder.layers:
            hidden = layer(hidden)
        predicted = decoder.predict(decoder.norm(hidden))[0, 1:]
        for patch in masked:
            target = patches[patch].double()
            if norm_pix_loss:
                variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
                target = (target - target.mean()) / (variance + 1e-6).sqrt()
            total += ((predicted[patch].double() - target) ** 2).sum().item()
            count += len(target)
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_cross_attention_equals_a_naive_version():
    """Each masked token attends to the visible ones alone: one prediction by itself is the same as among all."""
    model = build(use_cross_attention=True, prediction_ratio=0.5).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = model(images, noise=noise)
    decoder = model.decoder
    positions = sincos_positions(32, (4, 4))
    for row in range(2):
        order = noise[row].argsort().tolist()
        encoded = model.backbone(images[[row]], visible_indices=torch.tensor([order[:4]])).last_hidden_state[0]
        tokens = decoder.embed(encoded)
        context = torch.cat([tokens[:1], tokens[1:] + positions[order[:4]]])
        assert output.masked_indices[row].tolist() == order[4:]  # all of them, when it is not trained
        for position, patch in enumerate(order[4:]):
            hidden = decoder.mask_token[0] + positions[[patch]]  # (1, 32)
            for layer in decoder.layers:
                hidden = hidden + naive_attention(layer.attention, layer.norm1(hidden), layer.norm1(context))
                hidden = hidden + layer.mlp(layer.norm2(hidden))
            expected = decoder.predict(decoder.norm(hidden))[0]
            torch.testing.assert_close(output.predictions[row, position], expected, atol=1e-5, rtol=1e-4)


def naive_attention(attention, queries, context):
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        query, key = attention.query(queries)[:, part], attention.key(context)[:, part]
        weights = (query @ key.T / 8**0.5).softmax(-1)
        heads.append(weights @ attention.value(context)[:, part])
    return attention.projection(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("use_cross_attention", [False, True])
def test_training_predicts_a_fraction_of_the_masked_patches(use_cross_attention):
    model = build(prediction_ratio=1 / 3, use_cross_attention=use_cross_attention)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    some, everything = model.train()(images, noise=noise), model.eval()(images, noise=noise)
    assert some.predictions.shape == (2, 4, 192)
    assert torch.equal(some.masked_indices, everything.masked_indices[:, :4])
    targets = torch.stack([torch.stack(patches) for patches in naive_patches(images)])
    chosen = targets.gather(1, some.masked_indices[..., None].expand(-1, -1, 192))
    normal = (chosen - chosen.mean(-1, keepdim=True)) / (chosen.var(-1, keepdim=True) + 1e-6).sqrt()
    assert some.loss.item() == pytest.approx((some.predictions - normal).square().mean().item(), rel=1e-5)
    # Only where masked tokens do not see each other does a prediction not depend on which others are predicted.
    same = torch.allclose(some.predictions, everything.predictions[:, :4], atol=1e-5)
    assert same == use_cross_attention


def test_masking_splits_all_patches_by_noise():
    noise = torch.rand(5, 16)
    visible, masked = random_masking(noise, 0.75)
    assert visible.shape == (5, 4)
    for row, seen, hidden in zip(noise, visible, masked):
        assert sorted([*seen.tolist(), *hidden.tolist()]) == list(range(16))
        assert row[seen].max() < row[hidden].min()


@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_patches_of_a_block_are_masked_together(grid):
    """At most one block is masked in part: the fraction is kept to the patch."""
    config = MAEConfig(mask_ratio=0.7, mask_block_size=2)
    torch.manual_seed(0)
    masks = MAEForPreTraining.sample_mask(config, grid, 6).unflatten(1, grid)
    assert masks.sum((1, 2)).tolist() == [math.ceil(0.7 * grid[0] * grid[1])] * 6
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6
    for mask in masks:
        blocks = [
            mask[row : row + 2, column : column + 2] for row in range(0, grid[0], 2) for column in range(0, grid[1], 2)
        ]
        assert sum(bool(block.any() and not block.all()) for block in blocks) <= 1


def test_loss_and_gradient_ignore_visible_pixels_of_the_target():
    """Visible patches enter through the encoder only; masked patches enter through the target only."""
    model = build(norm_pix_loss=False).eval()
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    noise = torch.rand(1, 16)
    output = model(images, noise=noise)
    output.loss.backward()
    gradient = images.grad[0].reshape(3, 4, 8, 4, 8).permute(1, 3, 0, 2, 4).reshape(16, -1)
    for position, patch in enumerate(output.masked_indices[0].tolist()):
        target = torch.stack(naive_patches(images.detach())[0])[patch]
        expected = 2 * (target - output.predictions[0, position].detach()) / output.predictions.numel()
        torch.testing.assert_close(gradient[patch], expected, atol=1e-6, rtol=1e-4)


def test_reconstruction_keeps_visible_patches_and_predicts_the_others():
    model = build().eval()
    images, noise = torch.randn(2, 1, 3, 32, 32), torch.rand(2, 16)
    reconstructed, mask = model.reconstruct(images, noise=noise)
    assert torch.equal(reconstructed.where(~mask, 0), images[:, 0].where(~mask, 0))
    assert mask.float().mean() == pytest.approx(0.75)
    output = model(images, noise=noise)
    patch = output.masked_indices[0, 0].item()
    target = torch.stack(naive_patches(images[:, 0])[0])[patch]
    expected = output.predictions[0, 0] * (target.var() + 1e-6).sqrt() + target.mean()
    torch.testing.assert_close(torch.stack(naive_patches(reconstructed)[0])[patch], expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_is_initialised_by_xaviers_rule():
    model = build()
    bounds = {"embed": 6 / (32 + 32), "layers.1.mlp.down_projection": 6 / (128 + 32), "predict": 6 / (32 + 192)}
    for name, squared in bounds.items():
        layer = model.decoder.get_submodule(name)
        assert layer.weight.abs().max().item() == pytest.approx(squared**0.5, rel=0.01), name
        assert layer.weight.std().item() == pytest.approx((squared / 3) ** 0.5, rel=0.05), name
        assert not layer.bias.any(), name
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert model.backbone.layers[0].mlp.up_projection.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_round_trip_keeps_decoder_and_options(tmp_path):
    model = build(mask_ratio=0.5, norm_pix_loss=False, use_cross_attention=True, prediction_ratio=0.5).eval()
    model.save_pretrained(tmp_path)
    loaded = MAEForPreTraining.from_pretrained(tmp_path).eval()
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    assert torch.equal(loaded(images, noise=noise).loss, model(images, noise=noise).loss)
    assert loaded.config.decoder_config.hidden_size == 32
    with pytest.raises(ValueError, match="mask_ratio"):
        MAEConfig(mask_ratio=1.0)
    with pytest.raises(ValueError, match="prediction_ratio"):
        MAEConfig(prediction_ratio=0)


@pytest.fixture
def former_config(tmp_path):
    """A saved configuration that also holds the fields of image losses, as before these were a method of their own."""
    build().config.save_pretrained(tmp_path)
    former = {"perceptual_weight": 0.0, "perceptual_encoder": "", "momentum": 0.996, "image_mean": None}
    former |= {"adversarial_weight": 0.0, "adversarial_start": 0.25, "discriminator_size": 64}
    fields = json.loads((tmp_path / "config.json").read_text()) | former
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_a_plain_configuration_with_fields_of_image_losses_is_read(former_config):
    config = MAEConfig.from_pretrained(former_config)
    assert not {
        name for name in config.to_dict() if name.startswith(("perceptual", "adversarial", "image", "momentum"))
    }
    assert config.decoder_config.hidden_size == 32


@pytest.mark.parametrize("field", ["perceptual_weight", "adversarial_weight"])
def test_image_losses_are_another_method(former_config, field):
    with pytest.raises(ValueError, match="the method mae_image_losses"):
        MAEConfig(**{field: 0.1})
    fields = json.loads((former_config / "config.json").read_text()) | {field: 0.1}
    (former_config / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the method mae_image_losses"):
        MAEForPreTraining.from_pretrained(former_config)
