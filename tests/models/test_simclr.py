import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlm.metrics import feature_std
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining, nt_xent
from hf_vlm.models.ssl_contrastive import contrastive_cross_entropy, fast_contrastive_cross_entropy

BACKBONE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def reference_nt_xent(projections, temperature):
    """The formula of the paper, equation 1, as a loop in float64."""
    z = projections.double()
    z = z / z.norm(dim=1, keepdim=True)
    n = len(z) // 2
    total = 0.0
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        similarity = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n)]
        total -= math.log(similarity[partner] / sum(s for k, s in enumerate(similarity) if k != i))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_nt_xent_equals_the_formula(temperature):
    torch.manual_seed(0)
    projections = F.normalize(torch.randn(14, 8), dim=1)
    loss, accuracy = nt_xent(projections, temperature)
    assert loss.item() == pytest.approx(reference_nt_xent(projections, temperature), rel=1e-5)
    similarity = projections @ projections.T - 10 * torch.eye(14)
    nearest = [int(row.argmax()) == (i + 7) % 14 for i, row in enumerate(similarity)]
    assert accuracy.item() == pytest.approx(sum(nearest) / 14)


def test_the_fast_cross_entropy_equals_the_plain_one():
    """With more keys than queries, as where there are several ranks, and gradients of both."""
    torch.manual_seed(0)
    found = []
    for function in (contrastive_cross_entropy, fast_contrastive_cross_entropy):
        torch.manual_seed(0)
        queries, keys = (F.normalize(torch.randn(n, 6), dim=1).requires_grad_() for n in (4, 12))
        loss, accuracy = function(queries, keys, torch.tensor([4, 5, 6, 7]), torch.tensor([6, 7, 4, 5]), 0.1)
        (3 * loss).backward()
        found.append([loss, accuracy, queries.grad, keys.grad])
    torch.testing.assert_close(*found)


def test_nt_xent_has_the_gradient_of_the_formula():
    torch.manual_seed(0)
    projections = F.normalize(torch.randn(10, 6), dim=1)
    ours, plain = projections.clone().requires_grad_(), projections.clone().requires_grad_()
    (3 * nt_xent(ours, 0.1)[0]).backward()
    similarity = plain @ plain.T / 0.1
    similarity = similarity.masked_fill(torch.eye(10, dtype=torch.bool), -math.inf)
    (3 * F.cross_entropy(similarity, torch.arange(10).roll(5))).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_nt_xent_stays_finite_where_weights_vanish():
    """At a low temperature all weight lies on one neighbour, and that of the partner is zero in float32."""
    projections = F.normalize(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.01], [0.0, -1.0]]), dim=1
    ).requires_grad_()
    loss, _ = nt_xent(projections, 0.005)
    loss.backward()
    assert loss.item() == pytest.approx(reference_log_nt_xent(projections.detach(), 0.005), rel=1e-5)
    assert projections.grad.isfinite().all()


def reference_log_nt_xent(projections, temperature):
    """The formula in float64 with logarithms taken first."""
    scores = (projections.double() @ projections.double().T / temperature).fill_diagonal_(-math.inf)
    half = len(scores) // 2
    return F.cross_entropy(scores, torch.arange(2 * half).roll(half)).item()


def test_nt_xent_is_computed_in_float32():
    torch.manual_seed(0)
    projections = F.normalize(torch.randn(64, 16), dim=1).bfloat16()
    loss, _ = nt_xent(projections, 0.1)
    assert loss.dtype == torch.float32
    similarity = projections.float() @ projections.float().T / 0.1
    similarity.fill_diagonal_(-math.inf)
    expected = F.cross_entropy(similarity, torch.arange(64).roll(32))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_partners_of_a_batch_are_the_views_of_one_image():
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=BACKBONE)).train()
    images = torch.randn(6, 1, 3, 16, 16)
    same = model(images.expand(-1, 2, -1, -1, -1).contiguous())
    assert same.accuracy == 1
    first, second = same.projections.chunk(2)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_the_head_is_initialised_by_its_inputs_and_ends_in_batch_norm(tmp_path):
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=BACKBONE, projection_hidden_size=64))
    for layer in (layer for layer in model.projection_head if isinstance(layer, torch.nn.Linear)):
        assert layer.weight.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.1)
    projected = model.train().projection_head(3 + torch.randn(50, 32))  # (50, projection_size)
    torch.testing.assert_close(projected.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.std(0, correction=0), torch.ones(128), atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = SimCLRForPreTraining.from_pretrained(tmp_path).projection_head
    for name, value in model.projection_head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_spread_is_that_of_the_projections():
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=BACKBONE, projection_hidden_size=64))
    output = model(torch.randn(8, 2, 3, 16, 16))
    spread = feature_std(output.projections) * math.sqrt(16 / 15)  # of a sample: 16 views
    assert output.feature_std.item() == pytest.approx(spread, rel=1e-4)


def test_wrong_views_are_refused():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=BACKBONE))
    with pytest.raises(ValueError, match="2 views"):
        model(torch.randn(2, 3, 3, 16, 16))
    with pytest.raises(ValueError, match="temperature"):
        SimCLRConfig(temperature=0)
