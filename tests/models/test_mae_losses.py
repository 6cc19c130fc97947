"""MAE's losses of the painted image: values against slow references, who learns from what, what is saved."""

import shutil

import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model, ViTImageProcessorPil

from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
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
GAME = {"adversarial_weight": 0.3, "adversarial_start": 0.0, "discriminator_size": 8, "discriminator_layers": 2}


def build(**fields):
    torch.manual_seed(0)
    return MAEForPreTraining(MAEConfig(backbone_config=BACKBONE, decoder_config=DECODER, **fields)).train()


def shaken(model):
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
        shaken(model).save_pretrained(folders[name])
        processor = ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
        processor.save_pretrained(folders[name])
    return folders


def batch(num_images=2, dtype=torch.float32):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(num_images, 3, 32, 32, dtype=dtype), "noise": torch.rand(num_images, 16)}


def naive_painting(images, output, normalised):
    """Patch by patch; gradients reach the predictions."""
    painted = images.clone()
    for image, row in enumerate(output.masked_indices.tolist()):
        for place, patch in enumerate(row):
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            area = (image, slice(None), slice(top, top + 8), slice(left, left + 8))
            values = output.predictions[image, place]
            if normalised:
                truth = images[area].flatten()
                variance = ((truth - truth.mean()) ** 2).sum() / (len(truth) - 1)
                values = values * (variance + 1e-6).sqrt() + truth.mean()
            painted[area] = values.view(3, 8, 8)
    return painted


def naive_distance(features, others):
    """Mean over layers of the mean over images and positions of |f / |f| - g / |g||^2, one after the other."""
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
    model = shaken(build(perceptual_weight=0.7, norm_pix_loss=norm_pix_loss)).double()
    inputs = batch(dtype=torch.float64)
    output, teacher = model(**inputs), model.teacher["backbone"]

    def features(images):
        states, found = teacher._embed(images)[0], []
        for layer in teacher.layers:
            states = layer(states)
            found.append(states)
        return found

    painted = naive_painting(inputs["pixel_values"], output, norm_pix_loss)
    expected = naive_distance(features(painted), features(inputs["pixel_values"]))
    assert output.loss_perceptual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(output.loss_pixel.item() + 0.7 * expected.item(), rel=1e-5)
    plain = build(norm_pix_loss=norm_pix_loss).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert output.loss_pixel.item() == plain(**inputs).loss.item()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == len(list(plain.parameters()))
    for found, reference in zip(gradients(output.loss_perceptual, learned), gradients(expected, learned), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-7)


def test_perceptual_loss_of_another_encoder_equals_a_slow_reference(encoders):
    """It sees images in its own normalisation, at the nearest size that fits its patches, and the layers asked for."""
    model = shaken(build(perceptual_weight=1.0, perceptual_encoder=encoders["dinov2"], perceptual_layers=[0, 2]))
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

    painted = naive_painting(inputs["pixel_values"], output, normalised=True)
    expected = naive_distance(features(painted), features(inputs["pixel_values"]))
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


def test_layers_are_the_ends_of_quarters_or_those_asked_for(encoders):
    assert choose_layers(None, 12) == [3, 6, 9, 12]
    assert choose_layers(None, 6) == [2, 3, 4, 6]
    assert choose_layers(None, 1) == [1]
    assert build(perceptual_weight=1.0, perceptual_encoder=encoders["convnext"]).perceptual_layers == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"there is no layer 4; .* layers 1 to 3"):
        build(perceptual_weight=1.0, perceptual_encoder=encoders["dinov2"], perceptual_layers=[1, 4])


def naive_discriminator(model, image):
    """Scores of one image: each convolution as products of windows with the kernel, scaled as He's draws would be."""
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
    discriminator = shaken(PatchDiscriminator(2, width=3, num_layers=2)).double()
    real, painted = torch.randn(2, 2, 16, 16).double(), 3 * torch.randn(2, 2, 16, 16).double()
    assert discriminator(real).shape == (2, 1, 4, 4)
    of_painter, of_discriminator = adversarial_losses(discriminator, real, painted)
    scores = [torch.stack([naive_discriminator(discriminator, image) for image in kind]) for kind in (real, painted)]
    hinge = [
        max(0.0, 1 - score) + max(0.0, 1 + other) for score, other in zip(*(s.flatten().tolist() for s in scores))
    ]
    assert of_discriminator.item() == pytest.approx(sum(hinge) / len(hinge))
    assert of_painter.item() == pytest.approx(-scores[1].mean().item())


