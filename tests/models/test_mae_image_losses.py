"""MAE's losses of the reconstructed image: values against slow references, gradients, what is saved."""

import shutil

import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model, ViTImageProcessorPil

from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_mae_image_losses import MAEImageLossesConfig, MAEImageLossesForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_adversarial import PatchDiscriminator, adversarial_losses
from hf_vlm.models.ssl_perceptual import choose_layers, features_of_layers, perceptual_distance

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "position_embedding_type": "sincos",
}
DECODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
DINOV2 = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ADVERSARIAL = {"adversarial_weight": 0.3, "adversarial_start": 0.0, "discriminator_size": 8, "discriminator_layers": 2}


def build(**fields):
    torch.manual_seed(0)
    config = MAEImageLossesConfig(backbone_config=BACKBONE, decoder_config=DECODER, **fields)
    return MAEImageLossesForPreTraining(config).train()


def build_plain(**fields):
    torch.manual_seed(0)
    return MAEForPreTraining(MAEConfig(backbone_config=BACKBONE, decoder_config=DECODER, **fields)).train()


def perturbed(model):
    """With larger weights: features of a fresh model hardly depend on the image."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of small random encoders of transformers: one of tokens, one of maps."""
    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**DINOV2)),
        "convnext": ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], image_size=32)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        perturbed(model).save_pretrained(folders[name])
        processor = ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
        processor.save_pretrained(folders[name])
    return folders


def batch(num_images=2, dtype=torch.float32):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(num_images, 3, 32, 32, dtype=dtype), "noise": torch.rand(num_images, 16)}


def naive_reconstruction(images, output, normalised):
    """Patch by patch; gradients reach the predictions."""
    reconstructed = images.clone()
    for image, row in enumerate(output.masked_indices.tolist()):
        for position, patch in enumerate(row):
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            area = (image, slice(None), slice(top, top + 8), slice(left, left + 8))
            values = output.predictions[image, position]
            if normalised:
                truth = images[area].flatten()
                variance = ((truth - truth.mean()) ** 2).sum() / (len(truth) - 1)
                values = values * (variance + 1e-6).sqrt() + truth.mean()
            reconstructed[area] = values.view(3, 8, 8)
    return reconstructed


def naive_distance(features, others):
    """Mean over layers of the mean over images and positions of |f / |f| - g / |g||^2, one by one."""
    total = 0.0
    for one, other in zip(features, others, strict=True):
        of_layer = [
            ((a / a.norm() - b / b.norm()) ** 2).sum()
            for a, b in zip(one.flatten(0, 1), other.flatten(0, 1), strict=True)
        ]
        total = total + sum(of_layer) / len(of_layer)
    return total / len(features)


def gradients(loss, parameters):
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in zip(parameters, found)
    ]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_perceptual_loss_of_the_own_encoder_equals_a_slow_reference(norm_pix_loss):
    model = perturbed(build(perceptual_weight=0.7, norm_pix_loss=norm_pix_loss)).double()
    inputs = batch(dtype=torch.float64)
    output, teacher = model(**inputs), model.teacher["backbone"]

    def features(images):
        states, found = teacher.embed(images)[0], []
        for layer in teacher.layers:
            states = layer(states)
            found.append(states)
        return found

    reconstructed = naive_reconstruction(inputs["pixel_values"], output, norm_pix_loss)
    expected = naive_distance(features(reconstructed), features(inputs["pixel_values"]))
    assert output.loss_perceptual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(output.loss_pixel.item() + 0.7 * expected.item(), rel=1e-5)
    plain = build_plain(norm_pix_loss=norm_pix_loss).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert output.loss_pixel.item() == plain(**inputs).loss.item()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == len(list(plain.parameters()))
    for found, reference in zip(gradients(output.loss_perceptual, learned), gradients(expected, learned), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-7)


def test_perceptual_loss_of_another_encoder_equals_a_slow_reference(encoders):
    """It is given images in its own normalisation, at the nearest size that fits its patches."""
    model = perturbed(build(perceptual_weight=1.0, perceptual_encoder=encoders["dinov2"], perceptual_layers=[0, 2]))
    model.load_frozen()
    model.double()
    inputs = batch(dtype=torch.float64)
    output = model(**inputs)
    encoder = Dinov2Model.from_pretrained(encoders["dinov2"]).double().eval()

    def features(images):
        ours, theirs = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        (mean, std), (new_mean, new_std) = ([torch.tensor(v).view(3, 1, 1) for v in pair] for pair in (ours, theirs))
        pixels = (images * std + mean - new_mean) / new_std
        pixels = torch.nn.functional.interpolate(pixels, (28, 28), mode="bilinear", antialias=True).double()
        states = encoder(pixels, output_hidden_states=True).hidden_states
        return states[0], states[2]

    reconstructed = naive_reconstruction(inputs["pixel_values"], output, normalised=True)
    expected = naive_distance(features(reconstructed), features(inputs["pixel_values"]))
    assert output.loss_perceptual.item() == pytest.approx(expected.item(), rel=1e-4)
    decoder = list(model.decoder.parameters())
    for found, reference in zip(gradients(output.loss_perceptual, decoder), gradients(expected, decoder), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.perceptual_encoder.parameters())
    assert not model.perceptual_encoder.training


