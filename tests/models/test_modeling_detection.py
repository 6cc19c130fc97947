"""The detector: that it predicts, learns, saves, loads and runs where it should."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import perturb
from transformers import Trainer, TrainingArguments, pipeline

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.detection_layers import grid_anchors
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.loss_detection import iou_and_giou, to_corners
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_vlm_vit import VLMViTModel


def encoder_config(**overrides: Any) -> VLMViTConfig:
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return VLMViTConfig(**{**shape, **overrides})


def detection_config(**overrides: Any) -> VLMViTDetectionConfig:
    shape = {
        "backbone_config": encoder_config(),
        "num_labels": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_decoder_layers": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "neck_num_blocks": 1,
    }
    return VLMViTDetectionConfig(**{**shape, **overrides})


@pytest.fixture
def model() -> VLMViTForObjectDetection:
    """Untrained, but with heads that differ between locations and classes."""
    torch.manual_seed(0)
    built = VLMViTForObjectDetection(detection_config()).eval()
    perturb(built)
    return built


def batch_of(num_images: int, *, with_objects: bool = True, seed: int = 0) -> dict[str, Any]:
    """Grey noise with one or two bright rectangles an image, whose class is the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = 0.3 * torch.randn(num_images, 3, 32, 32, generator=generator)
    labels = []
    for image in pixel_values:
        classes, boxes = [], []
        corners = [(1, 1), (17, 16)][: 1 + int(torch.randint(2, (), generator=generator))] if with_objects else []
        for x, y in corners:
            width, height = (int(v) for v in torch.randint(7, 14, (2,), generator=generator))
            classes.append(int(torch.randint(3, (), generator=generator)))
            image[classes[-1], y : y + height, x : x + width] += 3
            boxes.append([(x + width / 2) / 32, (y + height / 2) / 32, width / 32, height / 32])
        labels.append({
            "class_labels": torch.tensor(classes, dtype=torch.int64),
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "image_id": torch.tensor(0),
        })  # fmt: skip
    return {"pixel_values": pixel_values, "labels": labels}


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "taps", "indices"), [(12, 4, [3, 6, 9, 12]), (6, 4, [2, 3, 5, 6]), (2, 4, [1, 2])])
def test_taps_are_evenly_spaced_and_end_at_the_last_layer(layers: int, taps: int, indices: list[int]) -> None:
    encoder = encoder_config(num_hidden_layers=layers)
    config = detection_config(backbone_config=encoder, num_feature_taps=taps)
    assert config.encoder.out_indices == indices
    assert encoder.out_indices == [layers]  # the caller's configuration stays as it was


def test_configuration_round_trip(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog"}
    encoder = encoder_config()
    config = VLMViTDetectionConfig(backbone_config=encoder, num_neck_levels=2, num_points=4, id2label=names)
    config.save_pretrained(tmp_path)
    loaded = VLMViTDetectionConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.backbone_config, VLMViTConfig)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.num_labels, loaded.id2label) == (2, names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 33),
        ("num_cross_attention_heads", 5),
        ("num_neck_levels", 3),
        ("num_queries", 0),
        ("prior_probability", 1.0),
        ("anchor_size", 0.0),
    ],
)
def test_bad_configurations_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        detection_config(**{field: value})


# --- forward --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_untrained_predictions_are_anchors_with_the_prior_score() -> None:
    model = VLMViTForObjectDetection(detection_config(prior_probability=0.05)).eval()
    output = model(torch.randn(1, 3, 32, 48))
    anchors = grid_anchors([(4, 6)], 2.0, torch.device("cpu"))
    torch.testing.assert_close(output.pred_boxes, output.reference_boxes)
    distance = (output.pred_boxes[0][:, None] - anchors).abs().sum(-1)
    assert float(distance.amin(0).max()) < 1e-6
    assert float(distance.amin(1).max()) < 1e-6
    torch.testing.assert_close(output.logits.sigmoid(), torch.full((1, 24, 3), 0.05), atol=0.02, rtol=0)


