"""Products that are faster on the CPU must be exact, and a model must not change by them."""

import time

import pytest
import torch
from transformers import AutoConfig, AutoModel
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


@pytest.mark.parametrize(("with_bias", "is_causal"), [(False, False), (True, False), (False, True)])
def test_attention_has_the_values_and_gradients_of_torchs(with_bias, is_causal):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, 8, requires_grad=True) for tokens in (5, 7, 7)]
    bias = torch.randn(2, 1, 5, 7, requires_grad=True) if with_bias else None
    direction = torch.randn(2, 5, 3, 8)
    found = []
    for attend in (sdpa_attention_forward, device._attend):
        output = attend(None, *inputs, bias, scaling=0.3, dropout=0.0, is_causal=is_causal)[0]
        wanted = inputs if bias is None else [*inputs, bias]
        found.append([output, *torch.autograd.grad((output * direction).sum(), wanted)])
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        device._attend(
            None, *[tensor[:, :, :, :n] for tensor, n in zip(inputs, (8, 4, 8))], None, scaling=1.0, is_causal=False
        )
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_attention_of_inputs_without_a_gradient():
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    key.requires_grad_()
    device._attend(None, query, key, value, None, scaling=1.0, is_causal=False)[0].sum().backward()
    assert query.grad is None
    assert key.grad is not None
    with torch.no_grad():
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2)
        torch.testing.assert_close(
            device._attend(None, query, key, value, None, scaling=1.0, is_causal=False)[0], expected
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


@pytest.mark.parametrize(
    ("name", "num_key_value_heads"),
    [("bert", None), ("clip_text_model", None), ("llama", 2)],
    ids=["bidirectional", "causal", "shared keys"],
)
def test_texts_of_several_lengths_in_one_batch(name, num_key_value_heads, monkeypatch):
    """Models of transformers make their masks of padding by the name of the attention, and some see no later token."""
    monkeypatch.setattr(device, "enable_fast_matmul", lambda: True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {} if num_key_value_heads is None else {"num_key_value_heads": num_key_value_heads}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, vocab_size=32, **sizes, **options)).eval()
    ids = torch.randint(3, 32, (3, 6))
    for mask in (torch.ones(3, 6, dtype=torch.int64), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])):
        model.set_attn_implementation("sdpa")
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        device.use_fast_cpu_matmul(model)
        assert model.config._attn_implementation == device.ATTENTION
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
