import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    MobileNetV2Config,
    MobileNetV2Model,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTModel,
)

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_distill import DistillConfig, DistillForPreTraining, FeatureQueue, RunningStandardizer
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_frozen import feature_width, frozen_features, renormalise, resize_map

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of small random encoders: one of this package, and two of transformers."""
    torch.manual_seed(0)
    models = {
        "ours": VLMViTModel(VLMViTConfig(**{**BACKBONE, "hidden_size": 24, "num_register_tokens": 2})),
        "dinov2": Dinov2Model(Dinov2Config(**SMALL)),
        "clip": CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    }
    folders = {}
    for name, model in models.items():
        with torch.no_grad():  # fresh weights are so small that features hardly depend on the image
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        processor = VLMViTImageProcessor() if name == "ours" else None
        (processor or ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])).save_pretrained(
            folders[name]
        )
    return folders


def build(teacher, backbone=None, **options):
    torch.manual_seed(1)
    config = DistillConfig(backbone_config={**BACKBONE, **(backbone or {})}, teacher=teacher, **options)
    return DistillForPreTraining(config).train()


def standardised(features):
    mean = sum(features) / len(features)
    variance = sum((row - mean) ** 2 for row in features) / len(features)
    return [(row - mean) / (variance + 1e-6).sqrt() for row in features]


def reference_part(predictions, features):
    """1 - cosine + smooth-L1 of the first batch, row by row in float64."""
    total = 0.0
    for row, target in zip(predictions, standardised([f.double() for f in features]), strict=True):
        cosine = (row * target).sum() / row.norm() / target.norm()
        errors = (row - target).abs()
        total = total + 1 - cosine + torch.where(errors < 1, 0.5 * errors**2, errors - 0.5).mean()
    return total / len(predictions)


def reference_divergence(predictions, features, temperature=0.07):
    """KL divergence of similarities to the images of the first batch, row by row in float64."""
    queue, total = [F.normalize(row, dim=0) for row in standardised([f.double() for f in features])], 0.0
    for row, target in zip(predictions, queue, strict=True):
        unlike = torch.zeros(2048 - len(queue), dtype=torch.float64)  # the queue is not yet full
        by_teacher, by_student = (
            torch.cat([torch.stack([one @ other for other in queue]), unlike]) / temperature
            for one in (target, row / row.norm())
        )
        p, q = by_teacher.softmax(0), by_student.softmax(0)
        total = total + (p * (p / q).log()).sum()
    return total / len(queue)


def test_loss_and_gradients_equal_a_slow_reference(teachers):
    """DINOv2 as a teacher: in its own normalisation and size, its map on the student's grid, its class token."""
    model, images = build(teachers["dinov2"], teacher_image_size=56).double(), torch.randn(3, 3, 32, 32).double()
    output = model(images[:, None])
    teacher = Dinov2Model.from_pretrained(teachers["dinov2"]).double().eval()
    pixels = (
        images * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    pixels = (pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    pixels = F.interpolate(pixels, (56, 56), mode="bilinear", antialias=True).double()
    with torch.no_grad():
        truth = teacher(pixels).last_hidden_state
    maps = truth[:, 1:].transpose(1, 2).reshape(3, 16, 4, 4)  # 56 / 14 patches, and 32 / 8 of the student
    tokens = model.backbone(images).last_hidden_state
    of_patches = reference_part(
        model.patch_head(tokens[:, 1:]).reshape(48, 16), list(maps.flatten(2).transpose(1, 2).reshape(48, 16))
    )
    of_image = reference_divergence(model.image_head(tokens[:, 0]), list(truth[:, 0]))
    expected = of_patches + of_image
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert 1 - output.patch_cosine.item() + output.patch_smooth_l1.item() == pytest.approx(of_patches.item(), rel=1e-4)
    assert output.image_kl.item() == pytest.approx(of_image.item(), rel=1e-4)
    cosines = F.cosine_similarity(model.image_head(tokens[:, 0]), torch.stack(standardised(list(truth[:, 0]))))
    assert output.image_cosine.item() == pytest.approx(cosines.mean().item(), rel=1e-4)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) + len(list(teacher.parameters())) == len(list(model.parameters()))
    ours = torch.autograd.grad(output.loss, learned)  # all of them take part
    torch.testing.assert_close(ours, torch.autograd.grad(expected, learned), rtol=1e-3, atol=1e-4)


def test_grids_of_different_sizes_are_brought_together(teachers):
    """Patches of 14 pixels form a grid of 2 x 3 in an image in which those of 8 form one of 4 x 5."""
    model = build(teachers["dinov2"])
    patches, image = model._targets(torch.randn(2, 3, 32, 40))
    assert patches.shape == (2, 16, 2, 3)
    assert image.shape == (2, 16)
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)
    torch.testing.assert_close(resize_map(ramp, (3, 2)), resize_map(ramp, (1, 2)).expand(-1, -1, 3, -1))
    assert resize_map(ramp, (3, 8)).diff(dim=3).min() >= 0
    assert model(torch.randn(2, 3, 32, 40)).loss.isfinite()


