"""Products that are faster on the CPU must be exact, and a model must not change by them."""

import time

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_vlm.features import device
from hf_vlm.features.device import MAX_ERROR, enable_fast_matmul, to_best_device
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel


def test_allowed_products_are_as_exact_as_float32():
    enable_fast_matmul()
    torch.manual_seed(0)
    for rows, inner, columns in ((3, 700, 5), (512, 64, 512), (1000, 192, 768)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = left.double() @ right.double()
        assert ((left @ right).double() - exact).norm() < MAX_ERROR * exact.norm()


def test_products_that_round_are_refused(monkeypatch):
    """As where the processor multiplies in bfloat16 when it may."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    multiply = torch.Tensor.__matmul__

    def rounded(left, right):
        if left.dtype == torch.float32 and setting.fp32_precision == "bf16":
            return multiply(left.bfloat16(), right.bfloat16()).float()
        return multiply(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    setting.fp32_precision = "ieee"
    assert not enable_fast_matmul.__wrapped__()
    assert setting.fp32_precision == "ieee"
    setting.fp32_precision = before


def test_the_trial_does_not_count_what_other_work_takes(monkeypatch):
    """A process that waits for its turn, here asleep, has not multiplied any longer."""
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: time.sleep(0.02))
    assert device._seconds(torch.ones(1), torch.ones(1)) < 0.01


def test_attention_has_the_values_and_gradients_of_torchs():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, 8, requires_grad=True) for tokens in (5, 7, 7)]
    direction = torch.randn(2, 5, 3, 8)
    found = []
    for attend in (sdpa_attention_forward, device._attend):
        output = attend(None, *inputs, None, scaling=0.3, dropout=0.0, is_causal=False)[0]
        found.append([output, *torch.autograd.grad((output * direction).sum(), inputs)])
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        device._attend(
            None, *[tensor[:, :, :, :n] for tensor, n in zip(inputs, (8, 4, 8))], None, scaling=1.0, dropout=0.0
        )
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_attention_of_inputs_without_a_gradient():
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    key.requires_grad_()
    device._attend(None, query, key, value, None, scaling=1.0, dropout=0.0)[0].sum().backward()
    assert query.grad is None
    assert key.grad is not None
    with torch.no_grad():
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2)
        torch.testing.assert_close(
            device._attend(None, query, key, value, None, scaling=1.0, dropout=0.0)[0], expected
        )


def test_a_placed_model_computes_what_it_did(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = VLMViTModel(VLMViTConfig(**sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    placed = to_best_device(model, "cpu")
    assert placed is model
    torch.testing.assert_close(placed(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert device.ATTENTION not in (tmp_path / "config.json").read_text()
