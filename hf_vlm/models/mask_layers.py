"""The mask head of instance segmentation: a mask is the product of a map of features with what its query looks for."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_instance_segmentation import VLMViTInstanceSegmentationConfig
from .detection_layers import ConvNormAct

MIN_SIDE = 1e-4  # of a box, as a fraction of the image: only guards divisions
LOWEST_PRIOR = -30.0  # far from its box a mask is sure enough to be empty, and half precision can hold this


def box_prior(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Logits of the ellipses within boxes at points: 1 at the centre, 0 on the ellipse, negative beyond it.

    As the spatial prior of SMCA (arXiv 2101.07448) it says where a query's object is. Without it the features of a
    query alone would have to tell its object from all others that look the same.

    Args:
        boxes: (..., 4) as (cx, cy, w, h), fractions of the image as the points are; its leading dimensions, `x` and
            `y` are broadcast against each other.
    """
    centre_x, centre_y, width, height = boxes.float().unbind(-1)
    distance = ((x - centre_x) / width.clamp(min=MIN_SIDE)).square() + (
        (y - centre_y) / height.clamp(min=MIN_SIDE)
    ).square()
    return (1 - 4 * distance).clamp(min=LOWEST_PRIOR)


class MaskHead(nn.Module):
    """Masks of queries from the finest map of the neck, as in RF-DETR (arXiv 2511.09554), the image and their boxes.

    The map is enlarged, joined by the image's own pixels, as patches are coarser than the outlines of objects, and
    refined by one block per decoder layer, so that each layer's queries meet a map of their own. The blocks are plain
    convolutions of few channels: the backward pass of depthwise ones fails on some GPUs. What a query looks for in the
    map corrects the ellipse in its box.
    """

    def __init__(self, config: VLMViTInstanceSegmentationConfig):
        super().__init__()
        width, size, eps = config.hidden_size, config.mask_feature_size, config.layer_norm_eps
        self.stride = config.mask_stride
        self.scale = size**-0.5  # as in attention: or else new masks would be sure of themselves
        self.reduction = nn.Conv2d(width, size, 1)
        self.image_projection = nn.Conv2d(config.encoder.num_channels, size, self.stride, self.stride)
        self.blocks = nn.ModuleList(ConvNormAct(size, size, 3, eps) for _ in range(config.num_decoder_layers))
        self.query_mlp = nn.Sequential(
            nn.LayerNorm(width, eps=eps), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.query_projection = nn.Linear(width, size)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, feature_map: Tensor, queries: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
        """Mask logits (batch, queries, rows, columns) of the last decoder layer's queries (batch, queries, dim), with
        their boxes (batch, queries, 4), in images (batch, channels, height, width).
        """
        *_, pixels = self.pixel_maps(feature_map, image)
        rows, columns = pixels.shape[2:]
        y = (torch.arange(rows, device=boxes.device) + 0.5) / rows
        x = (torch.arange(columns, device=boxes.device) + 0.5) / columns
        prior = box_prior(boxes[:, :, None, None], x, y[:, None])  # (batch, queries, rows, columns)
        logits = torch.einsum("bqc,bcyx->bqyx", self.embed(queries), pixels) + self.bias
        return logits + prior.to(logits.dtype)

    def at_points(
        self, feature_map: Tensor, queries: Sequence[Tensor], points: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two factors of the masks of all stages at points alone, so that no mask is ever whole.

        Args:
            queries: (batch, queries, dim) of the proposals, then of each decoder layer.
            points: (batch, points, 2) x and y as fractions of the image.

        Returns:
            float32 features of the points (stages, batch, channels, points), and embeddings of the queries (stages,
            batch, queries, channels). Mask logits are their product, the bias and [`box_prior`].
        """
        grid = 2 * points[:, :, None] - 1  # (batch, points, 1, 2)
        sampled = [
            F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)[..., 0]
            for pixels in self.pixel_maps(feature_map, image)
        ]
        return torch.stack(sampled), torch.stack([self.embed(states) for states in queries]).float()

    def pixel_maps(self, feature_map: Tensor, image: Tensor) -> Iterator[Tensor]:
        """Maps (batch, channels, rows, columns) at the masks' stride: enlarged, then after each block."""
        rows, columns = self.mask_hw((image.shape[2], image.shape[3]))
        pixels = F.interpolate(self.reduction(feature_map), (rows, columns), mode="bilinear", align_corners=False)
        whole_hw = (rows * self.stride, columns * self.stride)
        if image.shape[2:] != whole_hw:
            image = F.interpolate(image, whole_hw, mode="bilinear", align_corners=False)
        pixels = pixels + self.image_projection(image.to(self.image_projection.weight.dtype))
        yield pixels
        for block in self.blocks:
            pixels = pixels + block(pixels)
            yield pixels

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the masks of an image."""
        return -(-image_hw[0] // self.stride), -(-image_hw[1] // self.stride)

    def embed(self, queries: Tensor) -> Tensor:
        """Queries (batch, queries, dim) to the features that they look for (batch, queries, channels)."""
        return self.scale * self.query_projection(queries + self.query_mlp(queries))


__all__ = ["MaskHead", "box_prior"]