def test_the_discriminator_begins_with_scores_of_size_one_and_learns_slowly(tmp_path):
    """Whoever builds it: by itself, in a model, and where a checkpoint has none."""
    build().save_pretrained(tmp_path)
    game = build(adversarial_weight=0.1, discriminator_size=32)
    loaded = MAEForPreTraining.from_pretrained(tmp_path, adversarial_weight=0.1, discriminator_size=32)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    for discriminator in (PatchDiscriminator(3, 32, 3), game.discriminator, loaded.train().discriminator):
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


def test_each_player_learns_from_its_own_loss_alone():
    """One backward pass of the whole loss gives what two separate ones give, each of one loss for one player."""
    model, inputs = shaken(build(norm_pix_loss=False, **GAME)).double(), batch(dtype=torch.float64)
    output = model(**inputs)
    output.loss.backward()
    output = model(**inputs)
    painter = [*model.backbone.parameters(), *model.decoder.parameters()]
    judge = list(model.discriminator.parameters())
    assert all(g.count_nonzero() == 0 for g in gradients(output.loss_discriminator, painter))
    assert all(g.count_nonzero() == 0 for g in gradients(output.loss_adversarial, judge))
    of_painter = gradients(output.loss_pixel + 0.3 * output.loss_adversarial, painter)
    of_judge = gradients(output.loss_discriminator, judge)
    torch.testing.assert_close([p.grad for p in painter], of_painter)
    torch.testing.assert_close([p.grad for p in judge], of_judge)


def test_the_players_pull_in_opposite_directions():
    """By finite differences: the judge's step lowers its loss; the painter's raises the scores of what it paints."""
    model, inputs = shaken(build(**GAME)).double(), batch(dtype=torch.float64)

    def losses():
        with torch.no_grad():
            output = model(**inputs)
        return output.loss_adversarial.item(), output.loss_discriminator.item()

    output = model(**inputs)
    judge, painter = list(model.discriminator.parameters()), list(model.decoder.parameters())
    for players, loss, mine in ((judge, output.loss_discriminator, 1), (painter, output.loss_adversarial, 0)):
        directions, size = gradients(loss, players), 1e-3
        values = []
        for sign in (1, -2, 1):  # forth, back, and to where it was
            for parameter, direction in zip(players, directions):
                parameter.data.add_(direction, alpha=-sign * size)
            values.append(losses())
        slope = (values[0][mine] - values[1][mine]) / (2 * size)
        assert slope == pytest.approx(-sum(d.square().sum().item() for d in directions), rel=1e-2)
        if players is painter:  # what is good for it is bad for the judge
            assert values[0][1] > values[1][1]


