"""Frozen encoders to learn from: found by folder or Hub id, with their normalisation, as maps of patch features."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_vlm_vit import VLMViTConfig
from .model_source import check_source
from .modeling_vlm_vit import VLMViTModel

Size = tuple[int, int]


def as_encoder_config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """The configuration of an encoder of this package or of transformers, given as it is or as a dictionary."""
    if isinstance(config, PreTrainedConfig):
        return config
    if config.get("model_type") == VLMViTConfig.model_type:  # also where only this code is, and nothing is registered
        return VLMViTConfig(**config)
    return AutoConfig.for_model(**config)


def read_encoder(source: str, revision: str | None = None) -> tuple[PreTrainedConfig, str | None]:
    """The configuration of the encoder in a folder or on the Hub, and the commit that it is of, for one on the Hub.

    Raises:
        ValueError: if nothing is there, or it needs code of its own, which is never run.
    """
    path = _located(source, CONFIG_NAME, revision)
    found = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    of_backbone = (found.get("backbone_config") or {}).get("model_type")
    if VLMViTConfig.model_type in (found.get("model_type"), of_backbone):
        config: PreTrainedConfig = VLMViTConfig.from_pretrained(source, revision=revision)
    else:
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except ValueError as error:  # an unknown type, or code of its own
            raise ValueError(
                f"The encoder {source!r} is none that transformers knows by itself: {str(error).splitlines()[0]} Code "
                "that comes with a model is not run here: take a teacher whose type is part of transformers or of "
                "this package."
            ) from error
    if config.model_type == "vit_mae":
        raise ValueError(
            f"The encoder {source!r} ({config.model_type}) masks patches at random in each pass, and "
            f"shuffles the others. Convert it, and give what comes out: hf-vlm convert {source} "
            f"runs/{source.rstrip('/').rpartition('/')[2]}"
        )
    vars(config).pop("auto_map", None)
    return config, extract_commit_hash(path, None)


def read_statistics(source: str, revision: str | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of an encoder's image processor, of pixels in 0..1; ValueError where it has none."""
    try:
        found = BaseImageProcessor.get_image_processor_dict(source, revision=revision)[0]
    except OSError as error:
        raise ValueError(
            f"{source!r} has no preprocessor_config.json with the normalisation of its images: give teacher_mean "
            "and teacher_std."
        ) from error
    if not found.get("do_normalize", True):
        return [0.0], [1.0]
    mean, std = (found.get(name, [0.5]) for name in ("image_mean", "image_std"))
    return (mean, std) if isinstance(mean, list) else ([mean], [std])


def vision_part(config: Any) -> Any:
    """Configuration of the vision tower: `vision_config` of CLIP and similar models."""
    return getattr(config, "vision_config", config)


def patch_size_of(config: Any) -> Size:
    """Rows and columns of pixels of a patch; 1 x 1 for encoders without patches."""
    size = getattr(vision_part(config), "patch_size", 1)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def load_encoder(source: str, config: PreTrainedConfig, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the weights of an encoder of this configuration, frozen and in evaluation mode.

    Raises:
        ValueError: if nothing is there, or its weights are not those of the configuration.
    """
    loader = VLMViTModel if isinstance(config, VLMViTConfig) else AutoModel
    _located(source, CONFIG_NAME, revision)
    try:
        model, report = loader.from_pretrained(
            source,
            config=copy.deepcopy(config),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"The weights of the encoder {source!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    # Poolers are not read; classifiers' checkpoints lack them.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name.split(".")):
        raise ValueError(f"The weights of the encoder {source!r} lack {', '.join(missing[:5])}: it would be random.")
    return _vision_tower(model).requires_grad_(False).eval()


def feature_width(config: PreTrainedConfig, size: Size) -> int:
    """Width of an encoder's features, found without weights and computing nothing.

    Raises:
        ValueError: if it takes no images of this size, or its outputs are neither patch tokens nor a map.
    """
    patches, _ = try_on_meta(
        config, size, lambda encoder, images: frozen_features(encoder, images, patch_size_of(config))
    )
    return patches.shape[1]


def try_on_meta(config: PreTrainedConfig, size: Size, use: Callable[[PreTrainedModel, Tensor], Any]) -> Any:
    """What `use` makes of an encoder and an image of this size, without weights and computing nothing.

    Raises:
        ValueError: if anything goes wrong.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = "batched_mm"  # torch gives grouped products no shapes in float32
    try:
        with torch.device("meta"):
            model = VLMViTModel(config) if isinstance(config, VLMViTConfig) else AutoModel.from_config(config)
            images = torch.empty(1, getattr(vision_part(config), "num_channels", 3), *size)
            return use(_vision_tower(model).eval(), images)
    except Exception as error:  # whatever a model makes of images that it was not built for
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"An encoder of type {config.model_type!r} cannot be taught from at {size[0]} x {size[1]} pixels: {reason}"
        ) from error