@torch.no_grad()
def test_queries_start_from_the_best_proposals_at_any_number(model: VLMViTForObjectDetection) -> None:
    pixel_values = torch.randn(2, 3, 32, 32)
    everything = model(pixel_values)
    assert everything.logits.shape == (2, 16, 3)  # 300 are clipped to the 16 locations
    model.config.num_queries = 5
    few = model(pixel_values)
    assert few.logits.shape == (2, 5, 3)
    torch.testing.assert_close(few.reference_boxes, everything.reference_boxes[:, :5])
    source = model.neck(model.backbone(pixel_values).feature_maps)[0].flatten(2).transpose(1, 2)
    _, logits, _ = model.proposal_head(source, grid_anchors([(4, 4)], 2.0, source.device), 16)
    scores = logits.amax(-1)
    torch.testing.assert_close(scores, scores.sort(descending=True).values)


@pytest.mark.parametrize("levels", [1, 2])
def test_labels_do_not_leak_into_predictions(levels: int) -> None:
    torch.manual_seed(0)
    model = VLMViTForObjectDetection(detection_config(num_neck_levels=levels))
    perturb(model)
    batch = batch_of(2)
    with torch.no_grad():
        outputs = [model.train(mode)(**batch) for mode in (True, False)] + [model(batch["pixel_values"])]
    for other in outputs[1:]:
        torch.testing.assert_close(other.logits, outputs[0].logits)
        torch.testing.assert_close(other.pred_boxes, outputs[0].pred_boxes)
    assert outputs[-1].loss is None
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)


def test_each_stage_learns_its_own_boxes(model: VLMViTForObjectDetection) -> None:
    output = model(torch.randn(1, 3, 32, 32))
    assert not output.reference_boxes.requires_grad
    output.pred_boxes.sum().backward()
    assert all(p.grad is None for p in model.proposal_head.box_head.parameters())
    assert model.proposal_head.projection.weight.grad.abs().sum() > 0  # contents do carry gradients


@pytest.mark.parametrize("with_objects", [True, False])
def test_every_parameter_gets_a_finite_gradient(with_objects: bool) -> None:
    torch.manual_seed(0)
    model = VLMViTForObjectDetection(detection_config(num_neck_levels=2))
    perturb(model, 0.02)
    output = model(**batch_of(3, with_objects=with_objects))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if with_objects:
            assert parameter.grad.any(), name
    if not with_objects:
        assert float(output.loss_dict["loss_bbox"]) == float(output.loss_dict["loss_giou"]) == 0
        assert output.loss.item() > 0


def test_some_images_without_objects_train() -> None:
    torch.manual_seed(0)
    model = VLMViTForObjectDetection(detection_config())
    batch = batch_of(3)
    batch["labels"][1] = batch_of(1, with_objects=False)["labels"][0]
    model(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_bad_labels_and_images_are_refused(model: VLMViTForObjectDetection) -> None:
    batch = batch_of(2)
    batch["labels"][1]["class_labels"][0] = 3
    with pytest.raises(ValueError, match=r"labels\[1\] holds class 3"):
        model(**batch)
    with pytest.raises(ValueError, match="labels hold 1 dicts for 2 images"):
        model(batch["pixel_values"], labels=batch["labels"][:1])
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        model(torch.zeros(1, 3, 30, 32))


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = VLMViTForObjectDetection(detection_config())
    batch = batch_of(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=120)
    for _ in range(120):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        outputs = model.eval()(batch["pixel_values"])
    results = VLMViTDetectionImageProcessor().post_process_object_detection(outputs, threshold=0.5)
    for result, label in zip(results, batch["labels"]):
        assert len(result["scores"]) == len(label["class_labels"])  # no duplicates and no false alarms
        iou = iou_and_giou(result["boxes"][:, None], to_corners(label["boxes"]))[0]
        assert (iou.amax(0) > 0.9).all()
        assert result["labels"][iou.argmax(0)].tolist() == label["class_labels"].tolist()


# --- stack ----------------------------------------------------------------------------------------------------------


def test_save_and_load(model: VLMViTForObjectDetection, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = VLMViTForObjectDetection.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, second = model(pixel_values), loaded(pixel_values)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.pred_boxes, second.pred_boxes)


def test_pretrained_encoder_goes_into_the_backbone(tmp_path: Path) -> None:
    encoder = VLMViTModel(encoder_config())
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    model, info = VLMViTForObjectDetection.from_pretrained(
        tmp_path, config=detection_config(), output_loading_info=True
    )
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, model.backbone.state_dict()[name]), name
    assert not info["unexpected_keys"]
    assert not any(name.startswith("backbone") for name in info["missing_keys"])
    # heads that the checkpoint lacks went through the meta device: they must be initialised, not left as they were
    torch.testing.assert_close(model.class_head.bias, torch.full((3,), -math.log(99)))
    for head in (model.box_head, model.proposal_head.box_head, model.dense_head.box_head):
        assert not head[-1].weight.any()
        assert not head[-1].bias.any()
    for layer in model.decoder.layers:
        attention = layer.cross_attention
        assert not attention.sampling_offsets.weight.any()
        assert not attention.attention_weights.weight.any()
        torch.testing.assert_close(attention.sampling_offsets.bias, attention.sampling_offsets.initial_bias())
    assert all(p.abs().max().item() < 10 for p in model.parameters())


