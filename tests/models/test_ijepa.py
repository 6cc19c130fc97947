import math

import pytest
import torch

from hf_vlm.models.modeling_ijepa import IJEPAConfig, IJEPAForPreTraining
from hf_vlm.models.ssl_masks import context_and_targets
from hf_vlm.models.vit_layers import sincos_positions

BACKBONE = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "position_embedding_type": "sincos",
    "use_class_token": False,
}
PREDICTOR = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(backbone=None, **options):
    torch.manual_seed(0)
    config = IJEPAConfig(backbone_config={**BACKBONE, **(backbone or {})}, predictor_config=PREDICTOR, **options)
    return IJEPAForPreTraining(config).train()


def sample_masks(images, seed=3):
    torch.manual_seed(seed)
    context, targets = context_and_targets(images, (8, 8))
    return {"context_indices": context, "target_indices": targets}


def reference_loss(model, images, context_indices, target_indices):
    """Image by image and block by block: all patches put into the order of the image, no two blocks together."""
    num_prefix, predictor = model.config.backbone_config.num_prefix_tokens, model.predictor
    positions = sincos_positions(16, (8, 8)).to(images.dtype)
    losses, context_losses = [], []
    for image, context, blocks in zip(images, context_indices, target_indices, strict=True):
        truth = model.teacher["backbone"](image[None]).last_hidden_state[0, num_prefix:].detach()
        encoded = model.backbone(image[None], visible_indices=context[None]).last_hidden_state[0]
        tokens = predictor.embed(encoded)
        for block in blocks:
            seen = {int(patch): tokens[num_prefix + index] + positions[patch] for index, patch in enumerate(context)}
            hidden = {int(patch): predictor.mask_token[0, 0] + positions[patch] for patch in block}
            patches = sorted({**seen, **hidden})
            sequence = torch.stack([*tokens[:num_prefix], *({**seen, **hidden}[patch] for patch in patches)])[None]
            for layer in predictor.layers:
                sequence = layer(sequence)
            predicted = predictor.predict(predictor.norm(sequence))[0, num_prefix:]
            errors = {}
            for index, patch in enumerate(patches):
                target = (truth[patch] - truth[patch].mean()) / (truth[patch].var(correction=0) + 1e-5).sqrt()
                error = (predicted[index] - target).abs()
                errors[patch] = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
            losses += [errors[patch] for patch in block.tolist()]
            for patch in context.tolist():
                distance = min(math.hypot(patch // 8 - other // 8, patch % 8 - other % 8) for other in block.tolist())
                context_losses.append(errors[patch] / math.sqrt(distance))
    return sum(losses) / len(losses) + model.config.context_loss_weight * sum(context_losses) / len(context_losses)


@pytest.mark.parametrize("backbone", [{}, {"use_class_token": True, "num_register_tokens": 2}])
@pytest.mark.parametrize("context_loss_weight", [0.0, 0.5])
def test_loss_and_gradients_equal_a_slow_reference(backbone, context_loss_weight):
    model = build(backbone, context_loss_weight=context_loss_weight).double()
    with torch.no_grad():  # a teacher that is not the student
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images, masks = torch.randn(2, 3, 32, 32, dtype=torch.float64), sample_masks(2)
    output, expected = model(images[:, None], **masks), reference_loss(model, images, **masks)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(output.loss, learned)  # all of them take part
    torch.testing.assert_close(ours, torch.autograd.grad(expected, learned), rtol=1e-4, atol=1e-6)


def test_only_the_context_reaches_the_encoder():
    model, masks = build(), sample_masks(2)
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    seen = ~IJEPAForPreTraining.sample_mask(model.config, (8, 8), 2)  # as `sample_masks` samples them
    assert [row.nonzero()[:, 0].tolist() for row in seen] == masks["context_indices"].tolist()
    predictions = model(images, **masks).predictions
    pixels = seen.view(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels, images, torch.randn_like(images))
    assert torch.equal(model(other, **masks).predictions, predictions)
    assert not torch.equal(model(images + 1, **masks).predictions, predictions)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (3, 3), (12, 16), (7, 5)])
