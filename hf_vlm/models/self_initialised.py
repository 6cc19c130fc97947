"""Layers that initialise themselves."""

from torch import nn


class SelfInitialised(nn.Module):
    """A layer with an initialisation of its own, which `_init_weights` calls in place of that by the configuration."""

    def init_parameters(self) -> None:
        """Initialises the layer's own parameters."""
        raise NotImplementedError


__all__ = ["SelfInitialised"]
