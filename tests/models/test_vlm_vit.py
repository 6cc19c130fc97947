import math

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTModel

from hf_vlm.models.configuration_vlm_vit import PRESETS, VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTBackbone, VLMViTModel
from hf_vlm.models.packing import Packing
from hf_vlm.models.stochastic_depth import StochasticDepth
from hf_vlm.models.vit_layers import (
    gather_patches,
    gather_tokens,
    patchify,
    rope_positions,
    rotate,
    sincos_positions,
    unpatchify,
)

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def build(**fields):
    torch.manual_seed(0)
    return VLMViTModel(VLMViTConfig(**{**TINY, **fields})).eval()


def test_patches_are_gathered_as_from_all_of_them():
    images, indices = torch.randn(3, 5, 16, 24).transpose(2, 3), torch.rand(3, 12).argsort(1)[:, :7]
    expected = torch.stack([patchify(images, (8, 4))[i, chosen] for i, chosen in enumerate(indices)])
    assert torch.equal(gather_patches(images, indices, (8, 4)), expected)
    assert torch.equal(gather_tokens(patchify(images, (8, 4)), indices), expected)


def test_patchify_is_a_convolution_and_is_undone():
    images = torch.randn(2, 3, 16, 24)
    weight = torch.randn(5, 3, 8, 4)
    by_convolution = F.conv2d(images, weight, stride=(8, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, (8, 4)) @ weight.flatten(1).T, by_convolution, atol=1e-4, rtol=1e-4)
    assert torch.equal(unpatchify(patchify(images, (8, 4)), (2, 6), (8, 4)), images)