def test_a_discriminator_learns_to_tell_and_a_painter_to_deceive():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, width=8, num_layers=2)
    real = torch.randn(4, 3, 16, 16)
    painted = torch.nn.Parameter(torch.zeros(4, 3, 16, 16))
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)  # of weights of deviation 1: slow
    losses = []
    for _ in range(60):
        losses.append(sum(adversarial_losses(discriminator, real, painted)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    told = adversarial_losses(discriminator, real, painted)
    assert told[1] < 0.2 < told[0]
    optimizer = torch.optim.AdamW([painted], lr=3e-2)
    for _ in range(100):
        adversarial_losses(discriminator, real, painted)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    deceived = adversarial_losses(discriminator, real, painted)
    assert deceived[0] < -1
    assert deceived[1] > 2


def test_the_game_begins_at_its_share_of_training():
    game, plain, inputs = build(**{**GAME, "adversarial_start": 0.5}), build(), batch()
    for progress, has_begun in ((0.0, False), (0.4, False), (0.5, True), (0.9, True)):
        game.after_step(progress)
        output = game(**inputs)
        expected = output.loss_pixel + has_begun * (0.3 * output.loss_adversarial + output.loss_discriminator)
        assert output.loss.item() == pytest.approx(expected.item())
        game.zero_grad()
        output.loss.backward()
        assert any(p.grad.any() for p in game.discriminator.parameters()) == has_begun
        if not has_begun:
            plain.zero_grad()
            plain(**inputs).loss.backward()
            grown = dict(game.named_parameters())
            assert all(torch.equal(p.grad, grown[name].grad) for name, p in plain.named_parameters())


def test_without_weights_it_is_plain_mae_bit_for_bit():
    plain, inputs = build(), batch()
    off = build(perceptual_weight=0.0, adversarial_weight=0, perceptual_encoder="nowhere/at-all")
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert "progress" not in dict(off.named_buffers())
    for model in (off, build(perceptual_weight=1.0, **GAME)):  # the same weights to begin with, and the same masks
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
        outputs = []
        for one in (plain, model):
            torch.manual_seed(3)
            outputs.append(one(inputs["pixel_values"]))
        pixel = outputs[1].loss if model is off else outputs[1].loss_pixel
        assert torch.equal(outputs[0].loss, pixel)
        assert torch.equal(outputs[0].predictions, outputs[1].predictions)
    assert outputs[0].keys() == off(**inputs).keys() == {"loss", "predictions", "masked_indices"}
    off.after_step(0.5)
    off.reset_teacher()
    plain(**inputs).loss.backward()
    off(**inputs).loss.backward()
    grown = dict(off.named_parameters())
    assert all(torch.equal(p.grad, grown[name].grad) for name, p in plain.named_parameters())


def test_the_own_encoder_follows_and_is_saved_with_the_game(tmp_path):
    model, inputs = shaken(build(perceptual_weight=1.0, momentum=0.9, **GAME)), batch()
    before = model.teacher["backbone"].norm.weight.clone()
    model.after_step(0.0)
    torch.testing.assert_close(model.teacher["backbone"].norm.weight, 0.9 * before + 0.1 * model.backbone.norm.weight)
    model.after_step(0.7)
    model.save_pretrained(tmp_path)
    loaded, report = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
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
    loaded = MAEForPreTraining.from_pretrained(tmp_path / "mae")
    assert torch.equal(loaded(**inputs).loss, model.eval()(**inputs).loss)
    assert not loaded.train().perceptual_encoder.training
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"encoder' is neither a folder.*perceptual_encoder=\.\.\. of"):
        MAEForPreTraining.from_pretrained(tmp_path / "mae")
    # The encoder that was pretrained needs none of it.
    assert torch.equal(VLMViTModel.from_pretrained(tmp_path / "mae").norm.weight, model.backbone.norm.weight)
    moved = MAEForPreTraining.from_pretrained(tmp_path / "mae", perceptual_encoder=str(tmp_path / "moved"))
    assert torch.equal(moved(**inputs).loss, loaded.eval()(**inputs).loss)


def test_learns_one_batch_under_all_losses_at_once():
    model, inputs = build(perceptual_weight=1.0, **{**GAME, "adversarial_weight": 0.01}), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    outputs = []
    for step in range(150):
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step / 150)
    assert outputs[-1].loss_pixel < 0.2 * outputs[0].loss_pixel
    assert outputs[-1].loss_perceptual < 0.2 * max(output.loss_perceptual for output in outputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"perceptual_weight": 1.0, "prediction_ratio": 0.5}, r"whole painted images.*prediction_ratio 1"),
        ({"adversarial_weight": 0.1, "prediction_ratio": 0.5}, r"whole painted images.*prediction_ratio 1"),
        ({"perceptual_weight": -1}, "perceptual_weight must not be negative"),
        ({"adversarial_weight": -0.1}, "adversarial_weight must not be negative"),
        ({"adversarial_start": 1.0}, "adversarial_start is a share"),
        ({"discriminator_layers": 0}, "discriminator_layers"),
    ],
)
def test_what_cannot_be_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
