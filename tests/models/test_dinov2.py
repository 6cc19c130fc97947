import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining, masked_counts, view_loss
from hf_vlm.models.ssl_prototypes import Centering, PrototypeHead, cross_entropy, entropy, koleo_loss, sinkhorn

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HEAD = {"num_prototypes": 24, "head_hidden_size": 32, "bottleneck_size": 16}


def build(**options):
    torch.manual_seed(0)
    return DINOv2ForPreTraining(DINOv2Config(backbone_config=BACKBONE, **{**HEAD, **options})).train()


def batch(size=6):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(size, 2, 3, 32, 32), "local_pixel_values": torch.randn(size, 3, 3, 16, 16)}


def test_sinkhorn_balances_rows_and_columns():
    """The iteration of SwAV, algorithm in its appendix A, in loops and float64."""
    torch.manual_seed(0)
    logits = torch.rand(7, 5) * 2 - 1
    expected = [[math.exp(value / 0.1) for value in row] for row in logits.double().tolist()]
    for _ in range(3):
        for k in range(5):
            total = sum(row[k] for row in expected)
            for row in expected:
                row[k] /= total * 5
        for row in expected:
            total = sum(row)
            row[:] = [value / total / 7 for value in row]
    found = sinkhorn(logits, torch.tensor(0.1))
    torch.testing.assert_close(found, torch.tensor(expected).float() * 7, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(7))
    many = sinkhorn(logits, torch.tensor(0.1), num_iterations=200)
    torch.testing.assert_close(many.sum(0), torch.full((5,), 7 / 5), atol=1e-3, rtol=1e-3)


def test_sinkhorn_of_a_cold_teacher_stays_finite():
    logits = torch.full((4, 3), -1.0)
    logits[:, 0] = 1.0
    assert sinkhorn(logits, torch.tensor(0.02)).isfinite().all()


def test_centering_subtracts_a_running_mean():
    torch.manual_seed(0)
    centering = Centering(4, momentum=0.9).train()
    first, second = torch.randn(5, 4), torch.randn(3, 4)
    torch.testing.assert_close(centering(first, torch.tensor(0.5)), (first / 0.5).softmax(-1))
    center = 0.1 * first.mean(0)
    torch.testing.assert_close(centering(second, torch.tensor(0.5)), ((second - center) / 0.5).softmax(-1))
    torch.testing.assert_close(centering.center[0], 0.9 * center + 0.1 * second.mean(0))
    centering.eval()(second, torch.tensor(0.5))
    torch.testing.assert_close(centering.center[0], 0.9 * center + 0.1 * second.mean(0))


def test_cross_entropy_equals_torchs():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.randn(6, 9).softmax(-1)
    expected = F.cross_entropy(logits / 0.1, targets, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets, 0.1), expected)


def test_view_loss_is_the_mean_over_all_pairs():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 4, 7).double(), torch.randn(2, 4, 7).double().softmax(-1)
    pairs = [
        -(targets[teacher, image] * (logits[student, image] / 0.1).log_softmax(-1)).sum()
        for teacher in range(2)
        for student in range(5)
        for image in range(4)
        if teacher != student
    ]
    assert view_loss(logits, targets, 0.1).item() == pytest.approx((sum(pairs) / len(pairs)).item(), rel=1e-6)
    assert view_loss(logits[:2], targets, 0.1).isfinite()


def test_koleo_is_the_log_distance_to_the_nearest():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(8, 5).double(), dim=-1).requires_grad_()
    distances = [min((a - b).norm() for j, b in enumerate(features) if j != i) for i, a in enumerate(features)]
    expected = -sum(distance.log() for distance in distances) / 8
    found = koleo_loss(features, features, 0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, features)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_koleo_of_the_same_image_twice_is_finite():
    """The fault of issue 143 of the official code: infinite on small sets."""
    features = F.normalize(torch.ones(4, 5), dim=-1).requires_grad_()
    loss = koleo_loss(features, features, 0)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


def test_head_gives_cosines():
    torch.manual_seed(0)
    head = PrototypeHead(8, 16, 4, 6)
    features = torch.randn(5, 8)
    embedded = head.mlp(features)
    expected = F.cosine_similarity(embedded[:, None], head.prototypes.weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=1e-5)


def test_prototypes_are_initialised_as_in_the_official_code():
    """Its `weight_norm(nn.Linear(...))` starts from torch's rule: uniform up to 1 / sqrt(inputs)."""
    weight = build(num_prototypes=512).head.prototypes.weight
    assert weight.abs().max().item() == pytest.approx(1 / 4, rel=1e-2)  # of 16 inputs
    assert weight.std().item() == pytest.approx(1 / (4 * 3**0.5), rel=2e-2)


