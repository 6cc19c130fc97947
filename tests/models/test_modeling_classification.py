"""The classifier: its losses against loops, and that it learns, saves, loads and runs where it should."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import perturb
from transformers import Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.models.modeling_classification import (
    VLMViTClassificationConfig,
    VLMViTForImageClassification,
    classification_loss,
)
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def encoder_config(**overrides: Any) -> VLMViTConfig:
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return VLMViTConfig(**{**shape, **overrides})


def classification_config(**overrides: Any) -> VLMViTClassificationConfig:
    return VLMViTClassificationConfig(**{"backbone_config": encoder_config(), "num_labels": 3, **overrides})


@pytest.fixture
def model() -> VLMViTForImageClassification:
    torch.manual_seed(0)
    built = VLMViTForImageClassification(classification_config()).eval()
    perturb(built)
    return built


def batch_of(num_images: int) -> dict[str, torch.Tensor]:
    """Noise in which one channel is brighter: the class."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = 0.5 * torch.randn(num_images, 3, 32, 32, generator=generator)
    labels = torch.arange(num_images) % 3
    pixel_values[torch.arange(num_images), labels] += 1
    return {"pixel_values": pixel_values, "labels": labels}


# --- configuration --------------------------------------------------------------------------------------------------


def test_the_pooling_follows_the_encoder_unless_given() -> None:
    assert classification_config().pooling == "both"
    assert classification_config(backbone_config=encoder_config(use_class_token=False)).pooling == "mean"
    assert classification_config(pooling="class").pooling == "class"
    assert classification_config(backbone_config=encoder_config(use_class_token=False), pooling="attentive")


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = VLMViTClassificationConfig(
        backbone_config=encoder_config(),
        problem_type=MULTI,
        pooling="mean",
        label_smoothing=0.1,
        id2label={0: "cat", 1: "dog"},
    )
    config.save_pretrained(tmp_path)
    loaded = VLMViTClassificationConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.backbone_config, VLMViTConfig)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.num_labels, loaded.problem_type, loaded.id2label) == (2, MULTI, {0: "cat", 1: "dog"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 1}, "num_labels is 1, but at least 2"),
        ({"num_labels": None, "id2label": {0: "cat"}, "problem_type": MULTI}, "num_labels is 1"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"pooling": "both", "backbone_config": encoder_config(use_class_token=False)}, "has no class token"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
    ],
)
def test_bad_configurations_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification_config(**fields)


# --- loss -----------------------------------------------------------------------------------------------------------

LOGITS = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([2, 0, 3, 3, 1])
SOFT = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
PRESENT = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])


def soft_cross_entropy(logits: Any, targets: Any) -> float:
    losses = []
    for row, target in zip(logits.double().tolist(), targets):
        total = sum(math.exp(value) for value in row)
        losses.append(-sum(t * math.log(math.exp(value) / total) for value, t in zip(row, target)))
    return sum(losses) / len(losses)


def binary_cross_entropy(logits: Any, targets: Any) -> float:
    losses = []
    for row, target in zip(logits.double().tolist(), targets):
        for value, t in zip(row, target):
            probability = 1 / (1 + math.exp(-value))
            losses.append(-t * math.log(probability) - (1 - t) * math.log(1 - probability))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["hard", "soft"])