def test_half_precision_keeps_boxes_exact(model: VLMViTForObjectDetection) -> None:
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        output = model.to(torch.bfloat16)(pixel_values.bfloat16())
    assert output.logits.dtype == torch.bfloat16
    assert output.pred_boxes.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.float()(**batch_of(2)).loss
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_compiles_without_graph_breaks(model: VLMViTForObjectDetection) -> None:
    pixel_values = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).pred_boxes, model(pixel_values).pred_boxes)
        assert isinstance(model(pixel_values, return_dict=False), tuple)


def test_activation_checkpointing_changes_no_gradient(model: VLMViTForObjectDetection) -> None:
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch_of(2)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(layer.gradient_checkpointing for layer in model.decoder.layers)
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


def test_pipeline_finds_what_the_processor_finds(model: VLMViTForObjectDetection) -> None:
    model.config.id2label = {0: "red", 1: "green", 2: "blue"}
    processor = VLMViTDetectionImageProcessor(size={"height": 32, "width": 32})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    detector = pipeline("object-detection", model=model, image_processor=processor)
    found = detector(image, threshold=0.0)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(60, 90)])
    assert len(found) == len(expected["scores"]) == 48
    for item, score, label, box in zip(found, *expected.values()):
        assert item["score"] == pytest.approx(float(score))
        assert item["label"] == model.config.id2label[int(label)]
        assert list(item["box"].values()) == box.int().tolist()
    others = [image, image.rotate(90), image.rotate(180)]  # a batch is taken apart again by the pipeline
    alone, together = [detector(one, threshold=0.0) for one in others], detector(others, threshold=0.0, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert [item["label"] for item in other] == [item["label"] for item in one]
        assert [item["score"] for item in other] == pytest.approx([item["score"] for item in one], abs=1e-6)


def test_stock_trainer_trains_and_evaluates(model: VLMViTForObjectDetection, tmp_path: Path) -> None:
    batch = batch_of(4)
    examples = [
        {"pixel_values": image, "labels": label} for image, label in zip(batch["pixel_values"], batch["labels"])
    ]

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([i["pixel_values"] for i in items]),
            "labels": [i["labels"] for i in items],
        }

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        eval_do_concat_batches=False, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples, data_collator=collate)
    trainer.train()
    prediction = trainer.predict(examples)
    assert [len(part) for part in prediction.predictions] == [2]  # logits and boxes, no more
    # accumulated steps must log the mean of their losses, not the sum
    with torch.no_grad():
        halves = [float(model(**collate(examples[i : i + 2])).loss) for i in (0, 2)]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(sum(halves) / 2, rel=0.2)
