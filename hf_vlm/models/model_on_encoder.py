"""Models on an encoder, heads and pretraining methods: built on one that is saved, and loaded from their own kind."""

from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ranks import among_data_ranks
from .router_loss import adds_router_loss
from .saved_config import read_saved_config, trained_encoder_of

OF_CLASSES = ("num_labels", "id2label", "label2id")  # fields that transformers' configurations compute


class ModelOnEncoder(VLMViTPreTrainedModel):
    """Base of all models that keep an encoder in `self.backbone`.

    Attributes:
        other_model_types: Types of saved models, beside its own, that the class loads as they are.
        head_shape: Fields of the configuration that the weights of the head depend on, its class layers aside: a
            pretrained head brings them. Empty where all of the head is class layers.
        router_metrics: How the routers of a sparse encoder routed the last training batch (see `router_loss`).
    """

    other_model_types: ClassVar[tuple[str, ...]] = ()
    head_shape: ClassVar[tuple[str, ...]] = ()
    router_metrics: Mapping[str, Tensor] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whatever a model's `forward` computes, the loss of a sparse encoder's routers is added to it.

        Losses and statistics over ranks are those over the ranks with images of their own.
        """
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = among_data_ranks(adds_router_loss(cls.forward))  # type: ignore[method-assign]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        self._check_type(config.model_type, "The configuration", "the encoder's folder")
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_encoder(cls, encoder: str | PathLike[str], *, revision: str | None = None, **fields: Any) -> Self:
        """A new model on a trained encoder, whose weights it takes; all others are initialised.

        Args:
            encoder: Folder or Hub id of an encoder of this package, or of any model that has one: of a run of
                pretraining, one of its checkpoints, a detector.
            revision: Commit of an encoder on the Hub.
            fields: Fields of the model's configuration, such as `id2label` (from which `label2id` follows) or
                `num_labels`.

        Returns:
            The model, in evaluation mode as from `from_pretrained`.

        Raises:
            ValueError: if the configuration has no such field, there is no encoder of this package, or weights of it
                are missing.
        """
        known = {*cls.config_class.__dataclass_fields__, *OF_CLASSES}
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"{cls.config_class.__name__} has no field {', '.join(map(repr, unknown))}.")
        if "id2label" in fields:
            fields.setdefault("label2id", {name: int(index) for index, name in fields["id2label"].items()})
        found = read_saved_config(encoder, revision=revision)
        found = found.get("backbone_config") or found
        if found.get("model_type") != VLMViTConfig.model_type:
            reason = f"its type is {found.get('model_type')!r}" if found else "there is no config.json"
            raise ValueError(
                f"{encoder} holds no encoder of hf_vlm: {reason}. Encoders of transformers are converted by hf-vlm "
                "convert."
            )
        loaded, report = VLMViTModel.from_pretrained(encoder, revision=revision, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{encoder} lacks {len(missing)} of an encoder's weights, such as {missing[0]}.")
        model = cls(cls.config_class(backbone_config=loaded.config.to_dict(), **fields))
        model.backbone.load_state_dict(loaded.state_dict())
        model.after_encoder_loaded()
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of every model.

        Raises:
            ValueError: if what is saved is of another type, such as an encoder, whose configuration has fields of the
                same names for other things. With a `config` of this model's, its encoder is loaded, unless that for
                use is a teacher's.
        """
        source = pretrained_model_name_or_path
        saved = {} if source is None else read_saved_config(source, **kwargs)
        config, found = kwargs.get("config"), saved.get("model_type")
        if isinstance(config, PreTrainedConfig) and trained_encoder_of(saved) == "backbone":
            found = config.model_type
        if found is not None:
            cls._check_type(found, f"{source}", repr(str(source)))
        return super().from_pretrained(source, *args, **kwargs)

    def class_layers(self) -> set[str]:
        """Names of the parameters that belong to certain classes, which no other data have."""
        return set()

    @classmethod
    def _check_type(cls, found: str, what: str, encoder: str) -> None:
        if found not in (cls.config_class.model_type, *cls.other_model_types):
            raise ValueError(
                f"{what} is of type {found!r}, not of a {cls.__name__}. For a new one on its encoder call "
                f"{cls.__name__}.from_encoder({encoder}, ...) with fields of {cls.config_class.__name__}, such as "
                "num_labels for a head."
            )


class HeadOnFreezableEncoder(ModelOnEncoder):
    """Base of heads whose configuration has `freeze_encoder`: then the encoder neither learns nor drops anything."""

    def train(self, mode: bool = True) -> Self:
        """Freezes the encoder again: `from_pretrained` lets all parameters learn, and then calls `eval`, so this."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.backbone.requires_grad_(False).eval()
        return self


def wanted_outputs(config: Any, **options: bool | None) -> dict[str, bool]:
    """Options `output_...` of a head's encoder: what is given, else what the head's configuration asks for.

    What neither decides is left out, so that the encoder's own configuration does.
    """
    wanted = {name: getattr(config, name) or None if value is None else value for name, value in options.items()}
    return {name: value for name, value in wanted.items() if value is not None}


__all__ = ["HeadOnFreezableEncoder", "ModelOnEncoder", "wanted_outputs"]
