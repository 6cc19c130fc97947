"""The light transformer that predicts masked patches: MAE's decoder, I-JEPA's predictor."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTPreTrainedModel
from .vit_layers import build_layers, build_norm, sincos_positions


class MaskedPredictor(VLMViTPreTrainedModel):
    """Light transformer that predicts masked patches, as pixels or features, from encoded visible ones.

    Args:
        config: Width, depth and heads.
        encoder_size: Width of the encoded tokens.
        output_size: Values predicted per patch.
        use_cross_attention: Whether masked tokens attend to the visible ones alone, as in CrossMAE (arXiv 2401.14391).
            The layers are otherwise those of MAE's decoder: CrossMAE's read a learned mixture of all encoder layers,
            each its own, at the encoder's width and without positions, where these read the last layer, embedded once.
    """

    def __init__(
        self, config: VLMViTConfig, encoder_size: int, output_size: int, *, use_cross_attention: bool = False
    ):
        super().__init__(config)
        self.use_cross_attention = use_cross_attention
        self.embed = nn.Linear(encoder_size, config.hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.layers = build_layers(config)
        self.norm = build_norm(config, config.hidden_size)
        self.predict = nn.Linear(config.hidden_size, output_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # As MAE's official code does, where query, key and value are one matrix; 0.02 is too little for narrow layers.
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)

    def forward(
        self, encoded: Tensor, visible: Tensor, masked: Tensor, grid_hw: tuple[int, int], with_visible: bool = False
    ) -> Tensor:
        """Predicts (batch, masked, output_size) at masked indices (batch, masked).

        Args:
            encoded: (batch, prefix + visible, encoder_size), class and register tokens first.
            visible: (batch, visible) indices of the encoded patches, row-major.
            masked: (batch, masked) indices of the patches to predict.
            grid_hw: Patches of an image, rows and columns.
            with_visible: Whether the visible patches are predicted too, before the masked ones: (batch, visible +
                masked, output_size). Not with cross-attention, which leaves them as they are.
        """
        tokens = self.embed(encoded)  # (batch, prefix + visible, decoder_size)
        positions = sincos_positions(self.config.hidden_size, grid_hw, tokens.device).to(tokens.dtype)
        num_prefix, num_masked = tokens.shape[1] - visible.shape[1], masked.shape[1]
        seen = torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix:] + positions[visible]], dim=1)
        hidden = self.mask_token + positions[masked]  # (batch, masked, decoder_size)
        if self.use_cross_attention:
            for layer in self.layers:
                hidden = layer(hidden, None, seen)
        else:
            # Attention does not depend on the order of tokens, so they need not be in the order of the image.
            everything = torch.cat([seen, hidden], dim=1)
            for layer in self.layers[:-1]:
                everything = layer(everything)
            read = everything[:, num_prefix:] if with_visible else everything[:, -num_masked:]
            hidden = self.layers[-1](read, None, everything)
        return self.predict(self.norm(hidden))


__all__ = ["MaskedPredictor"]