def test_blocks_are_those_of_the_paper_on_every_grid(grid):
    """Targets: rectangles of one size a step, in range but for whole patches. Context: no target, never empty."""
    rows, columns = grid
    num_patches, coverage, smallest = rows * columns, torch.zeros(rows, columns), 1.0
    for seed in range(60):
        torch.manual_seed(seed)
        context, targets = context_and_targets(16, grid)
        sizes = set()
        for seen, blocks in zip(context.tolist(), targets.tolist(), strict=True):
            assert seen == sorted(set(seen))
            assert not set(seen) & {patch for block in blocks for patch in block}
            for block in blocks:
                row, column = sorted({p // columns for p in block}), sorted({p % columns for p in block})
                assert block == [r * columns + c for r in row for c in column]
                assert row == list(range(row[0], row[-1] + 1))
                assert column == list(range(column[0], column[-1] + 1))
                sizes.add((len(row), len(column)))
                coverage[row[0] : row[-1] + 1, column[0] : column[-1] + 1] += 1
        ((height, width),) = sizes
        # The sides are rounded to whole patches, and the area is never larger than asked for.
        area = math.sqrt(0.15 * num_patches)
        assert (height + 0.5 + 1) * (width + 0.5 + 1) > area**2
        assert height * width <= 0.2 * num_patches
        smallest = min(smallest, context.shape[1] / num_patches)
    assert smallest >= min(1 / 16, 1 - 4 * 0.2)
    assert coverage.min() > 0  # every patch is a target now and then


def test_blocks_differ_from_image_to_image_and_from_step_to_step():
    torch.manual_seed(0)
    context, targets = context_and_targets(32, (14, 14))
    assert len({tuple(row) for row in targets[:, 0].tolist()}) > 16
    assert len({tuple(row) for row in context.tolist()}) == 32
    sizes = {context_and_targets(2, (14, 14))[1].shape for _ in range(40)}
    assert len(sizes) > 3


def test_contexts_fill_their_block_where_no_target_lies():
    """With one image nothing is cut, so that the context is the block less the targets."""
    for seed in range(20):
        torch.manual_seed(seed)
        context, targets = context_and_targets(1, (14, 14), context_scale=(1.0, 1.0))
        assert set(context[0].tolist()) == set(range(196)) - set(targets.flatten().tolist())


def test_half_of_the_blocks_is_no_plan():
    with pytest.raises(ValueError, match="belong together"):
        build()(torch.randn(2, 3, 32, 32), target_indices=torch.zeros(2, 4, 4, dtype=torch.long))


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="2 x 2 patches is too small for 4 target blocks"):
        context_and_targets(1, (2, 2))
    with pytest.raises(ValueError, match="too small"):
        build()(torch.randn(2, 3, 8, 8))
    for options, words in (
        ({"target_scale": [0.2, 0.1]}, "target_scale must be two rising numbers"),
        ({"context_scale": [0.9, 1.1]}, "context_scale .* up to 1"),
        ({"target_scale": [0.2, 0.3]}, "leave no context"),
    ):
        with pytest.raises(ValueError, match=words):
            IJEPAConfig(backbone_config=BACKBONE, **options)


def test_initial_weights_follow_depth_and_width():
    """Deeper layers add less at first; the predictor's weights have the size that its width asks for."""
    model = build(backbone={"hidden_size": 64})
    for part, expected in {"backbone": 0.02, "predictor": math.sqrt(2 / (16 + 64))}.items():
        for depth, layer in enumerate(model.get_submodule(part).layers, start=1):
            found = layer.mlp.down_projection.weight.std().item()
            assert found == pytest.approx(expected / math.sqrt(2 * depth), rel=0.1), (part, depth)
    assert model.predictor.layers[0].mlp.up_projection.weight.std().item() == pytest.approx(
        math.sqrt(2 / (16 + 64)), rel=0.1
    )
    weights = model.backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.teacher["backbone"].state_dict().items())


def test_a_collapse_shows_in_the_spread_of_the_targets():
    """In noise there is nothing to predict: with a quick teacher both learn to give the same for all images."""
    model, images = build(), torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    outputs = []
    for seed in range(100):
        outputs.append(model(images, **sample_masks(8, seed)))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(0.5)
    assert outputs[0].feature_std > 0.15
    assert outputs[-1].feature_std < 0.05
    assert outputs[-1].loss < 0.02  # which looks like a success
    features = model.teacher["backbone"](images).last_hidden_state.double()
    mean, deviation = features.mean(-1, keepdim=True), features.std(-1, keepdim=True, correction=0)
    spread = ((features - mean) / deviation).std(0).mean().item()
    assert model(images).feature_std.item() == pytest.approx(spread, rel=1e-3)


@pytest.mark.slow
def test_a_compiled_step_takes_masks_of_any_size():
    """Masks are sampled outside the graph; once both sizes have changed they are variables and nothing recompiles."""
    torch._dynamo.reset()
    model, images = build({"num_hidden_layers": 1}), torch.randn(4, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    sizes = []
    for step, seed in enumerate((0, 2, 3, 4, 5)):
        masks = sample_masks(4, seed)
        sizes.append((masks["context_indices"].shape[1], masks["target_indices"].shape[2]))
        torch.manual_seed(seed)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            loss = compiled(images).loss
        torch.testing.assert_close(loss, model(images, **masks).loss)
    torch._dynamo.reset()
    assert len(set(sizes)) == len(sizes)
    assert all(first != second for first, second in zip(*sizes[:2], strict=True))