def encode(encoder: PreTrainedModel, images: Tensor, **options: Any) -> Any:
    """An encoder's output for images (batch, channels, height, width) of any size that fits its patches."""
    # Learned positions that are not resized unasked.
    if "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters:
        options["interpolate_pos_encoding"] = True
    return encoder(pixel_values=images, **options)


def frozen_features(encoder: PreTrainedModel, images: Tensor, patch_hw: Size) -> tuple[Tensor, Tensor]:
    """Features of an encoder's last layer.

    Args:
        encoder: One whose tokens are class and register tokens, if any, and then patches row by row; or one whose
            output is a map, as of a convolutional network.
        images: (batch, channels, height, width) in its normalisation, sides a multiple of its patch.

    Returns:
        A map of patches (batch, dim, rows, columns), and a feature of the whole image (batch, dim): the class token,
        or for encoders without one, such as convolutional networks, the mean of the map, which is what they pool.
    """
    tokens = encode(encoder, images).last_hidden_state
    if tokens.ndim == 4:
        return tokens, tokens.mean((2, 3))
    rows, columns = (side // patch for side, patch in zip(images.shape[2:], patch_hw))
    num_prefix = tokens.shape[1] - rows * columns  # (batch, prefix + patches, dim)
    if tokens.ndim != 3 or num_prefix < 0:
        raise ValueError(
            f"its output {tuple(tokens.shape)} is neither a token for each of {rows} x {columns} patches nor a map."
        )
    has_class_token = encoder.config.use_class_token if isinstance(encoder, VLMViTModel) else num_prefix > 0
    patches = tokens[:, num_prefix:].transpose(1, 2).unflatten(2, (rows, columns))  # (batch, dim, rows, columns)
    return patches, tokens[:, 0] if has_class_token else patches.mean((2, 3))


def resize_map(maps: Tensor, size: Size) -> Tensor:
    """Images or maps of features (batch, channels, height, width) at another size, bilinearly and without aliasing."""
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)


def nearest_hw(size: Size, patch_hw: Size) -> Size:
    """Height and width nearest to `size` that are multiples of a patch."""
    height, width = (max(1, round(side / patch)) * patch for side, patch in zip(size, patch_hw))
    return height, width


def read_frozen(config: Any, name: str) -> None:
    """Fills the fields of a method's configuration that describe its frozen encoder, where they are not given.

    They are the source `<name>`, and `<name>_revision`, `<name>_config`, `<name>_mean` and `<name>_std`; of the images
    that the model itself is given, `image_mean` and `image_std`: ImageNet's for three channels when not given, else
    0.5. Called once `backbone_config` is there.

    Raises:
        ValueError: if the encoder is not found, or sees other channels than the model's own.
    """
    source, revision, found = (getattr(config, f"{name}{part}") for part in ("", "_revision", "_config"))
    if source and found is None:
        found, commit = read_encoder(source, revision)
        revision = commit or revision
    if source and None in (getattr(config, f"{name}_mean"), getattr(config, f"{name}_std")):
        mean, std = read_statistics(source, revision)
        setattr(config, f"{name}_mean", mean)
        setattr(config, f"{name}_std", std)
    num_channels = config.backbone_config.num_channels
    if config.image_mean is None or config.image_std is None:
        is_color = num_channels == 3
        config.image_mean = IMAGENET_DEFAULT_MEAN if is_color else [0.5] * num_channels
        config.image_std = IMAGENET_DEFAULT_STD if is_color else [0.5] * num_channels
    if found is None:
        return  # as transformers' own comparison with the defaults makes it
    found = as_encoder_config(found)
    setattr(config, f"{name}_config", found)
    setattr(config, f"{name}_revision", revision)
    if (of_encoder := getattr(vision_part(found), "num_channels", 3)) != num_channels:
        raise ValueError(
            f"{type(config).__name__}: the {name} {source} sees images of {of_encoder} channels, and the encoder of "
            f"{num_channels}: set num_channels in encoder_config, or take another {name}."
        )
    for field in ("image_mean", "image_std", f"{name}_mean", f"{name}_std"):
        if len(getattr(config, field)) not in (1, num_channels):
            raise ValueError(f"{type(config).__name__}: {field} needs {num_channels} values, one per channel.")