def test_equals_transformers_vit():
    """The plain configuration is the original ViT: copied weights give the same features."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    ours = build(layer_norm_eps=config.layer_norm_eps)
    source = dict(theirs.named_parameters())

    def copy(target, *names):
        found = [next(p for key, p in source.items() if key.endswith(name)) for name in names]
        target.data.copy_(torch.cat(found).reshape(target.shape))

    position = source["embeddings.position_embeddings"].data
    ours.embeddings.position_embedding.data.copy_(position[:, 1:])
    ours.embeddings.class_token.data.copy_(source["embeddings.cls_token"].data + position[:, :1])
    copy(ours.embeddings.patch_projection.weight, "projection.weight")
    copy(ours.embeddings.patch_projection.bias, "projection.bias")
    layers = [key for key in source if ".0." in key]
    prefix = layers[0].split(".0.")[0]
    kinds = {key.split(".0.", 1)[1] for key in layers if key.endswith("weight")}
    query, key, value = (
        (next(k for k in kinds if name in k) for name in ("q", "k_proj", "v_proj"))
        if any("k_proj" in k for k in kinds)
        else (next(k for k in kinds if name in k) for name in ("query", "key", "value"))
    )
    rest = kinds - {query, key, value}
    norms = sorted(k for k in rest if "norm" in k)
    out = next(k for k in rest if source[f"{prefix}.0.{k}"].shape == (32, 32))
    up = next(k for k in rest if source[f"{prefix}.0.{k}"].shape == (128, 32))
    down = next(k for k in rest if source[f"{prefix}.0.{k}"].shape == (32, 128))
    for index, layer in enumerate(ours.layers):
        for end in ("weight", "bias"):

            def name(kind, end=end, index=index):
                return f"{prefix}.{index}.{kind.removesuffix('weight')}{end}"

            copy(getattr(layer.attention.query, end), name(query))
            copy(getattr(layer.attention.key, end), name(key))
            copy(getattr(layer.attention.value, end), name(value))
            copy(getattr(layer.attention.projection, end), name(out))
            copy(getattr(layer.mlp.up_projection, end), name(up))
            copy(getattr(layer.mlp.down_projection, end), name(down))
            copy(getattr(layer.norm1, end), name(norms[1]))  # layernorm_before
            copy(getattr(layer.norm2, end), name(norms[0]))  # layernorm_after
    copy(ours.norm.weight, "layernorm.weight")
    copy(ours.norm.bias, "layernorm.bias")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images).last_hidden_state, theirs(images).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_visible_patches_are_encoded_as_if_the_others_were_not_there(positions):
    """All patches in another order give the same tokens in that order; a subset keeps its own positions."""
    model = build(position_embedding_type=positions, num_register_tokens=2)
    images = torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, turned = model(images).last_hidden_state, model(images, visible_indices=order).last_hidden_state
    expected = torch.stack([tokens[3:][indices] for tokens, indices in zip(whole, order)])
    torch.testing.assert_close(turned[:, 3:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[:, :3], whole[:, :3], atol=1e-5, rtol=1e-5)
    some = model(images, visible_indices=order[:, :4]).last_hidden_state
    changed = images.clone()
    hidden = order[0, 5].item()
    changed[0, :, hidden // 4 * 8 : hidden // 4 * 8 + 8, hidden % 4 * 8 : hidden % 4 * 8 + 8] += 1
    assert torch.equal(model(changed, visible_indices=order[:, :4]).last_hidden_state, some)


def test_sincos_positions_follow_the_paper():
    rows, columns, dim = 3, 5, 16
    ours = sincos_positions(dim, (rows, columns)).reshape(rows, columns, dim)
    for y in range(rows):
        for x in range(columns):
            for i in range(dim // 4):
                omega = 1 / 10000 ** (i / (dim // 4))
                expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
                assert ours[y, x, i :: dim // 4].tolist() == pytest.approx(expected, abs=1e-5)


def test_rotary_products_depend_on_distance_only():
    angles = rope_positions(8, 100.0, (4, 4), torch.device("cpu"))
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]
    query, key = (torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8) for _ in range(2))
    products = rotate(query, (cos, sin)) @ rotate(key, (cos, sin)).transpose(2, 3)  # (1, 1, 16, 16)
    grid = products[0, 0].reshape(4, 4, 4, 4)
    torch.testing.assert_close(grid[0, 0, 1, 2], grid[2, 1, 3, 3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(grid[0, 0, 1, 2], grid[0, 0, 2, 1])


def test_backbone_shares_weights_with_the_model():
    model = build(use_class_token=False, num_register_tokens=1)
    backbone = VLMViTBackbone(VLMViTConfig(**TINY, use_class_token=False, num_register_tokens=1, out_indices=[1, 3]))
    backbone.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 48)
    maps = backbone.eval()(images).feature_maps
    output = model(images, output_hidden_states=True)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), output.last_hidden_state[:, 1:])
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 1:].mean(1))
    assert maps[0].shape == (2, 32, 4, 6)
    assert len(maps) == len(backbone.channels) == 2


def test_positions_of_another_size_are_interpolated():
    model = build()
    stored = torch.arange(4.0).view(1, 1, 4).expand(1, 4, 4)  # a ramp along the columns stays a ramp
    model.embeddings.position_embedding.data.copy_(stored.reshape(1, 16, 1).expand(-1, -1, 32))
    larger = model.embeddings.positions((4, 8)).reshape(4, 8, 32)
    assert larger[0, 1:-1, 0].diff().tolist() == pytest.approx([0.5] * 5, abs=0.15)
    assert model(torch.randn(1, 3, 32, 64)).last_hidden_state.shape[1] == 1 + 32


def cubic_weights(num_stored, num_wanted, scale):
    """(wanted, stored): Keys' cubic convolution with a = -0.75, repeating the border, as torch's bicubic."""
    weights = torch.zeros(num_wanted, num_stored, dtype=torch.float64)
    for row in range(num_wanted):
        position = (row + 0.5) / scale - 0.5
        for index in range(math.floor(position) - 1, math.floor(position) + 3):
            x, a = abs(position - index), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[row, min(max(index, 0), num_stored - 1)] += near if x <= 1 else far if x < 2 else 0
    return weights


@pytest.mark.parametrize(("method", "offset"), [("bicubic", 0.0), ("bicubic_offset", 0.1)])
def test_positions_are_interpolated_as_in_transformers_or_in_the_official_dinov2(method, offset):
    """`interpolate_pos_encoding` of facebookresearch/dinov2 scales by (patches + 0.1) / trained patches."""
    embeddings = build(position_interpolation=method).embeddings
    torch.nn.init.normal_(embeddings.position_embedding)
    stored = embeddings.position_embedding.detach().double().reshape(4, 4, 32)
    rows, columns = (cubic_weights(4, size, (size + offset) / 4) for size in (6, 9))
    expected = torch.einsum("ir,jc,rcd->ijd", rows, columns, stored).reshape(1, 54, 32)
    torch.testing.assert_close(embeddings.positions((6, 9)).double(), expected, atol=1e-5, rtol=1e-5)


def test_sincos_positions_of_another_size_are_those_between_the_trained_ones():
    embeddings = build(position_embedding_type="sincos").embeddings
    trained = embeddings.positions((4, 4)).reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    assert torch.equal(trained, sincos_positions(32, (4, 4)).reshape(1, 4, 4, 32).permute(0, 3, 1, 2))
    larger = embeddings.positions((12, 4)).reshape(1, 12, 4, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(larger[:, :, 1::3], trained)  # the middle one of three lies where the one was
    slow = [*range(4, 8), *range(20, 24)]  # low frequencies are all but straight between patches
    table = F.interpolate(trained, size=(12, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger[:, slow, 1:-1], table[:, slow, 1:-1], atol=1e-2, rtol=0)
    smaller = embeddings.positions((2, 2)).reshape(1, 2, 2, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(smaller[:, slow], F.avg_pool2d(trained, 2)[:, slow], atol=2e-2, rtol=0)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_the_class_token_alone_is_what_it_is_among_all_tokens(positions):
    """Values and gradients, though the last layer computes nothing else."""
    model = build(position_embedding_type=positions, num_register_tokens=1, layerscale_value=0.5).double()
    images, direction = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 32).double()
    found = []
    for alone in (False, True):
        model.zero_grad()
        output = model(images, class_token_only=alone)
        (output.pooler_output * direction).sum().backward()
        found.append([output.pooler_output, *(parameter.grad for parameter in model.parameters())])
    assert output.last_hidden_state.shape == (2, 1, 32)
    for whole, single in zip(*found):
        torch.testing.assert_close(single, whole)


def test_without_a_class_token_the_mean_takes_all_tokens():
    model = build(use_class_token=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images, class_token_only=True).pooler_output, model(images).pooler_output)


@pytest.mark.parametrize("positions", [None, "shared", "of each image"])
def test_a_layer_of_some_tokens_gives_what_it_gives_them_among_all(positions):
    torch.manual_seed(0)
    layer = build().layers[0]
    states, some = torch.randn(3, 10, 32), slice(4, 9)
    angles = torch.rand(1 if positions == "shared" else 3, 1, 10, 8)
    of_all = None if positions is None else (angles.cos(), angles.sin())
    of_some = None if positions is None else (angles[:, :, some].cos(), angles[:, :, some].sin())
    torch.testing.assert_close(layer(states[:, some], of_some, states, of_all), layer(states, of_all)[:, some])


def test_drop_path_takes_the_context_and_the_positions_of_the_samples_that_it_keeps():
    layer = build().layers[0].train()
    layer.residual.rate = 0.5
    states, context = torch.randn(8, 3, 32), torch.randn(8, 6, 32)
    seen = torch.rand(8, 1, 6, 8)
    angles = seen.cos(), seen.sin()
    torch.manual_seed(1)
    dropped = layer.residual(states, layer._attend, None, context, angles, None)
    torch.manual_seed(1)
    kept = torch.randperm(8)[:4]
    expected = states.clone()
    for index in kept.tolist():
        pick = slice(index, index + 1)
        branch = layer._attend(states[pick], None, context[pick], (angles[0][pick], angles[1][pick]), None)
        expected[pick] += 2 * branch
    torch.testing.assert_close(dropped, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_interfaces_agree(attention):
    model = build(use_qk_norm=True)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    if attention == "flex_attention":  # compiled kernels need a compiler: on CPU only that the interface is declared
        assert model._supports_flex_attn
        return
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_channels_and_patches_of_any_shape():
    model = build(num_channels=5, patch_size=[8, 4], image_size=[32, 16], use_gated_mlp=True, norm_type="rmsnorm")
    assert model(torch.randn(1, 5, 32, 16)).last_hidden_state.shape == (1, 17, 32)


@pytest.mark.parametrize(("num_samples", "rate"), [(4, 0.1), (8, 0.05), (1, 0.5), (1, 0.9)])
@pytest.mark.parametrize("packed", [False, True])
def test_drop_path_of_few_samples_drops_each_by_itself(num_samples, rate, packed):
    """The nearest number of samples to keep is all of them there, which would be no stochastic depth."""
    torch.manual_seed(0)
    residual = StochasticDepth(rate).train()
    states, packing = torch.zeros(num_samples, 2, 3), Packing(((num_samples, 2),)) if packed else None
    states = packing.pack([states]) if packed else states
    added = torch.stack([residual(states, lambda s, packing: s + 1, packing=packing) for _ in range(4000)])
    of_samples = added.reshape(4000, num_samples, 6)
    assert torch.equal(of_samples[:, :, 0], of_samples[:, :, -1])
    assert of_samples.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    assert (of_samples == 0).float().mean().item() == pytest.approx(rate, abs=0.03)
    assert of_samples.mean().item() == pytest.approx(1, abs=0.15)


def test_drop_path_keeps_the_expectation():
    model = build(drop_path_rate=0.5, num_hidden_layers=1)
    layer = model.layers[0]
    layer.residual.rate = 0.5
    states = torch.randn(64, 5, 32)
    with torch.no_grad():
        full = layer.eval()(states) - states
        layer.train()
        added = layer.residual(states, lambda kept, packing: torch.ones_like(kept)) - states
    assert sorted(added.mean((1, 2)).round().unique().tolist()) == [0.0, 2.0]
    assert added.mean().item() == pytest.approx(1.0)
    assert full.abs().sum() > 0


@pytest.mark.parametrize(("uniform", "expected"), [(False, [0.0, 0.15, 0.3]), (True, [0.3, 0.3, 0.3])])
def test_drop_path_rises_with_depth_or_is_uniform(uniform, expected):
    model = build(drop_path_rate=0.3, num_hidden_layers=3, drop_path_uniform=uniform)
    assert [layer.residual.rate for layer in model.layers] == pytest.approx(expected)


def test_activation_checkpointing_gives_the_same_gradients():
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(images).pooler_output.square().sum().backward()
        gradients.append(model.embeddings.patch_projection.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = build(position_embedding_type="rope", num_register_tokens=1)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).last_hidden_state, model(images).last_hidden_state)
    backbone = VLMViTBackbone(model.config).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).feature_maps[0], backbone(images).feature_maps[0])


# Parameters of the published encoders in millions: ViT papers' numbers without the classifier, DINOv2 giant 1.14 B,
# DINOv3 7B 6.7 B.
PUBLISHED = {
    "tiny": 5.5,
    "small": 21.7,
    "base": 85.8,
    "large": 303.3,
    "so400m": 412,
    "huge": 631,
    "giant": 1136,
    "7b": 6716,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_numbers_of_parameters(name):
    overrides = {"image_size": 224}
    with torch.device("meta"):
        model = VLMViTModel(VLMViTConfig.from_preset(name, **overrides))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    if name in PUBLISHED:
        assert millions == pytest.approx(PUBLISHED[name], rel=0.01)
    else:
        assert millions < 2


def test_round_trip_and_meta_initialisation(tmp_path):
    """from_pretrained goes through the meta device: every parameter must come back or be initialised."""
    model = build(num_register_tokens=2, layerscale_value=1e-5, position_embedding_type="learned")
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    loaded = VLMViTModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)
    state = {k: v for k, v in model.state_dict().items() if "register" not in k and "gain" not in k}
    fresh = VLMViTModel.from_pretrained(None, config=model.config, state_dict=state)
    assert fresh.layers[0].layer_scale1.gain.unique().tolist() == pytest.approx([1e-5])
    assert 0.005 < fresh.embeddings.register_tokens.std() < 0.05


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 30}, "not divisible"),
        ({"image_size": 30}, "not a multiple"),
        ({"position_embedding_type": "learnt"}, "one of learned"),
        ({"norm_type": "batch"}, "one of layernorm"),
        ({"hidden_size": 24, "position_embedding_type": "rope"}, "head size"),
    ],
)
def test_wrong_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VLMViTConfig(**{**TINY, **fields})


def test_wrong_inputs_are_refused():
    model = build()
    with pytest.raises(ValueError, match="must be \\(batch, 3, height, width\\)"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="resize images to 32 or 40"):
        model(torch.randn(1, 3, 32, 36))
    with pytest.raises(ValueError, match="There are: nano"):
        VLMViTConfig.from_preset("huge-ish")