def test_features_of_all_families_of_teachers_are_found():
    """Register tokens are left out; positions are resized, also where a model does so only on request."""
    cases = (
        (ViTConfig(**SMALL), ViTModel, 16, True),
        (VLMViTConfig(**BACKBONE, num_register_tokens=3), VLMViTModel, 32, True),
        (VLMViTConfig(**BACKBONE, num_register_tokens=3, use_class_token=False), VLMViTModel, 32, False),
    )
    for config, model_class, width, has_class_token in cases:
        assert feature_width(config, (56, 56)) == width
        model, images = model_class(config).eval(), torch.randn(1, 3, 56, 56)
        patch = config.patch_size
        patches, image = frozen_features(model, images, (patch, patch))
        options = {"interpolate_pos_encoding": True} if model_class is ViTModel else {}
        tokens = model(images, **options).last_hidden_state
        rows = 56 // patch
        assert torch.equal(patches[0, :, 1, 2], tokens[0, tokens.shape[1] - rows**2 + rows + 2])
        expected = tokens[:, 0] if has_class_token else tokens[:, -(rows**2) :].mean(1)
        torch.testing.assert_close(image, expected)
    swin = SwinConfig(image_size=32, embed_dim=24, depths=[1, 1], num_heads=[2, 2])
    with pytest.raises(ValueError, match="'swin' cannot be taught from at 32 x 32 pixels"):
        feature_width(swin, (32, 32))


def test_a_convolutional_teacher_gives_its_map_and_what_it_pools():
    config = MobileNetV2Config(depth_multiplier=0.1, tf_padding=False)
    teacher, images = MobileNetV2Model(config).eval(), torch.randn(2, 3, 64, 96)
    output = teacher(images)
    patches, image = frozen_features(teacher, images, (1, 1))
    assert torch.equal(patches, output.last_hidden_state)
    assert patches.shape == (2, feature_width(config, (64, 96)), 2, 3)
    torch.testing.assert_close(image, output.pooler_output)


def test_images_are_renormalised():
    config = DistillConfig(
        backbone_config={**BACKBONE, "num_channels": 2},
        image_mean=[0.1, 0.2],
        image_std=[0.5, 0.25],
        teacher_mean=[0.3],
        teacher_std=[2.0],
    )
    pixels = torch.rand(2, 2, 4, 4)
    ours = (pixels - torch.tensor([0.1, 0.2])[:, None, None]) / torch.tensor([0.5, 0.25])[:, None, None]
    torch.testing.assert_close(renormalise(ours, config, "teacher"), (pixels - 0.3) / 2)


def test_statistics_are_those_of_all_batches():
    torch.manual_seed(0)
    standardizer, batches = RunningStandardizer(3).train(), torch.randn(5, 8, 3) * 4 + 7
    for batch in batches:
        found = standardizer(batch)
    everything = batches.flatten(0, 1)
    torch.testing.assert_close(standardizer.mean, everything.mean(0))
    torch.testing.assert_close(standardizer.variance, everything.var(0, correction=0))
    torch.testing.assert_close(found, (batches[-1] - everything.mean(0)) / everything.std(0, correction=0))
    standardizer.eval()(batches[0] + 100)
    assert standardizer.num_batches == 5


def test_statistics_of_a_model_in_bfloat16_count_all_batches():
    """bfloat16 counts to 256."""
    standardizer, batches = RunningStandardizer(3).train().bfloat16(), torch.randn(400, 2, 3).bfloat16() + 7
    for features in batches:
        standardizer(features)
    assert standardizer.num_batches == 400
    torch.testing.assert_close(standardizer.mean, batches.double().mean((0, 1)).float(), rtol=1e-5, atol=0)


def test_learns_one_batch_of_another_family_while_the_teacher_stays(teachers):
    model, images = build(teachers["clip"]), torch.randn(4, 3, 32, 32)
    before = {key: value.clone() for key, value in model.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        output = model(images)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert output.patch_cosine > 0.9
    assert output.image_kl < 0.01
    assert not model.teacher.training
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())


