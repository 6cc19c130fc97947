"""Configuration of the plain Vision Transformer that every model of the package is built on."""

from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

# Width, depth and heads of the published encoders. ViT-Ti..H: arXiv 2010.11929 and 2012.12877; So400m:
# arXiv 2305.13035; giant: DINOv2, arXiv 2304.07193; 7b: DINOv3, arXiv 2508.10104. nano is for CPUs and tests.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "so400m": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 14,
    },
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
    "giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "intermediate_size": 4096,
        "patch_size": 14,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "layerscale_value": 1e-5,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "layerscale_value": 1e-5,
        "num_register_tokens": 4,
        "position_embedding_type": "rope",
        "qkv_bias": False,
    },
}

POSITION_EMBEDDING_TYPES = ("learned", "sincos", "rope")
POSITION_INTERPOLATIONS = ("bicubic", "bicubic_antialias", "bicubic_offset")
NORM_TYPES = ("layernorm", "rmsnorm")
EXPERT_WEIGHTS = ("up_proj", "up_proj_bias", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"VLMViTConfig: {name} is {value!r}, but must be one of {', '.join(choices)}.")


@strict
class VLMViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Shape of a [`VLMViTModel`].

    One plain ViT covers by configuration what ViT, DeiT, MAE, DINOv2, DINOv3 and SigLIP encoders need.

    Args:
        image_size (`int` or `(height, width)`, defaults to 224):
            Size in pixels for which positions are: those of images of other sizes, which need only be multiples of
            the patch size, are interpolated between them.
        patch_size (`int` or `(height, width)`, defaults to 16): Size of a patch in pixels.
        num_channels (`int`, defaults to 3): Channels of the images: any number.
        intermediate_size (`int`, defaults to 0): Width of the MLP; 0 stands for 4 x `hidden_size`.
        use_gated_mlp (`bool`, defaults to `False`): SwiGLU-style MLP (with `hidden_act="silu"`).
        norm_type (`str`, defaults to `"layernorm"`): `"layernorm"` or `"rmsnorm"`.
        position_embedding_type (`str`, defaults to `"learned"`):
            `"learned"`, `"sincos"` (fixed, as in MAE) or `"rope"` (as in DINOv3).
        position_interpolation (`str`, defaults to `"bicubic"`):
            How learned positions are resized to images of other sizes: `"bicubic"` as in transformers,
            `"bicubic_antialias"` as in DINOv2 with registers, or `"bicubic_offset"` as in the official DINOv2 without
            registers, which scales by (patches + 0.1) / (trained patches).
        rope_theta (`float`, defaults to 100.0): Base period of the rotary positions.
        use_class_token (`bool`, defaults to `True`): Whether a class token leads the sequence. Without it the pooled
            output is the mean of the patch tokens.
        num_register_tokens (`int`, defaults to 0): Register tokens (arXiv 2309.16588).
        layerscale_value (`float`, *optional*): Initial LayerScale; `None` builds none.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last layer, growing linearly from 0.
        drop_path_uniform (`bool`, defaults to `False`): Whether all layers have the rate of the last, as in DINOv2.
        use_qk_norm (`bool`, defaults to `False`): Normalise queries and keys per head (arXiv 2302.05442).
        initializer_range (`float`, *optional*): Standard deviation of the initial weights of linear layers; `None`
            for Xavier's rule, by which they grow as layers get narrower. Methods of self-supervision set it to 0.02
            where it is `None`.
        num_experts (`int`, defaults to 0):
            MLPs of each sparse layer, a mixture of experts as in V-MoE (arXiv 2106.05974); 0 for a dense encoder.
        num_experts_per_tok (`int`, defaults to 1): Experts that each token passes.
        sparse_layers (`list[int]`, *optional*):
            Indices of the layers with experts, from the end where negative; `None` for every second one, the last
            included.
        norm_topk_prob (`bool`, defaults to `True`):
            Whether the weights of a token's experts, their probabilities, are scaled to sum to 1. Then a dense encoder
            whose MLPs are copied into all experts (`upcycle`) starts with its outputs. Without it, as in V-MoE, the
            MLPs' updates start at about `num_experts_per_tok / num_experts` of theirs.
        expert_capacity_factor (`float`, *optional*):
            Most tokens of an expert in training, relative to an equal part: the least probable choices beyond it are
            dropped. By default none are.
        router_noise (`float`, defaults to 0.0):
            Standard deviation of noise on the router's logits in training, in units of 1 / `num_experts`; V-MoE: 1.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the loss that keeps experts equally loaded.
        router_z_loss_coef (`float`, defaults to 0.001): Weight of the loss that keeps logits small.
        apply_layernorm (`bool`, defaults to `True`): Whether backbone feature maps pass the final norm.
        reshape_hidden_states (`bool`, defaults to `True`): Whether the backbone gives maps of the patches (batch,
            hidden_size, rows, columns), and not all tokens (batch, prefix + patches, hidden_size).
        out_features, out_indices: Stages that [`VLMViTBackbone`] returns: `"stage1"` to `"stageN"`, or the last.

    Raises:
        ValueError: if a value is out of its choices or widths, heads and sizes do not divide.
    """

    model_type = "vlm_vit"
    base_config_key = "backbone_config"
    # Tensor parallelism: heads and inner channels are divided. The norms of queries and keys, whose weights all heads
    # share, sum their gradients.
    base_model_tp_plan = {
        **{f"layers.*.attention.{name}": "colwise" for name in ("query", "key", "value")},
        **{f"layers.*.attention.{name}": "replicated_with_grad_allreduce" for name in ("query_norm", "key_norm")},
        "layers.*.attention.projection": "rowwise",
        "layers.*.mlp.gate_projection": "colwise",
        "layers.*.mlp.up_projection": "colwise",
        "layers.*.mlp.down_projection": "rowwise",
    }
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    base_model_ep_plan = {
        **{f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in EXPERT_WEIGHTS},
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 0
    hidden_act: str = "gelu"
    use_gated_mlp: bool = False
    norm_type: str = "layernorm"
    layer_norm_eps: float = 1e-6
    position_embedding_type: str = "learned"
    position_interpolation: str = "bicubic"
    rope_theta: float | int = 100.0
    use_class_token: bool = True
    num_register_tokens: int = 0
    layerscale_value: float | None = None
    drop_path_rate: float | int = 0.0
    drop_path_uniform: bool = False
    attention_dropout: float | int = 0.0
    qkv_bias: bool = True
    use_qk_norm: bool = False
    initializer_range: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 1
    sparse_layers: list[int] | None = None
    norm_topk_prob: bool = True
    expert_capacity_factor: float | int | None = None
    router_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self._check()
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def drop_path_rates(self) -> list[float]:
        """Rate of stochastic depth of each layer."""
        last = self.num_hidden_layers - 1
        relative = [1.0 if self.drop_path_uniform else i / max(1, last) for i in range(last + 1)]
        return [self.drop_path_rate * r for r in relative]

    def _check(self) -> None:
        _choose("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        _choose("position_interpolation", self.position_interpolation, POSITION_INTERPOLATIONS)
        _choose("norm_type", self.norm_type, NORM_TYPES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"VLMViTConfig: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.position_embedding_type == "sincos" and self.hidden_size % 4:
            raise ValueError(f"VLMViTConfig: sin-cos positions need hidden_size {self.hidden_size} divisible by 4.")
        if self.position_embedding_type == "rope" and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError("VLMViTConfig: rotary positions need a head size that is divisible by 4.")
        self._check_experts()
        for image, patch, side in zip(_pair(self.image_size), _pair(self.patch_size), ("height", "width")):
            if image % patch:
                raise ValueError(f"VLMViTConfig: image {side} {image} is not a multiple of the patch {side} {patch}.")

    def _check_experts(self) -> None:
        if self.num_experts < 0 or (self.sparse_layers is not None and not self.num_experts):
            raise ValueError(
                f"VLMViTConfig: num_experts is {self.num_experts}: name the number of experts, or leave sparse_layers "
                "out for a dense encoder."
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"VLMViTConfig: num_experts_per_tok must be in 1 to num_experts ({self.num_experts}), but is "
                f"{self.num_experts_per_tok}."
            )
        depth = self.num_hidden_layers
        if wrong := [index for index in self.sparse_layers or () if not -depth <= index < depth]:
            raise ValueError(f"VLMViTConfig: sparse_layers names layer {wrong[0]}, but there are {depth} from 0 on.")
        if self.expert_capacity_factor is not None and self.expert_capacity_factor <= 0:
            raise ValueError(
                f"VLMViTConfig: expert_capacity_factor must be positive, but is {self.expert_capacity_factor}: leave "
                "it out to drop no tokens."
            )
        for name in ("router_noise", "router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"VLMViTConfig: {name} must be at least 0, but is {getattr(self, name)}.")

    @property
    def sparse_layer_indices(self) -> frozenset[int]:
        """Indices of the layers with experts; none in a dense encoder."""
        depth = self.num_hidden_layers
        if not self.num_experts:
            return frozenset()
        layers = range(depth - 1, -1, -2) if self.sparse_layers is None else self.sparse_layers
        return frozenset(index % depth for index in layers)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VLMViTConfig":
        """Builds a named size (`PRESETS`), single fields overridden; ValueError names the presets there are."""
        if name not in PRESETS:
            raise ValueError(f"No encoder preset {name!r}. There are: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return height // patch_height, width // patch_width

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x patch height x patch width."""
        patch_height, patch_width = self.patch_hw
        return self.num_channels * patch_height * patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.use_class_token) + self.num_register_tokens


def own_encoder_config(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A head's encoder configuration, from an object, a dictionary, or none for the defaults.

    An object is copied: heads set fields of it, and the caller's may serve other models.
    """
    if config is None or isinstance(config, dict):
        return VLMViTConfig(**(config or {}))
    return deepcopy(config)


__all__ = ["PRESETS", "VLMViTConfig", "own_encoder_config"]
