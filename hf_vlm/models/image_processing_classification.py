"""Image processor of classifiers: logits to classes and scores."""

from typing import Any

from torch import Tensor

from .image_processing_vlm_vit import VLMViTImageProcessor


class VLMViTClassificationImageProcessor(VLMViTImageProcessor):
    """Images to `pixel_values` as [`VLMViTImageProcessor`] makes them, and a classifier's logits to classes.

    Attributes:
        score_threshold: Lowest score of a class that is in an image, for models of several classes per image.
            Fine-tuning stores the one of the best F1 on held-out images here.
    """

    score_threshold = 0.5

    def post_process_image_classification(
        self,
        outputs: Any,
        threshold: float | None = None,
        top_k: int = 5,
        problem_type: str = "single_label_classification",
    ) -> list[dict[str, Tensor]]:
        """The best classes of each image from the `logits` of a [`VLMViTForImageClassification`].

        Args:
            threshold: Lowest score kept, 0 to 1; when not given `score_threshold` for several classes per image, and 0
                for one: the best classes, whatever their scores.
            top_k: Most classes kept per image; clipped to the number of classes.
            problem_type: The model's `config.problem_type`: scores of one class per image sum to 1 (softmax), those
                of several classes per image are each for itself (sigmoid).

        Returns:
            one dict per image: `scores` (n,), best first, and `labels` (n,).

        Raises:
            ValueError: for another problem type, or if no class is asked for.
        """
        logits = outputs.logits.float()  # (batch, classes)
        if problem_type == "single_label_classification":
            scores, default = logits.softmax(dim=-1), 0.0
        elif problem_type == "multi_label_classification":
            scores, default = logits.sigmoid(), self.score_threshold
        else:
            raise ValueError(
                f"problem_type is {problem_type!r}, but must be single_label_classification or "
                "multi_label_classification."
            )
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1 class must be kept.")
        threshold = default if threshold is None else threshold
        best = scores.topk(min(top_k, scores.shape[1]), dim=1)
        return [
            {"scores": values[values >= threshold], "labels": labels[values >= threshold]}
            for values, labels in zip(best.values, best.indices)
        ]


__all__ = ["VLMViTClassificationImageProcessor"]
