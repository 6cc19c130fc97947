import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlm.models.modeling_lejepa import LeJEPAConfig, LeJEPAForPreTraining, invariance, sample_slices, sigreg

BACKBONE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(**options):
    torch.manual_seed(0)
    options = {"projection_hidden_size": 64, "projection_size": 16, "num_slices": 64, **options}
    return LeJEPAForPreTraining(LeJEPAConfig(backbone_config=BACKBONE, **options)).train()


def reference_sigreg(projections, slices, num_knots=17, max_knot=3.0):
    """The paper's formula for one slice of one view at a time, in float64, by autograd."""
    knots = torch.linspace(0, max_knot, num_knots, dtype=torch.float64)
    normal = (-knots.square() / 2).exp()
    statistics = []
    for view in projections.double():
        for direction in slices.double().T:
            waves = torch.exp(1j * (view @ direction)[:, None] * knots)  # (rows, knots)
            error = (waves.mean(0) - normal).abs().square() * normal
            statistics.append(len(view) * 2 * torch.trapezoid(error, knots))
    return torch.stack(statistics).mean()


def test_sigreg_and_its_gradient_equal_the_formula():
    torch.manual_seed(0)
    slices = F.normalize(torch.randn(6, 5), dim=0)
    ours = (torch.randn(3, 9, 6) * 2 + 0.3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    found, expected = sigreg(ours, slices), reference_sigreg(theirs, slices)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_sigreg_of_large_projections_keeps_its_precision():
    """Waves are rotated from knot to knot; far from zero their angles are large."""
    torch.manual_seed(0)
    slices = F.normalize(torch.randn(6, 5), dim=0)
    projections = torch.randn(1, 40, 6) * 50
    assert sigreg(projections, slices).item() == pytest.approx(reference_sigreg(projections, slices).item(), rel=1e-3)


def test_sigreg_is_least_for_a_normal_sample():
    torch.manual_seed(0)
    slices = sample_slices(8, 64, torch.device("cpu"))
    normal = sigreg(torch.randn(1, 512, 8), slices)
    for other in (torch.zeros(1, 512, 8), torch.randn(1, 512, 8) * 3, torch.randn(1, 512, 8) + 1):
        assert sigreg(other, slices) > 10 * normal
    # All the same: |ECF| is 1 at every t, and the statistic N x integral (1 - phi)^2 phi.
    knots = torch.linspace(0, 3, 17)
    phi = (-knots.square() / 2).exp()
    expected = 512 * 2 * torch.trapezoid((1 - phi).square() * phi, knots)
    assert sigreg(torch.zeros(1, 512, 8), slices).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1.0), (2.0, 0.0)])
def test_knots_are_enough_for_the_integral(scale, shift):
    """Over all t it has a closed form, sums over pairs of the values."""
    torch.manual_seed(0)
    values = (scale * torch.randn(64) + shift).double()
    of_pairs = math.sqrt(2 * math.pi) * (-(values[:, None] - values).square() / 2).exp().sum() / 64
    of_rows = math.sqrt(math.pi) * (-values.square() / 4).exp().sum()
    expected = of_pairs - 2 * of_rows + 64 * math.sqrt(2 * math.pi / 3)
    found = sigreg(values.float()[None, :, None], torch.ones(1, 1))
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_the_backward_pass_keeps_the_sliced_projections_alone():
    kept = []
    projections, slices = torch.randn(2, 64, 4).requires_grad_(), sample_slices(4, 8, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sigreg(projections, slices).backward()
    assert [tuple(shape) for shape in kept if shape.numel() >= 2 * 64 * 8] == [(2, 64, 8)]


def test_statistics_are_in_float32_under_autocast():
    slices = sample_slices(16, 64, torch.device("cpu"))
    torch.manual_seed(0)
    model, large = build(), torch.randn(4, 2, 3, 16, 16)
    heads = []
    model.projection_head.register_forward_hook(lambda module, inputs, output: heads.append(output.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(large, slices=slices)
    projections = heads[0].unflatten(0, (2, 4))
    assert output.sigreg.item() == pytest.approx(reference_sigreg(projections, slices).item(), rel=1e-5)
    assert output.invariance.item() == pytest.approx(invariance(projections.double(), 2).item(), rel=1e-5)
    output.loss.backward()


def test_each_view_is_a_sample_of_its_own():
    """Two views, each far from normal, that would be normal when thrown together."""
    torch.manual_seed(0)
    together = torch.randn(2000, 4).sort(0).values
    apart = sigreg(together.unflatten(0, (2, 1000)), torch.eye(4))
    assert apart > 20 * sigreg(together[None], torch.eye(4))


def test_invariance_counts_all_views_and_pulls_them_to_the_large_ones():
    torch.manual_seed(0)
    views = torch.randn(5, 3, 4).double()
    expected = 0.0
    for image in range(3):
        centre = (views[0, image] + views[1, image]) / 2
        expected += sum(((view[image] - centre) ** 2).sum() for view in views)
    assert invariance(views, 2).item() == pytest.approx(expected.item() / (5 * 3 * 4))


def test_slices_are_unit_and_new_each_time():
    torch.manual_seed(0)
    first, second = (sample_slices(5, 7, torch.device("cpu")) for _ in range(2))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(7))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("join_views", [False, True])
def test_parts_are_weighted_and_small_views_take_part(join_views):
    model = build(sigreg_weight=0.3, join_views=join_views)
    large, small = torch.randn(4, 2, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    slices = sample_slices(16, 64, torch.device("cpu"))
    output = model(large, small, slices=slices)
    torch.testing.assert_close(output.loss, 0.7 * output.invariance + 0.3 * output.sigreg)
    pooled = [model.backbone(view).pooler_output for view in (*large.unbind(1), *small.unbind(1))]
    projections = build(sigreg_weight=0.3).projection_head(torch.cat(pooled)).unflatten(0, (5, 4))
    torch.testing.assert_close(output.invariance, invariance(projections, 2))
    samples = projections.reshape(1, 20, 16) if join_views else projections
    assert output.sigreg.item() == pytest.approx(reference_sigreg(samples, slices).item(), rel=1e-5)


def train(model, noise, num_steps=80):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.randn(32, 1, 3, 16, 16)
    for _ in range(num_steps):
        views = images + noise * torch.randn(32, 4, 3, 16, 16)
        output = model(views[:, :2], views[:, 2:, :, :8, :8].contiguous())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return output


def test_learns_without_a_collapse():
    output = train(build(), noise=0.1)
    assert 0.8 < output.feature_std < 1.5
    assert output.invariance < 0.3
    assert output.sigreg < 3


def test_without_sigreg_it_collapses_visibly():
    output = train(build(sigreg_weight=0.0), noise=1.0)  # views that agree in little
    assert output.invariance < 1e-3
    assert output.sigreg > 3
    assert output.feature_std < 0.05


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="sigreg_weight"):
        LeJEPAConfig(sigreg_weight=1.5)
    with pytest.raises(ValueError, match="num_knots"):
        LeJEPAConfig(num_knots=1)
    with pytest.raises(ValueError, match="only one"):
        build()(torch.randn(4, 1, 3, 16, 16))
    for local in (torch.randn(2, 2, 3, 8, 8), torch.randn(4, 3, 8, 8)):  # fewer images, no axis of views
        with pytest.raises(ValueError, match=r"local_pixel_values must be \(4 images"):
            build()(torch.randn(4, 2, 3, 16, 16), local)