def test_the_whole_image_is_matched_by_class_token_or_mean_and_weighted(teachers):
    images = torch.randn(2, 3, 32, 32)
    model = build(teachers["ours"], {"use_class_token": False})
    means = model.image_head(model.backbone(images).last_hidden_state.mean(1)).double()
    expected = reference_divergence(means, list(model.teacher(images).pooler_output))
    assert model(images).image_kl.item() == pytest.approx(expected.item(), rel=1e-4)

    model = build(teachers["ours"], image_weight=0.0)
    output = model(images)
    assert not hasattr(model, "image_head")
    assert "image_cosine" not in output
    assert output.loss.item() == pytest.approx(1 - output.patch_cosine.item() + output.patch_smooth_l1.item())

    whole, half = build(teachers["ours"]), build(teachers["ours"], class_token_weight=0.5)  # as it was named
    output, parts = half(images), whole(images)
    assert parts.loss.item() - output.loss.item() == pytest.approx(parts.image_kl.item() / 2, rel=1e-4)


def test_the_queue_holds_the_newest_features_of_training():
    queue, features = FeatureQueue(5, 3).train(), torch.randn(13, 3)
    first = queue(features[:3])
    assert torch.equal(first, torch.cat([features[:3], torch.zeros(2, 3)]))
    assert torch.equal(queue(features[3:6]), features[[5, 1, 2, 3, 4]])
    assert torch.equal(first[:3], features[:3])  # what an earlier loss compared is as it was
    assert torch.equal(queue.eval()(features[:1]), features[[5, 1, 2, 3, 4]])
    assert set(map(tuple, queue.train()(features[6:]).tolist())) == set(map(tuple, features[8:].tolist()))


def test_fields_out_of_range_are_refused(teachers):
    for fields in ({"image_weight": -1.0}, {"queue_size": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} must be at least"):
            build(teachers["ours"], **fields)


@pytest.mark.parametrize("name", ["ours", "dinov2"])
def test_what_is_saved_loads_with_the_teacher_from_its_own_folder(teachers, name, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers[name], teacher)
    model, images = build(str(teacher)), torch.randn(2, 3, 32, 32)
    model(images)
    model.save_pretrained(tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").stat().st_size < 4 * 1.1 * sum(
        value.numel() for key, value in model.state_dict().items() if not key.startswith("teacher.")
    )
    loaded = DistillForPreTraining.from_pretrained(tmp_path / "student")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(loaded(images).loss, model.eval()(images).loss)
    assert not loaded.teacher.training
    assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())
    config = loaded.config.teacher_config
    assert (config.model_type, config.hidden_size) == (model.teacher.config.model_type, model.patch_head.out_features)

    teacher.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"There is no folder '.*teacher'.*give its location.*teacher=\.\.\."):
        DistillForPreTraining.from_pretrained(tmp_path / "student")
    moved, report = DistillForPreTraining.from_pretrained(
        tmp_path / "student", teacher=str(tmp_path / "moved"), output_loading_info=True
    )
    assert not report["missing_keys"]
    assert torch.equal(moved(images).loss, loaded(images).loss)


def test_teachers_that_cannot_be_used_are_refused(teachers, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nowhere/at-all' is neither a folder with a model nor one on the Hub"):
        build("nowhere/at-all")
    with pytest.raises(ValueError, match="there is no teacher"):
        build("")
    with pytest.raises(ValueError, match="images of 3 channels, and the encoder of 5"):
        build(teachers["dinov2"], {"num_channels": 5})
    with pytest.raises(ValueError, match="teacher_image_size 32 is not a multiple of the teacher's patch, 14 x 14"):
        build(teachers["dinov2"], teacher_image_size=32)

    plain = tmp_path / "plain"
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(plain)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json .* teacher_mean"):
        build(str(plain))
    assert build(str(plain), teacher_mean=[0.5] * 3, teacher_std=[0.5] * 3).teacher is not None

    config = Dinov2Config(**{**SMALL, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"lack .*layer\.2"):
        build(str(plain), teacher_config=config, teacher_mean=[0.5], teacher_std=[0.5])
    config = Dinov2Config(**{**SMALL, "hidden_size": 24})
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(str(plain), teacher_config=config, teacher_mean=[0.5], teacher_std=[0.5])


def test_an_encoder_that_masks_patches_at_random_is_refused(tmp_path):
    ViTMAEConfig().save_pretrained(tmp_path / "vit_mae")
    with pytest.raises(ValueError, match=r"masks patches at random.*hf-vlm convert"):
        build(str(tmp_path / "vit_mae"))


def test_code_of_a_teacher_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}'
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ValueError, match="Code that comes with a model is not run here"):
        build(str(tmp_path))