def test_features_are_of_maps_and_of_tokens(encoders):
    images = torch.randn(2, 3, 32, 32)
    network = ConvNextModel.from_pretrained(encoders["convnext"]).eval()
    early, late = features_of_layers(network, images, [1, 3])
    states = network(images, output_hidden_states=True).hidden_states
    assert torch.equal(early[1, 8 * 2 + 5], states[1][1, :, 2, 5])  # row 2, column 5 of 8 x 8
    assert torch.equal(late[0, 2], states[3][0, :, 1, 0])  # of 2 x 2
    one, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    assert perceptual_distance([one], [7 * one]).item() == pytest.approx(0, abs=1e-6)  # lengths do not count
    assert perceptual_distance([one], [-one]).item() == pytest.approx(4)
    found = perceptual_distance([one, early], [other, early + 1])
    expected = naive_distance([one.double(), early.double()], [other.double(), early.double() + 1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_are_the_ends_of_quarters_or_those_given(encoders):
    assert choose_layers(None, 12) == [3, 6, 9, 12]
    assert choose_layers(None, 6) == [2, 3, 4, 6]
    assert choose_layers(None, 1) == [1]
    assert build(perceptual_weight=1.0, perceptual_encoder=encoders["convnext"]).perceptual_layers == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"there is no layer 4; .* layers 1 to 3"):
        build(perceptual_weight=1.0, perceptual_encoder=encoders["dinov2"], perceptual_layers=[1, 4])


def naive_discriminator(model, image):
    """Scores of one image: each convolution as products of windows with the kernel, scaled by He's deviation."""
    values = image
    for layer, (kernel, stride) in zip([*model.layers, model.judge], [(4, 2)] * len(model.layers) + [(3, 1)]):
        gain = 1 if layer is model.judge else (2 / (1 + 0.2**2)) ** 0.5
        weights = layer.weight * gain / (kernel * kernel * len(values)) ** 0.5
        padded = torch.nn.functional.pad(values, (1, 1, 1, 1))
        rows = (padded.shape[1] - kernel) // stride + 1
        values = torch.stack(
            [
                torch.stack(
                    [
                        (padded[:, r * stride : r * stride + kernel, c * stride : c * stride + kernel] * weight).sum()
                        + bias
                        for r in range(rows)
                        for c in range(rows)
                    ]
                ).view(rows, rows)
                for weight, bias in zip(weights, layer.bias)
            ]
        )
        if layer is not model.judge:
            values = torch.where(values > 0, values, 0.2 * values)
    return values


def test_adversarial_losses_equal_a_slow_reference():
    torch.manual_seed(0)
    discriminator = perturbed(PatchDiscriminator(2, width=3, num_layers=2)).double()
    real, reconstructed = torch.randn(2, 2, 16, 16).double(), 3 * torch.randn(2, 2, 16, 16).double()
    assert discriminator(real).shape == (2, 1, 4, 4)
    of_generator, of_discriminator = adversarial_losses(discriminator, real, reconstructed)
    scores = [
        torch.stack([naive_discriminator(discriminator, image) for image in images])
        for images in (real, reconstructed)
    ]
    hinge = [
        max(0.0, 1 - score) + max(0.0, 1 + other) for score, other in zip(*(s.flatten().tolist() for s in scores))
    ]
    assert of_discriminator.item() == pytest.approx(sum(hinge) / len(hinge))
    assert of_generator.item() == pytest.approx(-scores[1].mean().item())


def test_the_discriminator_starts_with_scores_of_size_one_and_learns_slowly(tmp_path):
    """By itself, in a model, and where a checkpoint has none."""
    build_plain().save_pretrained(tmp_path)
    model = build(adversarial_weight=0.1, discriminator_size=32)
    loaded = MAEImageLossesForPreTraining.from_pretrained(tmp_path, adversarial_weight=0.1, discriminator_size=32)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    for discriminator in (PatchDiscriminator(3, 32, 3), model.discriminator, loaded.train().discriminator):
        for layer in (*discriminator.layers, discriminator.judge):
            assert layer.weight.std().item() == pytest.approx(1, abs=0.05)
            assert not layer.bias.any()
        scores = discriminator(images)
        assert 0.5 < scores.square().mean().sqrt() < 2
        optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
        scores.mean().backward()
        before = discriminator.layers[1].weight.detach().clone()
        optimizer.step()
        assert (discriminator.layers[1].weight - before).norm() < 2e-3 * before.norm()


def test_decoder_and_discriminator_learn_from_their_own_loss_alone():
    """One backward pass of the whole loss gives what two separate ones give."""
    model, inputs = perturbed(build(norm_pix_loss=False, **ADVERSARIAL)).double(), batch(dtype=torch.float64)
    output = model(**inputs)
    output.loss.backward()
    output = model(**inputs)
    generator = [*model.backbone.parameters(), *model.decoder.parameters()]
    discriminator = list(model.discriminator.parameters())
    assert all(g.count_nonzero() == 0 for g in gradients(output.loss_discriminator, generator))
    assert all(g.count_nonzero() == 0 for g in gradients(output.loss_adversarial, discriminator))
    of_generator = gradients(output.loss_pixel + 0.3 * output.loss_adversarial, generator)
    of_discriminator = gradients(output.loss_discriminator, discriminator)
    torch.testing.assert_close([p.grad for p in generator], of_generator)
    torch.testing.assert_close([p.grad for p in discriminator], of_discriminator)


def test_decoder_and_discriminator_have_opposite_aims():
    """By finite differences: a step of the discriminator lowers its loss; one of the decoder raises its scores."""
    model, inputs = perturbed(build(**ADVERSARIAL)).double(), batch(dtype=torch.float64)

    def losses():
        with torch.no_grad():
            output = model(**inputs)
        return output.loss_adversarial.item(), output.loss_discriminator.item()

    output = model(**inputs)
    discriminator, decoder = list(model.discriminator.parameters()), list(model.decoder.parameters())
    for part, loss, own in ((discriminator, output.loss_discriminator, 1), (decoder, output.loss_adversarial, 0)):
        directions, size = gradients(loss, part), 1e-3
        values = []
        for sign in (1, -2, 1):  # forth, back, and to where it was
            for parameter, direction in zip(part, directions):
                parameter.data.add_(direction, alpha=-sign * size)
            values.append(losses())
        slope = (values[0][own] - values[1][own]) / (2 * size)
        assert slope == pytest.approx(-sum(d.square().sum().item() for d in directions), rel=1e-2)
        if part is decoder:  # what lowers its loss raises the discriminator's
            assert values[0][1] > values[1][1]


def test_a_discriminator_learns_to_distinguish_and_a_generator_to_deceive():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, width=8, num_layers=2)
    real = torch.randn(4, 3, 16, 16)
    generated = torch.nn.Parameter(torch.zeros(4, 3, 16, 16))
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)  # of weights of deviation 1: slow
    losses = []
    for _ in range(60):
        losses.append(sum(adversarial_losses(discriminator, real, generated)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    distinguished = adversarial_losses(discriminator, real, generated)
    assert distinguished[1] < 0.2 < distinguished[0]
    optimizer = torch.optim.AdamW([generated], lr=3e-2)
    for _ in range(100):
        adversarial_losses(discriminator, real, generated)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    deceived = adversarial_losses(discriminator, real, generated)
    assert deceived[0] < -1
    assert deceived[1] > 2


def test_adversarial_losses_start_at_their_fraction_of_training():
    model, plain, inputs = build(**{**ADVERSARIAL, "adversarial_start": 0.5}), build_plain(), batch()
    for progress, has_started in ((0.0, False), (0.4, False), (0.5, True), (0.9, True)):
        model.after_step(progress)
        output = model(**inputs)
        expected = output.loss_pixel + has_started * 0.3 * output.loss_adversarial + output.loss_discriminator
        assert output.loss.item() == pytest.approx(expected.item())
        model.zero_grad()
        output.loss.backward()
        assert all(p.grad.any() for p in model.discriminator.parameters())  # it waits by its learning rate
        if not has_started:
            plain.zero_grad()
            plain(**inputs).loss.backward()
            found = dict(model.named_parameters())
            assert all(torch.equal(p.grad, found[name].grad) for name, p in plain.named_parameters())


def test_weights_and_pixel_loss_are_plain_maes_bit_for_bit():
    plain, model, inputs = build_plain(), build(perceptual_weight=1.0, **ADVERSARIAL), batch()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    outputs = []
    for one in (plain, model):
        torch.manual_seed(3)  # the same masks
        outputs.append(one(inputs["pixel_values"]))
    assert torch.equal(outputs[0].loss, outputs[1].loss_pixel)
    assert torch.equal(outputs[0].predictions, outputs[1].predictions)
    assert outputs[0].keys() == {"loss", "predictions", "masked_indices"}


def test_without_weights_it_is_refused():
    with pytest.raises(ValueError, match="set perceptual_weight or adversarial_weight"):
        build(perceptual_weight=0.0, adversarial_weight=0, perceptual_encoder="nowhere/at-all")


def test_the_discriminator_does_not_decay():
    model = build(perceptual_weight=1.0, **ADVERSARIAL)
    names = {name for name, _ in model.named_parameters()}
    of_discriminator = {name for name in names if name.startswith("discriminator.")}
    assert of_discriminator < model.no_weight_decay() < names
    tokens = model.no_weight_decay() - of_discriminator
    assert {"backbone.embeddings.class_token", "decoder.mask_token"} <= tokens
    assert tokens == {name for name in names if name.endswith("_token")}


def test_weights_of_others_are_named():
    assert MAEImageLossesConfig(perceptual_weight=1.0).external_weights() == []
    assert MAEImageLossesConfig(perceptual_encoder="org/encoder").external_weights() == []
    statistics = {"perceptual_encoder_mean": [0.5], "perceptual_encoder_std": [0.5]}
    config = MAEImageLossesConfig(
        perceptual_weight=1.0,
        perceptual_encoder="org/encoder",
        perceptual_encoder_config=VLMViTModel.config_class().to_dict(),
        **statistics,
    )
    assert config.external_weights() == ["org/encoder"]


def test_a_checkpoint_that_plain_mae_saved_with_such_losses_is_loaded(tmp_path):
    """Before they were a method of their own, the model type was that of plain MAE."""
    model, inputs = perturbed(build(perceptual_weight=1.0, **ADVERSARIAL)).eval(), batch()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"vlm_mae_image_losses"', '"vlm_mae"'))
    loaded, report = MAEImageLossesForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(**inputs).loss, model(**inputs).loss)


def test_the_own_encoder_follows_and_is_saved(tmp_path):
    model, inputs = perturbed(build(perceptual_weight=1.0, momentum=0.9, **ADVERSARIAL)), batch()
    before = model.teacher["backbone"].norm.weight.clone()
    model.after_step(0.0)
    torch.testing.assert_close(model.teacher["backbone"].norm.weight, 0.9 * before + 0.1 * model.backbone.norm.weight)
    model.after_step(0.7)
    model.save_pretrained(tmp_path)
    loaded, report = MAEImageLossesForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.progress == model.progress == pytest.approx(0.7)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    found, expected = loaded.eval()(**inputs), model.eval()(**inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.trained_encoder is loaded.backbone


@pytest.mark.parametrize("name", ["dinov2", "convnext"])
def test_another_encoder_is_loaded_from_its_own_folder(encoders, name, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoders[name], folder)
    model, inputs = build(perceptual_weight=1.0, perceptual_encoder=str(folder)), batch()
    model.save_pretrained(tmp_path / "mae")
    own = sum(value.numel() for key, value in model.state_dict().items() if not key.startswith("perceptual_encoder."))
    assert (tmp_path / "mae" / "model.safetensors").stat().st_size < 4 * own + 20_000
    loaded = MAEImageLossesForPreTraining.from_pretrained(tmp_path / "mae")
    assert torch.equal(loaded(**inputs).loss, model.eval()(**inputs).loss)
    assert not loaded.train().perceptual_encoder.training
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"There is no folder '.*encoder'.*perceptual_encoder=\.\.\. of"):
        MAEImageLossesForPreTraining.from_pretrained(tmp_path / "mae")
    # The encoder that was pretrained needs none of it.
    assert torch.equal(VLMViTModel.from_pretrained(tmp_path / "mae").norm.weight, model.backbone.norm.weight)
    moved = MAEImageLossesForPreTraining.from_pretrained(tmp_path / "mae", perceptual_encoder=str(tmp_path / "moved"))
    assert torch.equal(moved(**inputs).loss, loaded.eval()(**inputs).loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"perceptual_weight": 1.0, "prediction_ratio": 0.5}, r"whole reconstructed images.*prediction_ratio 1"),
        ({"adversarial_weight": 0.1, "prediction_ratio": 0.5}, r"whole reconstructed images.*prediction_ratio 1"),
        ({"perceptual_weight": -1}, "perceptual_weight must be at least 0"),
        ({"adversarial_weight": -0.1}, "adversarial_weight must be at least 0"),
        ({"adversarial_start": 1.0}, "adversarial_start is a fraction"),
        ({"discriminator_layers": 0}, "discriminator_layers"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