def reference_loss(model, pixel_values, local_pixel_values, masked):
    """The three losses in plain loops, each crop in a pass of its own, targets by the teacher's own passes."""
    config, number = model.config, len(pixel_values)
    student, teacher = model.backbone, model.teacher["backbone"]
    views = [pixel_values[:, 0], pixel_values[:, 1]]
    masks = masked.split(number)
    encoded = [
        student(view, masked=mask, mask_token=model.mask_token) for view, mask in zip(views, masks, strict=True)
    ]
    class_tokens = [output.last_hidden_state[:, 0] for output in encoded]
    small = [student(local_pixel_values[:, i]).last_hidden_state[:, 0] for i in range(local_pixel_values.shape[1])]
    logits = [model.head(tokens) / config.student_temperature for tokens in (*class_tokens, *small)]
    temperature = torch.tensor(config.warmup_teacher_temperature)
    of_teacher = [teacher(view).last_hidden_state for view in views]
    targets = sinkhorn(model.teacher["head"](torch.cat([tokens[:, 0] for tokens in of_teacher])), temperature)
    pairs = []
    for j, target in enumerate(targets.split(number)):
        pairs += [-(target * row.log_softmax(-1)).sum(-1).mean() for i, row in enumerate(logits) if i != j]
    hidden = torch.cat([tokens[:, 1:] for tokens in of_teacher])[masked]
    patch_targets = sinkhorn(model.teacher["head"](hidden), temperature)
    seen = torch.cat([output.last_hidden_state[:, 1:] for output in encoded])[masked]
    patch_logits = model.head(seen) / config.student_temperature
    losses = -(patch_targets * patch_logits.log_softmax(-1)).sum(-1)
    images = masked.nonzero()[:, 0]
    ibot = sum(losses[images == i].mean() for i in images.unique()) / len(masked)
    spread = sum(koleo_loss(F.normalize(t, dim=-1), F.normalize(t, dim=-1), 0) for t in class_tokens)
    return sum(pairs) / len(pairs), ibot, spread


def test_loss_and_gradients_equal_a_slow_reference():
    model, inputs = build(frozen_prototypes=0.0).double(), batch()
    inputs = {name: value.double() for name, value in inputs.items()}
    masked = model.sample_mask(model.config, (4, 4), 12)
    output = model(**inputs, masked=masked)
    expected = reference_loss(model, **inputs, masked=masked)
    for found, value in zip((output.dino, output.ibot, output.koleo), expected, strict=True):
        assert found.item() == pytest.approx(value.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((expected[0] + expected[1] + 0.1 * expected[2]).item(), rel=1e-5)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(output.loss, learned)
    theirs = torch.autograd.grad(expected[0] + expected[1] + 0.1 * expected[2], learned)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_masks_hide_as_many_patches_as_planned():
    config = DINOv2Config(backbone_config=BACKBONE)
    counts = masked_counts(config, (14, 14), 8)
    assert counts == [round(196 * ratio) for ratio in (0.15, 0.25, 0.35, 0.45)] + [0] * 4
    torch.manual_seed(0)
    masked = DINOv2ForPreTraining.sample_mask(config, (14, 14), 8)
    assert sorted(masked.sum(1).tolist(), reverse=True) == sorted(counts, reverse=True)


def test_a_collapse_shows_in_the_logged_entropies():
    """Without a moving centre, and with nothing that spreads, all images end in one prototype."""
    options = {"centering": "centering", "center_momentum": 1.0, "koleo_weight": 0.0, "ibot_weight": 0.0}
    model, inputs = build(frozen_prototypes=0.0, momentum=0.5, **options), batch(8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(80):
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.0)
    assert output.dino < 0.1
    assert output.teacher_marginal_entropy < 0.05


def test_teacher_temperature_rises_with_training():
    model, inputs = build(koleo_weight=0.0), batch()
    entropies = []
    for progress in (0.0, 0.15, 0.3, 1.0):
        model.progress.fill_(progress)
        entropies.append(model(**inputs).teacher_entropy.item())
    assert entropies[0] < entropies[1] < entropies[2]
    assert entropies[2] == pytest.approx(entropies[3])


def test_entropy_is_relative_to_the_largest():
    assert entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(1.0)
    assert entropy(torch.eye(8)).item() == pytest.approx(0.0)


def test_the_teachers_encoder_is_what_users_get():
    model = build()
    assert model.trained_encoder is model.teacher["backbone"]
    with pytest.raises(ValueError, match="centering"):
        DINOv2Config(centering="mean")
    for name, value in (
        *(("mask_ratio_range", ratios) for ratios in ([0.5, 0.1], [0.1, 0.2, 0.3])),
        *(("mask_probability", 50), ("student_temperature", 0.0), ("momentum", 1.5), ("ibot_weight", -1.0)),
    ):
        with pytest.raises(ValueError, match=f"DINOv2Config: {name} must be"):
            DINOv2Config(**{name: value})
