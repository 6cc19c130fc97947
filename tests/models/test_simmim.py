import math

import pytest
import torch

from hf_vlm.models.modeling_simmim import SimMIMConfig, SimMIMForPreTraining

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(backbone=None, **options):
    torch.manual_seed(0)
    options = {"mask_patch_size": 16, **options}
    return SimMIMForPreTraining(SimMIMConfig(backbone_config={**BACKBONE, **(backbone or {})}, **options)).train()


def reference(model, images, noise):
    """Image by image, pixel by pixel: the loss, and the reconstructed images with their masks."""
    config, backbone = model.config, model.backbone
    num_prefix = config.backbone_config.num_prefix_tokens
    height, width = images.shape[2:]
    reconstructed, mask = images.clone(), torch.zeros(len(images), 1, height, width, dtype=torch.bool)
    columns = -(-width // 16)
    num_visible = noise.shape[1] - math.ceil(noise.shape[1] * config.mask_ratio)
    total = 0.0
    for index, image in enumerate(images):
        masked_blocks = noise[index].argsort()[num_visible:].tolist()
        patches = [(r, c) for r in range(0, height, 8) for c in range(0, width, 8)]
        hidden = [patch for patch, (r, c) in enumerate(patches) if r // 16 * columns + c // 16 in masked_blocks]
        shown = image.clone()
        for patch in hidden:  # what is hidden must not matter
            r, c = patches[patch]
            shown[:, r : r + 8, c : c + 8] = 1e3
        tokens = backbone.embeddings.patch_projection(
            torch.stack([shown[:, r : r + 8, c : c + 8].flatten() for r, c in patches])
        )
        tokens = torch.stack([model.mask_token[0, 0] if i in hidden else token for i, token in enumerate(tokens)])
        tokens = tokens + backbone.embeddings.positions((height // 8, width // 8))[0]
        states = torch.cat([backbone.embeddings.class_token[0], tokens])[None]
        for layer in backbone.layers:
            states = layer(states)
        predictions = model.head(backbone.norm(states))[0, num_prefix:]
        errors = []
        for patch in hidden:
            r, c = patches[patch]
            values = predictions[patch].view(3, 8, 8)
            errors += (values - image[:, r : r + 8, c : c + 8]).abs().flatten()
            reconstructed[index, :, r : r + 8, c : c + 8] = values.detach()
            mask[index, :, r : r + 8, c : c + 8] = True
        total = total + sum(errors) / len(errors)
    return total / len(images), reconstructed, mask


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_loss_and_gradients_equal_a_slow_reference(size):
    model = build().double()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    noise = torch.rand(3, -(-size[0] // 16) * -(-size[1] // 16))
    output = model(images[:, None], noise=noise)
    expected, reconstructed, mask = reference(model, images, noise)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(output.loss, list(model.parameters()))  # all of them take part
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    found, where = model.reconstruct(images[:, None], noise=noise)
    assert torch.equal(where, mask)
    torch.testing.assert_close(found, reconstructed.float())
    assert torch.equal(found.where(~mask, 0), images.float().where(~mask, 0))


def test_masks_are_blocks_of_the_given_ratio():
    config = SimMIMConfig(backbone_config={**BACKBONE, "image_size": 224, "patch_size": 16})
    torch.manual_seed(0)
    masked = SimMIMForPreTraining.sample_mask(config, (14, 14), 5).view(5, 7, 2, 7, 2)
    blocks = masked[:, :, 0, :, 0]
    assert torch.equal(masked, blocks[:, :, None, :, None].expand(-1, -1, 2, -1, 2))  # 32 pixels are two patches
    assert blocks.sum((1, 2)).tolist() == [30] * 5  # 0.6 of 49, rounded up


def test_round_trip_keeps_the_head_and_options(tmp_path):
    model = build(mask_ratio=0.5).eval()
    model.save_pretrained(tmp_path)
    loaded = SimMIMForPreTraining.from_pretrained(tmp_path).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 4)
    assert torch.equal(loaded(images, noise=noise).loss, model(images, noise=noise).loss)
    assert loaded(images).masked.sum(1).tolist() == [8, 8]


def test_a_configuration_of_the_former_field_is_read(tmp_path):
    build().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("mask_patch_size", "mask_unit_size"))
    config = SimMIMConfig.from_pretrained(tmp_path)
    assert config.mask_patch_size == 16
    assert "mask_unit_size" not in config.to_dict()


def test_impossible_mask_blocks_are_refused():
    with pytest.raises(ValueError, match="mask_patch_size 20 is not a multiple of the patch of 8"):
        build(mask_patch_size=20)
    with pytest.raises(ValueError, match="single mask block of mask_patch_size 32"):
        build(mask_patch_size=32)(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="mask_ratio"):
        build(mask_ratio=1.0)