def renormalise(images: Tensor, config: Any, name: str) -> Tensor:
    """Images (batch, channels, height, width) normalised for the model, as the frozen encoder of a name wants them."""
    channels = range(images.shape[1])
    statistics = (getattr(config, field) for field in ("image_mean", "image_std", f"{name}_mean", f"{name}_std"))
    mean, std, of_mean, of_std = ([values[channel % len(values)] for channel in channels] for values in statistics)
    if (mean, std) == (of_mean, of_std):
        return images
    planes = [
        images[:, channel] * (std[channel] / of_std[channel]) + (mean[channel] - of_mean[channel]) / of_std[channel]
        for channel in channels
    ]
    return torch.stack(planes, dim=1)


class FrozenEncoderMixin:
    """A model with an encoder that never learns and is not saved: its weights have a source of their own.

    The configuration names it. It must be there when the model is loaded; `from_pretrained(folder, <name>=...)`
    gives its new location. A subclass calls `load_frozen` at the end of `__init__`.

    Attributes:
        frozen_name: What the encoder is called in the model, and its source in the configuration (see `read_frozen`).
    """

    frozen_name: str
    config: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of every model; the frozen encoder is loaded from its own source.

        Raises:
            ValueError: if it is not found.
        """
        parent: Any = super()
        loaded = parent.from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).load_frozen()
        return loaded

    def load_frozen(self: Any) -> None:
        """Loads the frozen encoder, where the configuration names one, from its source."""
        config, name = self.config, self.frozen_name
        source, found, revision = (getattr(config, f"{name}{part}") for part in ("", "_config", "_revision"))
        if found is None or self.device.type == "meta":  # there weights are not loaded until the model is made
            return
        try:
            encoder = load_encoder(source, found, revision, self.dtype)
        except ValueError as error:
            raise ValueError(
                f"{error} The model's own files hold no weights of its {name}: give its location by "
                f"model_config.{name} in a recipe or {name}=... of from_pretrained."
            ) from error
        setattr(self, name, encoder.to(self.device))
        self._keys_to_ignore_on_save = {f"{name}.{key}" for key in encoder.state_dict()}

    def train(self: Any, mode: bool = True) -> Any:
        """`train` of every module; the frozen encoder stays in evaluation mode."""
        super().train(mode)  # type: ignore[misc]
        for name, module in self.named_children():
            if name == self.frozen_name:  # absent until it is loaded
                module.eval()
        return self


def _vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The vision tower: a part of CLIP and similar models, all of a model that only takes images."""
    return getattr(model, "vision_model", model)


def _located(source: str, name: str, revision: str | None) -> str:
    """Path of a file of a folder or of a repository of the Hub; ValueError where there is none."""
    check_source(source, revision)
    reason = None
    try:
        if path := cached_file(source, name, revision=revision):
            return path
    except OSError as error:
        reason = error
    raise ValueError(f"The encoder {source!r} is neither a folder with a model nor one on the Hub.") from reason


__all__ = [
    "FrozenEncoderMixin",
    "as_encoder_config",
    "encode",
    "feature_width",
    "frozen_features",
    "load_encoder",
    "nearest_hw",
    "patch_size_of",
    "read_encoder",
    "read_frozen",
    "read_statistics",
    "renormalise",
    "resize_map",
    "try_on_meta",
    "vision_part",
]
