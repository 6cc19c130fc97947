"""Pretraining of a whole detector without labels, on regions of images that look like objects.

Regions are connected pixels of like colours, as DETReg (arXiv 2106.04550) takes its boxes from selective search. Many
are of background, but objects are alike from image to image, so that the detector learns them best: after a while only
those regions are learned of which its teacher is confident. As in the rounds of CutLER (arXiv 2301.11320) it chooses
what it learns next; but boxes are always of the image itself, so that they cannot drift.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.utils import auto_docstring

from .configuration_detection import VLMViTDetectionConfig
from .configuration_vlm_vit import VLMViTConfig
from .detection_layers import refine_boxes
from .loss_detection import iou_and_giou, to_corners
from .modeling_detection import VLMViTForObjectDetection, VLMViTObjectDetectionOutput, detect
from .ssl_layers import flatten_views
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss
from .ssl_regions import color_regions
from .ssl_teacher import TeacherMixin

NUM_CANDIDATES = 3  # regions among which the teacher chooses, per region that is learned at most
MIN_IOU = 0.5  # of a region and the teacher's box whose score it gets


@strict
class RegionDetectionConfig(SSLConfig, VLMViTDetectionConfig):
    r"""Configuration of [`RegionDetectionForPreTraining`]: that of the detector, and of the boxes it learns.

    Args:
        max_regions (`int`, defaults to 10): Most regions of an image that are learned at first. More than a third of
            `num_queries` leave too few queries without an object.
        self_training_start (`float`, defaults to 0.3): Fraction of training after which the teacher chooses.
        score_threshold (`float`, defaults to 0.25): Score of the teacher from which a region is learned; where an
            image has none, its best region is.
        momentum (`float`, defaults to 0.99): Momentum of the teacher at the start; 1 at the end, along half a cosine.

    Raises:
        ValueError: if a number is out of its range.
    """

    model_type = "vlm_region_detection"
    sub_configs = {"backbone_config": VLMViTConfig}
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ("momentum",)

    max_regions: int = 10
    self_training_start: float | int = 0.3
    score_threshold: float | int = 0.25
    momentum: float | int = 0.99

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**{**kwargs, "num_labels": 1})  # object or not
        self.check_range(0, 1, "self_training_start", "score_threshold")
        self.check_range(1, self.num_queries, "max_regions")


@auto_docstring
class RegionDetectionForPreTraining(TeacherMixin, SSLPreTrainedModel, VLMViTForObjectDetection):
    """The detector with one class. Fine-tuning takes all of its weights but the class layers."""

    config_class = RegionDetectionConfig
    default_views = {
        "num_views": 1,
        "crop_scale": [0.5, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.3, 0.3, 0.3, 0.1],
    }

    def build(self, config: VLMViTDetectionConfig) -> None:
        super().build(config)
        self.build_teacher("backbone", "neck", "proposal_head", "decoder", "class_head", "box_head")

    @returns_loss
    @auto_docstring
    def forward(
        self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None
    ) -> VLMViTObjectDetectionOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            Boxes as `VLMViTForObjectDetection` takes them, all of class 0; found in the images when not given.
        """
        images = flatten_views(pixel_values)
        if labels is None:
            labels = self._find_objects(images)
        return VLMViTForObjectDetection.forward(self, images, labels)

    @torch.compiler.disable
    @torch.no_grad()
    def _find_objects(self, images: Tensor) -> list[dict[str, Tensor]]:
        """One dict per image as detectors take it: its best regions at first, those that the teacher chooses later."""
        most = self.config.max_regions
        if self.progress < self.config.self_training_start:
            boxes = color_regions(images, most)
        else:
            boxes = self._choose_regions(images, color_regions(images, NUM_CANDIDATES * most))
        return [{"class_labels": torch.zeros_like(b[:, 0], dtype=torch.int64), "boxes": b} for b in boxes]

    def _choose_regions(self, images: Tensor, regions: list[Tensor]) -> list[Tensor]:
        """Of the regions (n, 4) of each image those that the teacher is confident of, best first."""
        teacher = SimpleNamespace(**dict(self.teacher.items()))
        with self.teaching():
            found = detect(teacher, images, self.config)
            scores = teacher.class_head(found.hidden_states[-1])[..., 0].float().sigmoid()  # (batch, queries)
            boxes = refine_boxes(found.reference_boxes, teacher.box_head(found.hidden_states[-1]))
        chosen = []
        for of_image, score, box in zip(regions, scores, boxes):
            iou = iou_and_giou(to_corners(of_image)[:, None], to_corners(box)[None])[0]  # (regions, queries)
            of_regions, order = ((iou >= MIN_IOU) * score).amax(1).sort(descending=True, stable=True)
            num_confident = max(1, int((of_regions >= self.config.score_threshold).sum()))
            chosen.append(of_image[order[: min(num_confident, self.config.max_regions)]])
        return chosen


__all__ = ["RegionDetectionConfig", "RegionDetectionForPreTraining"]
