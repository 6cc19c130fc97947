"""Crops of several sizes encoded in one pass equal those of one pass per size."""

import pytest
import torch

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.packing import Packing

VARIANTS = {
    "learned": {},
    "rotary": {"position_embedding_type": "rope", "use_qk_norm": True, "num_register_tokens": 2},
    "no class token": {"use_class_token": False, "position_embedding_type": "sincos"},
}


def build(**options):
    torch.manual_seed(0)
    config = VLMViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, **options
    )
    return VLMViTModel(config).double()


def crops():
    torch.manual_seed(1)
    large, small = torch.randn(5, 3, 32, 32).double(), torch.randn(7, 3, 16, 24).double()
    return large, small, torch.rand(5, 16) < 0.4, torch.randn(1, 1, 32).double()


def test_unpacking_undoes_packing():
    groups = [torch.randn(2, 3, 4), torch.randn(5, 1, 4)]
    packing = Packing(((2, 3), (5, 1)))
    assert packing.pack(groups).shape == (1, 11, 4)
    assert all(torch.equal(*pair) for pair in zip(packing.unpack(packing.pack(groups)), groups, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_crops_equal_separate_passes_in_values_and_gradients(variant):
    model = build(**VARIANTS[variant]).train()
    large, small, masked, mask_token = crops()

    def run(outputs):
        model.zero_grad()
        first, second = outputs()
        (first.last_hidden_state.sin().sum() + second.pooler_output.cos().sum()).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        return [first.last_hidden_state, first.pooler_output, second.pooler_output], gradients

    packed, packed_gradients = run(lambda: model.encode_crops([large, small], masked=masked, mask_token=mask_token))
    apart, apart_gradients = run(lambda: (model(large, masked=masked, mask_token=mask_token), model(small)))
    torch.testing.assert_close(packed, apart)
    torch.testing.assert_close(packed_gradients, apart_gradients)


def test_stochastic_depth_keeps_its_fraction_of_each_group(monkeypatch):
    model = build(drop_path_rate=0.5).train()
    large, small, *_ = crops()
    kept = {len(large): torch.tensor([4, 0, 1]), len(small): torch.tensor([2, 6, 3])}
    for layer in model.layers:
        monkeypatch.setattr(layer.residual, "sample_kept", lambda num_samples, device: kept[num_samples])
    packed = model.encode_crops([large, small])
    apart = model(large), model(small)
    torch.testing.assert_close(packed[0].last_hidden_state, apart[0].last_hidden_state)
    torch.testing.assert_close(packed[1].pooler_output, apart[1].pooler_output)
    model.eval()
    assert not torch.allclose(apart[1].pooler_output, model(small).pooler_output)


def test_masked_patches_are_hidden():
    model = build().eval()
    large, _, masked, mask_token = crops()
    changed = large.clone()
    noise = torch.randn_like(large)
    pixels = masked.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(large)
    changed[pixels] = noise[pixels]
    hidden = [model(images, masked=masked, mask_token=mask_token).last_hidden_state for images in (large, changed)]
    assert torch.equal(*hidden)
    assert not torch.allclose(model(large).last_hidden_state, model(changed).last_hidden_state)
