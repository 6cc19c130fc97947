"""What the configuration of a saved model says before the model is loaded."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


def read_saved_config(source: Any, **options: Any) -> dict[str, Any]:
    """The saved configuration that `from_pretrained` would find by these options; empty where there is none."""
    known = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    try:
        return PreTrainedConfig.get_config_dict(source, **{key: options[key] for key in known if key in options})[0]
    except OSError:  # weights without a configuration, which is then given
        return {}


def trained_encoder_of(saved: dict[str, Any]) -> str:
    """Name of the encoder for use in a saved model of this configuration."""
    former = "teacher.backbone" if saved.get("model_type") in ("vlm_dinov2", "vlm_ijepa") else "backbone"
    return str(saved.get("trained_encoder", former))  # version 0.1 did not save it


__all__ = ["read_saved_config", "trained_encoder_of"]
