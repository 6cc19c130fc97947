"""Models of others: their weights are read, their code is never run, and nobody is asked whether it should be."""

import json

import pytest
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.deploy.model_card import write_model_card


@pytest.fixture
def hostile_run(detector_run, monkeypatch):
    """A run whose configurations name code that fails the test when it is run."""
    (detector_run / "evil.py").write_text("raise AssertionError('this code was run')")
    for file in ("config.json", "preprocessor_config.json"):
        content = json.loads((detector_run / file).read_text())
        names = {*content.get("auto_map", {}), "AutoConfig", "AutoModelForObjectDetection", "AutoImageProcessor"}
        content["auto_map"] = dict.fromkeys(names, "evil.Evil")
        (detector_run / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.get_class_from_dynamic_module", lambda *_, **__: pytest.fail("code was run")
    )
    Image.new("RGB", (40, 30)).save(detector_run / "a.png")
    return detector_run


def change(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | values))


def test_code_beside_the_weights_is_not_run(hostile_run, tmp_path, capsys):
    assert main(["predict", str(hostile_run), str(hostile_run / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 40
    words = ["--data", str(hostile_run), "--save", str(tmp_path / "features.parquet")]
    assert main(["embed", str(hostile_run), *words]) == 0
    write_model_card(hostile_run)


def test_a_model_of_another_type_is_refused_without_a_question(hostile_run, capsys):
    change(hostile_run, model_type="evil", backbone_config={"model_type": "evil"})
    assert main(["predict", str(hostile_run), str(hostile_run / "a.png")]) == 2
    assert "holds no model of hf_vlm, but one of type 'evil'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"contains custom code|does not recognize"):
        write_model_card(hostile_run)


@pytest.mark.parametrize("is_nested", [True, False])
def test_kernels_on_the_hub_are_not_run(hostile_run, capsys, is_nested):
    named = {"_attn_implementation": "evil/kernels@main"}
    config = json.loads((hostile_run / "config.json").read_text())
    change(hostile_run, **({"backbone_config": config["backbone_config"] | named} if is_nested else named))
    for command in (["predict", str(hostile_run), str(hostile_run / "a.png")], ["embed", str(hostile_run)]):
        assert main([*command, *(["--data", str(hostile_run)] if command[0] == "embed" else [])]) == 2
        assert "names code on the Hub in its configuration, evil/kernels@main" in capsys.readouterr().err
