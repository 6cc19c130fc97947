"""Maps of patches: components against scikit-learn, attention against queries and keys by hand."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from hf_vlm.features.device import use_fast_cpu_matmul
from hf_vlm.features.maps import _foreground, feature_maps, principal_components
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.vit_layers import rope_positions

ENCODER = {"image_size": (16, 40), "patch_size": (4, 8), "hidden_size": 32, "num_hidden_layers": 3}
ENCODERS = {
    "class token": {"num_attention_heads": 4},
    "registers": {"num_attention_heads": 4, "num_register_tokens": 3},
    "rope": {
        "num_attention_heads": 2,
        "num_register_tokens": 2,
        "position_embedding_type": "rope",
        "use_qk_norm": True,
    },
}


def make_encoder(**changes):
    torch.manual_seed(0)
    encoder = VLMViTModel(VLMViTConfig(**ENCODER | {"num_attention_heads": 4} | changes))
    with torch.no_grad():
        for layer in encoder.layers:  # as after training: of fresh weights all attention is alike
            layer.attention.query.weight *= 8
            layer.attention.key.weight *= 8
    return encoder


def make_images(num_images=3, height=16, width=40):
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_components_are_those_of_scikit_learn_with_its_signs():
    values = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 13))
    expected = PCA(3, svd_solver="full").fit_transform(values.double().numpy())
    np.testing.assert_allclose(principal_components(values + 100), expected, atol=1e-4)
    u, s, _ = torch.linalg.svd(values.double() - values.double().mean(0), full_matrices=False)
    np.testing.assert_allclose(principal_components(values).abs(), (u * s)[:, :3].abs(), atol=1e-8)


def test_colors_are_joint_components_between_their_quantiles():
    encoder, images = make_encoder(num_register_tokens=2), make_images()
    colors = feature_maps(encoder, images).colors
    assert colors.shape == (3, 4, 5, 3)
    with torch.no_grad():
        patches = encoder.eval()(images).last_hidden_state[:, 3:].double().numpy()
    components = PCA(3, svd_solver="full").fit_transform(patches.reshape(60, 32))
    low, high = np.quantile(components, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(colors.reshape(60, 3), np.clip((components - low) / (high - low), 0, 1), atol=1e-3)
    assert len(np.unique(colors.reshape(60, 3), axis=0)) > 50


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_is_the_softmax_of_queries_and_keys(name):
    encoder, images = make_encoder(**ENCODERS[name]), make_images()
    config = encoder.config
    found = feature_maps(encoder, images)
    assert found.similarity is None
    states = []
    hook = encoder.layers[-1].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        encoder.eval()(images)
        hook.remove()
        layer = encoder.layers[-1]
        normed = layer.norm1(states[0])  # (images, tokens, dim)
        head_dim = 32 // config.num_attention_heads
        heads = [slice(head * head_dim, (head + 1) * head_dim) for head in range(config.num_attention_heads)]
        for image in range(3):
            for head, columns in enumerate(heads):
                query = layer.attention.query_norm(layer.attention.query(normed[image])[:, columns])
                key = layer.attention.key_norm(layer.attention.key(normed[image])[:, columns])
                if config.position_embedding_type == "rope":  # the class token is not turned
                    key = turned(key, config, (4, 5))
                scores = (key.double() @ query[0].double()) / head_dim**0.5  # (tokens,)
                weights = scores.exp() / scores.exp().sum()
                shown = weights[config.num_prefix_tokens :].reshape(4, 5)
                np.testing.assert_allclose(found.attention[image, head], shown, atol=1e-5)
    assert found.attention.std() > 0.01  # else anything would be equal


def turned(key, config, grid):
    """Keys (tokens, head_dim) of patches, turned as complex numbers."""
    half = key.shape[1] // 2
    patches = key[config.num_prefix_tokens :].double()
    angles = rope_positions(key.shape[1], config.rope_theta, grid, key.device)[:, :half].double()
    numbers = torch.complex(patches[:, :half], patches[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([key[: config.num_prefix_tokens].double(), torch.cat([numbers.real, numbers.imag], dim=1)])


def test_attention_is_what_the_model_records_and_the_model_is_left_as_it_was():
    encoder, images = make_encoder(num_register_tokens=1).train(), make_images(11)  # more than a batch
    use_fast_cpu_matmul(encoder)
    usual = encoder.config._attn_implementation
    found = feature_maps(encoder, images)
    assert encoder.config._attn_implementation == usual
    assert encoder.training
    assert not encoder.layers[-1].attention._forward_hooks
    encoder.set_attn_implementation("eager")
    with torch.no_grad():
        recorded = encoder.eval()(images, output_attentions=True).attentions[-1]
    np.testing.assert_allclose(found.attention.reshape(11, 4, 20), recorded[:, :, 0, 2:], atol=1e-6)


def test_without_a_class_token_patches_are_compared_with_their_mean():
    encoder, images = make_encoder(use_class_token=False, num_register_tokens=1), make_images(height=24, width=32)
    found = feature_maps(encoder, images)
    assert found.attention is None
    with torch.no_grad():
        patches = encoder.eval()(images).last_hidden_state[:, 1:].double()
    for image in range(3):
        mean = patches[image].mean(0)
        expected = [patch @ mean / (patch.norm() * mean.norm()) for patch in patches[image]]
        np.testing.assert_allclose(found.similarity[image].ravel(), expected, atol=1e-5)
    assert found.similarity.shape == (3, 6, 4)


def test_patches_are_compared_with_a_chosen_one():
    encoder, images = make_encoder(), make_images()
    found = feature_maps(encoder, images, patch=(2, 3))
    assert found.attention is None
    assert found.patch == (2, 3)
    with torch.no_grad():
        patches = encoder.eval()(images).last_hidden_state[:, 1:].double().unflatten(1, (4, 5))
    chosen = patches[:, 2, 3]
    for row, column in ((0, 0), (2, 3), (3, 1)):
        expected = (patches[:, row, column] * chosen).sum(1) / (
            patches[:, row, column].norm(dim=1) * chosen.norm(dim=1)
        )
        np.testing.assert_allclose(found.similarity[:, row, column], expected, atol=1e-5)
    for patch in ((4, 0), (0, 5), (-1, 0)):
        with pytest.raises(ValueError, match="4 rows and 5 columns"):
            feature_maps(encoder, images, patch=patch)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_does_not_lie_at_the_borders(sign):
    generator = torch.Generator().manual_seed(0)
    features = 0.1 * torch.randn(2, 6, 7, 8, generator=generator)
    inside = torch.zeros(2, 6, 7, dtype=torch.bool)
    inside[0, 2:4, 1:5] = inside[1, 1:5, 4:6] = True
    features[inside] += sign * torch.arange(8.0)
    assert torch.equal(_foreground(features), inside)


def test_the_background_is_black_and_does_not_count():
    encoder, images = make_encoder(), make_images()
    colors = feature_maps(encoder, images, foreground=True).colors.reshape(60, 3)
    with torch.no_grad():
        patches = encoder.eval()(images).last_hidden_state[:, 1:]
    shown = _foreground(patches.unflatten(1, (4, 5))).flatten().numpy()
    assert 0 < shown.sum() < 60
    assert (colors[~shown] == 0).all()
    components = PCA(3, svd_solver="full").fit_transform(patches.double().numpy().reshape(60, 32)[shown])
    low, high = np.quantile(components, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(colors[shown], np.clip((components - low) / (high - low), 0, 1), atol=1e-3)


def test_images_without_anything_in_them_give_finite_maps():
    encoder = make_encoder(position_embedding_type="rope", num_attention_heads=2)
    for foreground in (False, True):
        maps = feature_maps(encoder, torch.zeros(2, 3, 16, 40), foreground=foreground)
        assert np.isfinite(maps.colors).all()
        assert np.isfinite(maps.attention).all()
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        feature_maps(encoder, torch.zeros(1, 3, 18, 40))
