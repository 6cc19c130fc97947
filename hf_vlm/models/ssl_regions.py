"""Regions of images that look like objects, found without labels: connected pixels of like colours with clear edges.

A fast relative of selective search, which DETReg (arXiv 2106.04550) takes its boxes from: pixels are clustered by
colour, coarsely and finely, and connected ones of a cluster are a region.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NUM_CLUSTERS = (2, 3, 4, 6)  # of the colours of an image
NUM_ITERATIONS = 6  # of k-means
MIN_AREA, MAX_AREA = 0.0015, 0.3  # of a region, relative to the image
MIN_SIDE = 3  # pixels
BORDER_PENALTY = 0.6  # factor of the score for each side of the image that a region touches
MAX_IOU = 0.7  # of two regions: the lower scored one is left out

Array = NDArray[np.float32]


def color_regions(images: Tensor, max_regions: int) -> list[Tensor]:
    """The regions of each image that look most like objects.

    Args:
        images: (batch, channels, height, width), normalised.
        max_regions: Most regions per image.

    Returns:
        one tensor (regions, 4) float32 per image, best first: (cx, cy, w, h) as fractions of the image.

    Raises:
        ImportError: if scipy is not installed.
    """
    images = images.float()
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    edges = _edge_strength(smooth)
    clusters = [_color_clusters(smooth, k) for k in NUM_CLUSTERS]
    maps = torch.stack(clusters, dim=1).cpu().numpy()  # (batch, partitions, height, width)
    height, width = images.shape[-2:]
    scale = images.new_tensor([width, height, width, height]).cpu()
    regions = []
    for partitions, strength in zip(maps, edges.cpu().numpy()):
        found = [_score_regions(partition, strength) for partition in partitions]
        boxes, scores = (np.concatenate(parts) for parts in zip(*found))  # (n, 4) corners, (n,)
        kept = _keep_best(boxes, scores, max_regions)
        low, high = torch.from_numpy(boxes[kept]).split(2, dim=-1)
        regions.append((torch.cat([(low + high) / 2, high - low], dim=-1) / scale).to(images.device))
    return regions


def _edge_strength(images: Tensor) -> Tensor:
    """Change of colour around each pixel (batch, height, width)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return (across.abs() + down.abs()).sum(1)


def _color_clusters(images: Tensor, num_clusters: int) -> Tensor:
    """Cluster of each pixel's colour (batch, height, width) int64, by k-means of each image by itself."""
    pixels = images.flatten(2).transpose(1, 2)  # (batch, pixels, channels)
    # Starts spread over the brightness: the same for the same image, and far from each other.
    order = pixels.mean(-1).argsort(dim=1)
    positions = ((torch.arange(num_clusters, device=images.device) + 0.5) / num_clusters * order.shape[1]).long()
    centres = pixels.gather(1, order[:, positions, None].expand(-1, -1, pixels.shape[-1]))
    for _ in range(NUM_ITERATIONS):
        chosen = F.one_hot(torch.cdist(pixels, centres).argmin(-1), num_clusters).to(pixels.dtype)
        counts = chosen.sum(1).clamp(min=1)  # (batch, clusters)
        centres = chosen.transpose(1, 2) @ pixels / counts[..., None]
    return torch.cdist(pixels, centres).argmin(-1).unflatten(1, images.shape[-2:])


def _score_regions(clusters: NDArray[np.int64], strength: Array) -> tuple[Array, Array]:
    """Boxes (n, 4), corners in pixels, and scores (n,) of the connected regions of a map of clusters."""
    from scipy.ndimage import find_objects, label  # only this kind of training needs scipy

    height, width = clusters.shape
    regions, count = np.zeros(clusters.shape, dtype=np.int64), 0
    for cluster in range(clusters.max() + 1):
        labelled, number = label(clusters == cluster)
        regions += np.where(labelled > 0, labelled + count, 0)
        count += number
    on_edge = np.zeros(clusters.shape, dtype=bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = regions[a] != regions[b]
        on_edge[a] |= differs
        on_edge[b] |= differs
    area = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    outline = np.bincount(regions.ravel(), weights=on_edge.ravel(), minlength=count + 1)[1:]
    total = np.bincount(regions.ravel(), weights=strength.ravel(), minlength=count + 1)[1:]
    at_outline = np.bincount(regions.ravel(), weights=(strength * on_edge).ravel(), minlength=count + 1)[1:]
    slices = find_objects(regions)
    boxes = np.array([(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in slices], dtype=np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    at_border = (boxes[:, :2] == 0).sum(1) + (boxes[:, 2:] == (width, height)).sum(1)
    contrast = at_outline / np.maximum(outline, 1) - 0.5 * (total - at_outline) / np.maximum(area - outline, 1)
    scores = contrast / (strength.mean() + 1e-6) * np.sqrt(area / sides.prod(1)) * BORDER_PENALTY**at_border
    fits = (area >= MIN_AREA * height * width) & (area <= MAX_AREA * height * width) & (sides.min(1) >= MIN_SIDE)
    return boxes[fits], scores[fits].astype(np.float32)


def _keep_best(boxes: Array, scores: Array, max_regions: int) -> list[int]:
    """Indices of the best boxes, best first, that overlap no better one."""
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in np.argsort(-scores, kind="stable"):
        low = np.maximum(boxes[kept, :2], boxes[index, :2])
        high = np.minimum(boxes[kept, 2:], boxes[index, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        if (shared <= MAX_IOU * (areas[kept] + areas[index] - shared)).all():
            kept.append(int(index))
        if len(kept) == max_regions:
            break
    return kept


__all__ = ["color_regions"]
