"""Image processors of transformers and ours make the same of a picture."""

import json

import pytest
import torch
import transformers
from PIL import Image

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_image_processor import load_our_processor, load_processor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor

SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = Image.effect_noise((50, 40), 60).convert("RGB")


@pytest.mark.parametrize(
    ("written", "size", "words"),
    [
        ({"size": {"height": 40, "width": 48}, "image_mean": [0.1, 0.2, 0.3]}, (40, 48), "the checkpoint's"),
        ({"size": 24, "resample": 3, "image_std": [0.5, 0.4, 0.3]}, (24, 24), "the checkpoint's"),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            (32, 32),
            "without keeping sides in proportion",
        ),
        ({"size": {"shortest_edge": 41}}, (40, 40), "without keeping sides in proportion"),
        ({"size": {"longest_edge": 41}}, (32, 32), "the checkpoint's"),
        ({"do_normalize": False, "size": {"height": 32, "width": 32}}, (32, 32), "the checkpoint's"),
        (None, (32, 32), "no preprocessor_config.json"),
    ],
)
def test_the_image_processor_is_the_checkpoints(written, size, words, tmp_path):
    if written is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    ours, origin = load_processor(str(tmp_path), VLMViTConfig(**SIZE))
    assert words in origin
    assert (ours.size["height"], ours.size["width"]) == size
    wanted = {key: value for key, value in (written or {}).items() if key not in ("size", "crop_size")}
    wanted = {"image_mean": ours.image_mean, "image_std": ours.image_std} | wanted
    theirs = transformers.ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]}, **{k: v for k, v in wanted.items() if k != "do_center_crop"}
    )
    expected = theirs(PICTURE, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours(PICTURE, return_tensors="pt")["pixel_values"], expected, atol=1e-6, rtol=1e-6)


def test_the_image_processor_goes_back(tmp_path):
    assert load_our_processor(str(tmp_path)) == (None, "no preprocessor_config.json, and so none was written")
    statistics = {"image_mean": [0.3] * 3, "image_std": [0.2] * 3}
    ours = VLMViTImageProcessor(size={"height": 24, "width": 40}, resample=3, **statistics)
    ours.save_pretrained(tmp_path)
    theirs, _ = load_our_processor(str(tmp_path))
    assert theirs.to_dict()["image_processor_type"] == "ViTImageProcessor"
    found, expected = (processor(PICTURE, return_tensors="pt")["pixel_values"] for processor in (theirs, ours))
    assert torch.equal(found, expected)


def test_other_channels_without_statistics(tmp_path):
    processor, _ = load_processor(str(tmp_path), VLMViTConfig(**SIZE, num_channels=5))
    assert list(processor.image_mean) == [0.5] * 5
