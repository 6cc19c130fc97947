"""Parts of the detector against naive loops in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_vlm.models.configuration_detection import VLMViTDetectionConfig
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.detection_layers import (
    DeformableAttention,
    DetectionNeck,
    SamplingOffsets,
    box_position_embedding,
    grid_anchors,
    refine_boxes,
)


def naive_bilinear(feature_map: Tensor, x: float, y: float) -> Tensor:
    """Value of a map (channels, rows, columns) at fractions x, y of the image; nothing lies outside it."""
    channels, rows, columns = feature_map.shape
    px, py = x * columns - 0.5, y * rows - 0.5
    value = torch.zeros(channels, dtype=torch.float64)
    for row, column in itertools.product((math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)):
        if 0 <= row < rows and 0 <= column < columns:
            value += (1 - abs(py - row)) * (1 - abs(px - column)) * feature_map[:, row, column]
    return value


def naive_deformable(
    module: DeformableAttention, queries: Tensor, boxes: Tensor, source: Tensor, level_sizes: list[tuple[int, int]]
) -> Tensor:
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    batch, num_queries, dim = queries.shape
    value = module.value_projection(source).view(batch, -1, heads, dim // heads)
    offsets = module.sampling_offsets(queries).view(batch, num_queries, heads, levels, points, 2)
    weights = module.attention_weights(queries).view(batch, num_queries, heads, levels * points).softmax(-1)
    output = torch.zeros(batch, num_queries, heads, dim // heads, dtype=torch.float64)
    for b, q, h, level, point in itertools.product(*map(range, (batch, num_queries, heads, levels, points))):
        start = sum(rows * columns for rows, columns in level_sizes[:level])
        rows, columns = level_sizes[level]
        feature_map = value[b, start : start + rows * columns, h].T.reshape(-1, rows, columns)
        cx, cy, width, height = boxes[b, q].tolist()
        dx, dy = offsets[b, q, h, level, point].tolist()
        sample = naive_bilinear(feature_map, cx + dx / points * width / 2, cy + dy / points * height / 2)
        output[b, q, h] += weights[b, q, h, level * points + point] * sample
    return module.output_projection(output.flatten(2))


@pytest.mark.parametrize("level_sizes", [[(3, 5)], [(2, 3), (4, 6)]])
@torch.no_grad()
def test_deformable_attention_agrees_with_a_loop(level_sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    module = DeformableAttention(hidden_size=8, num_heads=2, num_levels=len(level_sizes), num_points=3)
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    queries, boxes = torch.randn(2, 4, 8), torch.rand(2, 4, 4)
    source = torch.randn(2, sum(rows * columns for rows, columns in level_sizes), 8)
    output = module(queries, boxes, source, level_sizes)
    expected = naive_deformable(
        copy.deepcopy(module).double(), queries.double(), boxes.double(), source.double(), level_sizes
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_each_head_starts_in_its_own_direction() -> None:
    offsets = SamplingOffsets(8, num_heads=4, num_levels=2, num_points=2).initial_bias().view(4, 2, 2, 2)
    for level, point in itertools.product(range(2), range(2)):
        expected = (point + 1) * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        torch.testing.assert_close(offsets[:, level, point], expected)


def test_anchors_lie_on_the_cells() -> None:
    anchors = grid_anchors([(2, 4), (1, 1)], 2.0, torch.device("cpu"))
    expected = [[(c + 0.5) / 4, (r + 0.5) / 2, 2 / 4, 2 / 2] for r in range(2) for c in range(4)]
    torch.testing.assert_close(anchors, torch.tensor([*expected, [0.5, 0.5, 2.0, 2.0]]))


def test_boxes_are_refined_in_units_of_their_reference() -> None:
    reference, deltas = torch.tensor([0.5, 0.4, 0.2, 0.1]), torch.tensor([1.0, -2.0, math.log(2), 0.0])
    torch.testing.assert_close(refine_boxes(reference, deltas), torch.tensor([0.7, 0.2, 0.4, 0.1]))
    assert torch.isfinite(refine_boxes(reference, torch.full((4,), 1e4))).all()


def test_position_embedding_agrees_with_a_loop() -> None:
    box = [0.1, 0.2, 0.3, 0.4]
    expected = []
    for value in box:
        angles = [2 * math.pi * value / 10000 ** (i / 3) for i in range(3)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(box_position_embedding(torch.tensor(box), 6), torch.tensor(expected))


@torch.no_grad()
def test_the_finer_neck_level_stays_aligned_with_the_coarse_one() -> None:
    torch.manual_seed(0)
    encoder = VLMViTConfig(image_size=48, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    neck = DetectionNeck(
        VLMViTDetectionConfig(backbone_config=encoder, hidden_size=32, neck_num_blocks=1, num_neck_levels=2)
    )
    maps = [torch.randn(1, 32, 6, 6) for _ in range(2)]
    changed = [m.clone() for m in maps]
    changed[0][:, :, 5, 0] += 5  # lower left cell
    for level, (before, after) in enumerate(zip(neck(maps), neck(changed))):
        size = 6 * 2**level
        assert before.shape == (1, 32, size, size)
        rows, columns = (before - after).abs().amax(1)[0].nonzero().unbind(-1)
        assert (int(rows.max()), int(columns.min())) == (size - 1, 0)
        assert int(rows.min()) >= 3
        assert int(columns.max()) <= 3 + level
