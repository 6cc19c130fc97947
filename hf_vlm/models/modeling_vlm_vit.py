"""The encoder: a plain Vision Transformer (arXiv 2010.11929) as a model and as a backbone."""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vlm_vit import VLMViTConfig
from .packing import Packing
from .saved_config import read_saved_config, trained_encoder_of
from .self_initialised import SelfInitialised
from .vit_layers import (
    LayerScale,
    Positions,
    VLMViTAttention,
    VLMViTLayer,
    build_layers,
    build_norm,
    check_pixel_values,
    gather_patches,
    interpolate_positions,
    patch_grid,
    patchify,
    rope_positions,
    sincos_positions,
)

# Parameters of the encoder and of the methods that are tokens, or are added to them.
TOKENS = ("class_token", "register_tokens", "mask_token", "position_embedding", "query_token", "query_tokens")
SMALL_STD = 0.02  # of their initial values where the configuration names none


class VLMViTEmbeddings(nn.Module):
    """Patch projection, learned or fixed positions, class and register tokens."""

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.config = config
        self.patch_projection = nn.Linear(config.patch_dim, config.hidden_size)
        if config.use_class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
        if config.position_embedding_type == "learned":
            rows, columns = config.grid_hw
            self.position_embedding = nn.Parameter(torch.empty(1, rows * columns, config.hidden_size))

    def positions(self, grid_hw: tuple[int, int], device: torch.device | None = None) -> Tensor | None:
        """Positions to add to the patch tokens of a grid: (1, patches, hidden_size), or None for rotary ones.

        Fixed ones are float32, on `device`; learned ones are as they are stored.
        """
        config = self.config
        if config.position_embedding_type == "rope":
            return None
        if config.position_embedding_type == "sincos":
            return sincos_positions(config.hidden_size, grid_hw, device, spread_hw=config.grid_hw)[None]
        if grid_hw == config.grid_hw:
            return self.position_embedding
        rows, columns = config.grid_hw
        stored = self.position_embedding.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, dim, rows, columns)
        resized = interpolate_positions(stored.float(), grid_hw, config.position_interpolation)
        return resized.to(stored.dtype).flatten(2).transpose(1, 2)  # (1, patches, dim)

    def forward(
        self,
        pixel_values: Tensor,
        visible_indices: Tensor | None = None,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        batch, patch_hw = pixel_values.shape[0], self.config.patch_hw
        positions = self.positions(patch_grid(pixel_values, patch_hw), pixel_values.device)
        if visible_indices is None:
            patches = patchify(pixel_values, patch_hw)  # (batch, patches, channels * patch height * patch width)
        else:  # only what is seen is cut out and embedded: masked patches cost nothing
            patches = gather_patches(pixel_values, visible_indices, patch_hw)
            positions = None if positions is None else F.embedding(visible_indices, positions[0])
        tokens = self.patch_projection(patches)  # (batch, patches, hidden_size)
        if masked is not None and mask_token is not None:
            tokens = torch.where(masked[:, :, None], mask_token.to(tokens.dtype), tokens)
        if positions is not None:
            tokens = tokens + positions.to(pixel_values.dtype)
        prefix = []
        if self.config.use_class_token:
            prefix.append(self.class_token.expand(batch, -1, -1))
        if self.config.num_register_tokens:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        return torch.cat([*prefix, tokens], dim=1) if prefix else tokens  # (batch, prefix + patches, hidden_size)


@auto_docstring
class VLMViTPreTrainedModel(PreTrainedModel):
    """Base of every model: how weights are initialised, what training may call, what transformers may rely on."""

    config_class = VLMViTConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the batch: gradient accumulation must divide them
    _no_split_modules = ["VLMViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_set_experts_implementation_cached_value = True  # else looked for in the source of each model's file
    _can_record_outputs = {"hidden_states": VLMViTLayer, "attentions": VLMViTAttention}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method; the configuration names, for remote code, all Auto classes that load the folder."""
        if self.is_remote_code():
            self.config.auto_map = self.auto_map()
        return super().save_pretrained(*args, **kwargs)

    def auto_map(self) -> dict[str, str]:
        """Auto classes and what they load, beside the class that was registered for this one."""
        return {"AutoModel": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}

    def after_step(self, progress: float) -> None:
        """Called once per optimiser step, for state that gradients do not change: teachers, schedules.

        Args:
            progress: Fraction of training that is done, above 0 and up to 1.
        """

    def after_encoder_loaded(self) -> None:
        """Called once weights were loaded into `self.backbone`, for what follows from them, such as a teacher."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would only shrink, beside vectors and gains.

        Tokens are no matrices, though they are stored with leading axes of one, nor are the biases of all experts.
        """
        return {name for name, _ in self.named_parameters() if name.endswith((*TOKENS, "_proj_bias"))}

    def late_parameters(self) -> dict[str, float]:
        """Parameters that begin to learn later than the others: name -> fraction of training that is done by then.

        Their learning rate is 0 until then. They have gradients from the start, so that the moving averages of AdamW
        are ready.
        """
        return {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, SelfInitialised):
            module.init_parameters()
        elif std is None and isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.gain, module.value)
        for name in TOKENS:
            if name in module._parameters:
                init.trunc_normal_(getattr(module, name), std=std or SMALL_STD)


class _Encoder(VLMViTPreTrainedModel):
    """Parts and steps that the model and the backbone share, so that their weights have the same names."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        self.embeddings = VLMViTEmbeddings(config)
        self.layers = build_layers(config)
        self.norm = build_norm(config, config.hidden_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of every model. Of a saved pretraining model it takes the encoder that is for use.

        That is the teacher's for some methods, as their configuration says in `trained_encoder`.
        """
        source = pretrained_model_name_or_path
        trained = trained_encoder_of({} if source is None else read_saved_config(source, **kwargs))
        if trained == "backbone":
            return super().from_pretrained(source, *args, **kwargs)
        names = {r"^backbone\.": "student.", rf"^{re.escape(trained)}\.": "backbone."}
        kwargs["key_mapping"] = names | (kwargs.get("key_mapping") or {})
        loaded = super().from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__dict__.pop("_weight_conversions", None)  # else it would be saved under the names that it was found by
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """The stock method, which also leaves the rest of a saved model, as heads and decoders, out of the report."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        parts = {self.base_model_prefix, *(name for name, _ in self.named_children())}
        loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if key.split(".")[0] in parts}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of tokens: that of the final norm, which, unlike linear layers, no quantisation packs into integers."""
        weight: Any = self.norm.weight
        return weight.dtype  # type: ignore[no-any-return]

    def auto_map(self) -> dict[str, str]:
        return {"AutoModel": "modeling_vlm_vit.VLMViTModel", "AutoBackbone": "modeling_vlm_vit.VLMViTBackbone"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_projection

    def embed(
        self,
        pixel_values: Tensor,
        visible_indices: Tensor | None = None,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, Positions]:
        """Tokens (batch, prefix + patches, dim), and cos and sin (batch or 1, 1, patches, head_dim) where rotary."""
        check_pixel_values(pixel_values, self.config)
        pixel_values = pixel_values.to(self.compute_dtype)
        tokens = self.embeddings(pixel_values, visible_indices, masked, mask_token)
        if self.config.position_embedding_type != "rope":
            return tokens, None
        grid_hw = patch_grid(pixel_values, self.config.patch_hw)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        angles = rope_positions(head_dim, self.config.rope_theta, grid_hw, tokens.device)  # (patches, head_dim)
        angles = angles[None] if visible_indices is None else angles[visible_indices]
        angles = angles[:, None]  # (batch or 1, 1, patches, head_dim)
        return tokens, (angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype))


@auto_docstring
class VLMViTModel(_Encoder):
    """The encoder: images to token features."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        visible_indices: Tensor | None = None,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        class_token_only: bool = False,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        r"""
        visible_indices (`torch.LongTensor` of shape `(batch, visible)`, *optional*):
            Row-major indices of the patches to encode. All patches are encoded when it is not given.
        masked (`torch.BoolTensor` of shape `(batch, patches)`, *optional*):
            True for the patches whose content is replaced by `mask_token`.
        mask_token (`torch.FloatTensor` of shape `(1, 1, hidden_size)`, *optional*):
            Embedding of masked patches. It belongs to the pretraining method, not to the encoder.
        class_token_only (`bool`, *optional*, defaults to `False`):
            Whether the last layer computes the class token alone, when nothing else is read.
        """
        hidden_states, positions = self.embed(pixel_values, visible_indices, masked, mask_token)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, positions, output_attentions=output_attentions)
        return self._finish(hidden_states, positions, class_token_only, output_attentions=output_attentions)

    def _finish(
        self, hidden_states: Tensor, positions: Positions, class_token_only: bool, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The last layer and what follows it."""
        last = self.layers[-1]
        if class_token_only and self.config.use_class_token:  # a class token has no rotary position
            hidden_states = last(hidden_states[:, :1], None, hidden_states, positions, **kwargs)
        else:
            hidden_states = last(hidden_states, positions, **kwargs)
        hidden_states = self.norm(hidden_states)  # (batch, prefix + patches or 1, hidden_size)
        pooled = hidden_states[:, 0] if self.config.use_class_token else self._mean_of_patches(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def encode_crops(
        self,
        crops: Sequence[Tensor],
        *,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
        class_tokens_only: bool = False,
    ) -> list[BaseModelOutputWithPooling]:
        """Encodes crops of several sizes in one pass, packed without padding.

        Args:
            crops: (crops, channels, height, width) of each size, large ones first.
            masked: (crops, patches), of the first size; see `forward`.
            mask_token: (1, 1, hidden_size).
            class_tokens_only: Whether of the first size, too, nothing but the class token is read.

        Returns:
            What `forward` returns, for each size; all but the first with the class token alone, where there is one.
        """
        embedded = [self.embed(crops[0], None, masked, mask_token), *map(self.embed, crops[1:])]
        groups, positions = [tokens for tokens, _ in embedded], [where for _, where in embedded]
        packing = Packing.of(groups)
        hidden_states = packing.pack(groups)  # (1, all tokens, hidden_size)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, positions, packing=packing)
        return [
            self._finish(tokens, where, class_token_only=class_tokens_only or index > 0)
            for index, (tokens, where) in enumerate(zip(packing.unpack(hidden_states), positions))
        ]

    def _mean_of_patches(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1)


@auto_docstring
class VLMViTBackbone(BackboneMixin, _Encoder):
    """The encoder as a backbone: images to feature maps of chosen layers."""

    def __init__(self, config: VLMViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        hidden_states, positions = self.embed(pixel_values)
        grid_hw = patch_grid(pixel_values, self.config.patch_hw)
        maps = []
        stages: Sequence[nn.Module] = [nn.Identity(), *self.layers]
        for name, stage in zip(self.stage_names, stages):
            if name != "stem":
                hidden_states = stage(hidden_states, positions, output_attentions=output_attentions)
            if name in self.out_features:
                tokens = self.norm(hidden_states) if self.config.apply_layernorm else hidden_states
                maps.append(self._feature_map(tokens, grid_hw))
        return BackboneOutput(feature_maps=tuple(maps))

    def _feature_map(self, tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Patch tokens as a map (batch, dim, rows, columns), or all tokens (batch, tokens, dim) as they are."""
        if not self.config.reshape_hidden_states:
            return tokens
        return tokens[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid_hw)


__all__ = ["VLMViTBackbone", "VLMViTModel", "VLMViTPreTrainedModel"]