def test_one_class_per_image_is_cross_entropy(labels: torch.Tensor, smoothing: float) -> None:
    targets = labels if labels.is_floating_point() else torch.eye(4)[labels]
    smoothed = [[t * (1 - smoothing) + smoothing / 4 for t in row] for row in targets.double().tolist()]
    loss = classification_loss(LOGITS, labels, problem_type=SINGLE, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(soft_cross_entropy(LOGITS, smoothed), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [PRESENT, PRESENT.float(), SOFT], ids=["integers", "floats", "mixed"])
def test_several_classes_per_image_are_binary_cross_entropies(labels: torch.Tensor, smoothing: float) -> None:
    smoothed = [[t * (1 - smoothing) + smoothing / 2 for t in row] for row in labels.double().tolist()]
    loss = classification_loss(LOGITS, labels, problem_type=MULTI, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(binary_cross_entropy(LOGITS, smoothed), rel=1e-6)


@pytest.mark.parametrize(
    ("problem_type", "labels", "words"),
    [
        (SINGLE, CLASSES.float(), r"of the shape \(5,\) and the type torch.float32"),
        (SINGLE, PRESENT, r"of the shape \(5, 4\) and the type torch.int64"),
        (SINGLE, CLASSES[:4], r"of the shape \(4,\)"),
        (SINGLE, SOFT[:, :3], r"of the shape \(5, 3\)"),
        (SINGLE, CLASSES[0], r"of the shape \(\)"),
        (MULTI, CLASSES, r"must be \(batch, classes\)"),
        (MULTI, PRESENT[:2], r"of the shape \(2, 4\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(problem_type: str, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification_loss(LOGITS, labels, problem_type=problem_type)


def test_a_batch_never_changes_the_problem_type(model: VLMViTForImageClassification, tmp_path: Path) -> None:
    batch = batch_of(4)
    soft = torch.eye(3)[batch["labels"]] * 0.7 + 0.1
    output = model.train()(batch["pixel_values"], labels=soft)
    assert output.loss.item() == pytest.approx(soft_cross_entropy(output.logits.detach(), soft.tolist()), rel=1e-5)
    assert model.config.problem_type == SINGLE
    model.save_pretrained(tmp_path)
    assert VLMViTClassificationConfig.from_pretrained(tmp_path).problem_type == SINGLE


# --- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "class", "both"])
@torch.no_grad()
def test_logits_are_those_of_the_normalised_pooled_tokens(pooling: str) -> None:
    torch.manual_seed(0)
    encoder = encoder_config(num_register_tokens=2)
    model = VLMViTForImageClassification(classification_config(backbone_config=encoder, pooling=pooling)).eval()
    perturb(model)
    pixel_values = torch.randn(2, 3, 32, 48)
    tokens = model.backbone(pixel_values).last_hidden_state.double()
    parts = {"class": [tokens[:, 0]], "mean": [tokens[:, 3:].mean(1)]}
    parts["both"] = parts["class"] + parts["mean"]
    features = []
    for part in parts[pooling]:
        centered = part - part.mean(1, keepdim=True)
        normalised = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
        features.append(normalised * model.pooled_norm.weight.double() + model.pooled_norm.bias.double())
    expected = torch.cat(features, dim=1) @ model.classifier.weight.double().T + model.classifier.bias.double()
    torch.testing.assert_close(model(pixel_values).logits.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_encoder(model: VLMViTForImageClassification) -> None:
    model.set_attn_implementation("eager")
    pixel_values = batch_of(2)["pixel_values"]
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    expected = model.backbone(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert [a.shape for a in output.attentions] == [(2, 2, 17, 17)] * 2
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(*pair) for pair in zip(output[name], expected[name]))
    plain = model(pixel_values)
    assert plain.loss is plain.hidden_states is plain.attentions is None


def test_every_parameter_gets_a_gradient(model: VLMViTForImageClassification) -> None:
    model(**batch_of(3)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_overfits_one_batch(problem_type: str) -> None:
    torch.manual_seed(0)
    model = VLMViTForImageClassification(classification_config(problem_type=problem_type))
    batch = batch_of(9)
    if problem_type == MULTI:
        batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0]])[batch["labels"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0, fused=True)
    for _ in range(40):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    with torch.no_grad():
        logits = model.eval()(batch["pixel_values"]).logits
    found = logits.argmax(1) if problem_type == SINGLE else (logits > 0).float()
    assert torch.equal(found, batch["labels"])


# --- stack ----------------------------------------------------------------------------------------------------------


def test_save_and_load(model: VLMViTForImageClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = VLMViTForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = batch_of(2)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, loaded(pixel_values).logits)


def test_fields_given_on_loading_are_checked(model: VLMViTForImageClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for fields, words in (({"num_labels": 1}, "num_labels is 1"), ({"problem_type": "regression"}, "regression")):
        with pytest.raises(ValueError, match=words):
            VLMViTForImageClassification.from_pretrained(tmp_path, **fields)


def test_pretrained_encoder_goes_into_the_backbone(tmp_path: Path) -> None:
    encoder = VLMViTModel(encoder_config())
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    model, info = VLMViTForImageClassification.from_pretrained(
        tmp_path, config=classification_config(), output_loading_info=True
    )
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, model.backbone.state_dict()[name]), name
    assert not info["unexpected_keys"]
    assert not any(name.startswith("backbone") for name in info["missing_keys"])
    assert torch.equal(model.pooled_norm.weight, torch.ones(32))  # went through the meta device
    assert not model.classifier.bias.any()
    assert 0.01 < model.classifier.weight.std().item() < 0.03


def test_half_precision(model: VLMViTForImageClassification) -> None:
    batch = batch_of(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    with torch.no_grad():
        output = model.to(torch.bfloat16)(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss.item(), abs=0.1)


@pytest.mark.slow
def test_compiles_without_graph_breaks(model: VLMViTForImageClassification) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch in (batch_of(2), {**batch_of(2), "labels": torch.eye(3)[:2]}):
            first, second = compiled(**batch), model(**batch)
            torch.testing.assert_close(first.logits, second.logits)
            torch.testing.assert_close(first.loss, second.loss)
        assert isinstance(model(**batch, return_dict=False), tuple)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_pipeline_finds_what_the_processor_finds(
    model: VLMViTForImageClassification, problem_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, model.config.model_type, type(model).__name__)
    model.config.id2label = {0: "red", 1: "green", 2: "blue"}
    model.config.problem_type = problem_type
    processor = VLMViTClassificationImageProcessor(size={"height": 32, "width": 32})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=model, image_processor=processor)(image)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_image_classification(outputs, 0.0, problem_type=problem_type)
    assert [item["label"] for item in found] == [model.config.id2label[i] for i in expected["labels"].tolist()]
    assert [item["score"] for item in found] == pytest.approx(expected["scores"].tolist())
    assert len(found) == 3


def test_stock_trainer_trains_and_evaluates(model: VLMViTForImageClassification, tmp_path: Path) -> None:
    batch = batch_of(4)
    examples = [
        {"pixel_values": image, "labels": label} for image, label in zip(batch["pixel_values"], batch["labels"])
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    prediction = trainer.predict(examples)
    assert prediction.predictions.shape == (4, 3)  # logits and no more
    # accumulated steps must log the mean of their losses, not the sum
    with torch.no_grad():
        loss = float(model(**batch).loss)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(loss, rel=1e-3)


def test_the_temperature_divides_logits_in_evaluation_alone(model: VLMViTForImageClassification) -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    plain = model(images, labels)
    model.config.temperature = 2.5
    divided, trained = model(images, labels), model.train()(images, labels)
    torch.testing.assert_close(divided.logits * 2.5, plain.logits)
    torch.testing.assert_close(trained.logits, plain.logits)
    assert divided.loss == plain.loss == trained.loss
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    processor = VLMViTClassificationImageProcessor(size={"height": 32, "width": 32})
    found = pipeline("image-classification", model=model.eval(), image_processor=processor)(picture)
    expected = model(**processor(picture, return_tensors="pt")).logits.softmax(dim=1)[0]
    assert [entry["score"] for entry in found] == pytest.approx(expected.sort(descending=True).values.tolist())


def test_a_temperature_is_above_0() -> None:
    with pytest.raises(ValueError, match="temperature is 0, but must be above 0"):
        classification_config(temperature=0)


# --- attentive pooling and frozen encoders --------------------------------------------------------------------------


@torch.no_grad()
def test_attentive_pooling_is_softmax_attention_of_one_query() -> None:
    torch.manual_seed(0)
    model = VLMViTForImageClassification(classification_config(pooling="attentive")).eval().double()
    perturb(model)
    pooling, tokens = model.attentive_pooling, torch.randn(2, 5, 32, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(tokens, (32,), pooling.norm.weight, pooling.norm.bias, pooling.norm.eps)
    attention = pooling.attention
    expected = torch.empty(2, 1, 32, dtype=torch.float64)
    for image in range(2):
        query = attention.query(pooling.query_token[0, 0])
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = attention.key(normed[image])[:, head] @ query[head] / 4  # the root of 16
            heads.append(scores.softmax(0) @ attention.value(normed[image])[:, head])
        expected[image, 0] = attention.projection(torch.cat(heads))
    torch.testing.assert_close(pooling(tokens), expected)


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_a_frozen_encoder_keeps_every_bit_while_the_head_learns(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    VLMViTForImageClassification(classification_config(pooling=pooling, freeze_encoder=True)).save_pretrained(tmp_path)
    model = VLMViTForImageClassification.from_pretrained(tmp_path).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch_of(6)).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if not name.startswith("backbone.")}
