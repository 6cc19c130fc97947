"""kNN and linear accuracy of frozen features against a plain loop over the same images."""

import pytest
import torch

from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.views import EvalTransform
from hf_vlm.features.accuracy import evaluate_features
from hf_vlm.metrics import knn_accuracy, linear_accuracy
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

ENCODER = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("use_class_token", [True, False])
def test_features_are_evaluated_by_what_the_encoder_has(use_class_token):
    torch.manual_seed(0)
    encoder = VLMViTModel(VLMViTConfig(**ENCODER, use_class_token=use_class_token))
    transform = EvalTransform(48, image_mean=0.5, image_std=0.5)

    def stream(split, n):
        source = open_source("scenes:easy", split, num_samples=n)
        return ExampleStream(source.dataset, transform, shuffle=False, repeat=False)

    metrics = evaluate_features(encoder, stream("train", 60), stream("test", 40), batch_size=16)
    features, labels = {}, {}
    with torch.no_grad():
        for split, n in (("train", 60), ("test", 40)):
            examples = list(stream(split, n))
            images = torch.stack([example["pixel_values"] for example in examples])
            tokens = encoder.eval()(images).last_hidden_state
            features[split] = {"": tokens[:, int(use_class_token) :].mean(1)}
            if use_class_token:
                features[split] |= {"_class": tokens[:, 0]}
                features[split] |= {"_both": torch.cat([tokens[:, 0], features[split][""]], dim=1)}
            labels[split] = torch.tensor([example["label"] for example in examples])
    assert len(metrics) == 2 * len(features["test"])
    for suffix, test_features in features["test"].items():
        data = features["train"][suffix], labels["train"], test_features, labels["test"]
        assert metrics["knn" + suffix] == pytest.approx(knn_accuracy(*data))
        assert metrics["linear" + suffix] == pytest.approx(linear_accuracy(*data), abs=0.026)  # one image
    assert len(set(metrics.values())) > 2 or not use_class_token
