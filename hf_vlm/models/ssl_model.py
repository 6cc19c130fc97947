"""The contract of self-supervised methods: what a method may define, what training asks it for, and the defaults."""

import inspect
import math
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import can_return_tuple

from .configuration_vlm_vit import VLMViTConfig
from .model_on_encoder import ModelOnEncoder

INITIALIZER_RANGE = 0.02


def as_vit_config(config: VLMViTConfig | dict[str, Any] | None, **defaults: Any) -> VLMViTConfig:
    """A configuration given as an object, as a dictionary (`defaults` fill what it lacks), or not at all.

    Initial weights that it leaves open have a standard deviation of 0.02, by which features of narrow encoders come
    out better than by Xavier's rule (benchmarks/RESULTS.md, "Initial weights of narrow layers").
    """
    built = config if isinstance(config, VLMViTConfig) else VLMViTConfig(**{**defaults, **(config or {})})
    if built.initializer_range is None:
        built = deepcopy(built)  # the caller's may serve other models
        built.initializer_range = INITIALIZER_RANGE
    return built


@strict
class SSLConfig(PreTrainedConfig):
    """Base of the method configurations: each holds the encoder's configuration as `backbone_config`.

    Attributes:
        renamed_fields: Former names of fields and their present ones. A saved configuration is read by either; a
            recipe has to use the present one.
        batch_scaled_momentum: Fields that hold the momentum of a moving average over steps: with
            `reference_batch_size` they are scaled to the batch, so that a teacher moves as far per image.
        needs_image_statistics: Whether `image_mean` and `image_std` are fields, which training fills with those of the
            image processor.
        trained_encoder: Name, in the model, of the encoder that is probed and saved for use; a method with a teacher
            may choose the teacher's. It is saved too, so that this encoder is what is loaded out of the whole model.
    """

    sub_configs = {"backbone_config": VLMViTConfig}
    renamed_fields: ClassVar[dict[str, str]] = {}
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ()
    needs_image_statistics: ClassVar[bool] = False
    trained_encoder: ClassVar[str] = "backbone"

    backbone_config: Any = None
    initializer_range: float = INITIALIZER_RANGE

    def __post_init__(self, **kwargs: Any) -> None:
        for former, present in self.renamed_fields.items():
            if former in kwargs:
                setattr(self, present, kwargs.pop(former))
        kwargs.pop("trained_encoder", None)  # the method's, not one model's
        self.backbone_config = as_vit_config(self.backbone_config)
        self.check_range(0, 1, *self.batch_scaled_momentum)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "trained_encoder": self.trained_encoder}

    def external_weights(self) -> list[str]:
        """Folders and Hub ids of other models that the weights learn from, such as a teacher: for licence and card."""
        return []

    def check_range(self, low: float, high: float, *names: str) -> None:
        """ValueError for a field of these names that does not lie in `low` to `high`, both included."""
        for name in names:
            if not low <= (value := getattr(self, name)) <= high:
                allowed = f"at least {low:g}" if high == math.inf else f"in {low:g} to {high:g}"
                raise ValueError(f"{type(self).__name__}: {name} must be {allowed}, but is {value}.")


def returns_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `forward` of a method: adds the arguments `return_loss` and `return_dict`.

    Batches of a method have no labels. By `return_loss`, true by default, the stock Trainer knows that evaluation has
    a loss all the same, by which it finds the best checkpoint.
    """

    @wraps(forward)
    def wrapper(self: Any, *args: Any, return_loss: bool = True, **kwargs: Any) -> Any:
        if self.training:
            self.is_pretraining = True
        output = forward(self, *args, **kwargs)
        return output if return_loss else type(output)(**{k: v for k, v in output.items() if k != "loss"})

    signature = inspect.signature(forward)
    argument = inspect.Parameter("return_loss", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), argument]
    )
    return can_return_tuple(wrapper)  # type: ignore[no-any-return]


class SSLPreTrainedModel(ModelOnEncoder):
    """Base of the pretraining methods. Each keeps its encoder in `self.backbone` and returns an output with `loss`.

    Beside what is here, a method may define what every model of the package has: `after_step`, `after_encoder_loaded`
    and `no_weight_decay` (see [`VLMViTPreTrainedModel`]).

    Attributes:
        default_views: Augmentation that the method is trained with, as the recipe key `views`, which may override it.
        loss_may_vanish: Whether the loss comes near 0 when all is learned, so that it is no sign of a collapse.
        is_pretraining: Whether the method computed a loss in training mode, since whoever reads this set it to false.
    """

    config_class = SSLConfig
    is_pretraining = False
    loss_may_vanish: ClassVar[bool] = False
    default_views: ClassVar[dict[str, Any]] = {"num_views": 1}

    def initialize_weights(self) -> None:
        """Initialises all weights, or those that a checkpoint lacks; then, once, what follows from them."""
        is_new = not getattr(self, "_is_hf_initialized", False)  # as transformers marks modules
        super().initialize_weights()
        if is_new:
            self.finish_init()

    @torch.no_grad()
    def finish_init(self) -> None:
        """Sets what follows from other weights, such as a teacher, by the functions of `transformers.initialization`.

        They leave alone what a checkpoint gave.
        """

    @property
    def trained_encoder(self) -> nn.Module:
        """The encoder that is probed and saved for use: see [`SSLConfig`]."""
        return self.get_submodule(self.config.trained_encoder)

    @staticmethod
    def sample_mask(
        config: Any, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
    ) -> Tensor | None:
        """Samples masks as `forward` does, to show them; None for methods that mask nothing.

        Args:
            config: Configuration of the method.
            grid_hw: Patches of an image, rows and columns.
            num_images: Number of images.
            device: Device of the masks; the CPU by default.

        Returns:
            (images, patches) bool, true for patches that are hidden from the encoder.
        """
        return None


__all__ = ["SSLConfig", "SSLPreTrainedModel", "as_vit_config", "returns_loss"]
