"""`hf-vlm data` as a user types it."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image
from sample_data import write_coco

from hf_vlm.cli.main import main
from hf_vlm.training.recipe import load_recipe


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them twice, in a folder whose name a shell would cut; a file that is none."""
    source = tmp_path / "my images"
    source.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(source / f"{name}.png")
    (source / "d.png").write_bytes((source / "a.png").read_bytes())
    (source / "e.png").write_bytes(b"no image")
    return source


def commands_in(printed):
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  hf-vlm ")]


@pytest.fixture
def no_encoder_yet(monkeypatch):
    """The commands that are printed start from what the first one is to make: it is not looked for."""
    monkeypatch.setattr("hf_vlm.training.recipe.find_head", lambda source, model_class: None)


def test_what_is_there_is_printed_saved_and_drawn(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "reports" / "data.json"
    assert main(["data", str(folder), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "imagefolder, split train" in printed
    assert f"{folder / 'a.png'} = {folder / 'd.png'}" in printed
    assert f"{folder / 'e.png'}: not an image of a known format" in printed
    saved = json.loads(report.read_text())
    assert (saved["format"], saved["num_images"], saved["total_pixels"]) == ("imagefolder", 4, 4 * 30 * 40)
    assert saved["exact_duplicates"] == [[str(folder / "a.png"), str(folder / "d.png")]]
    assert "contact_sheet.png" in printed
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width == 4 * (320 + 12) + 12
    ((program, command, recipe, *words),) = commands_in(printed)  # without labels there is one
    assert (program, command) == ("hf-vlm", "pretrain")
    assert load_recipe(recipe, words)["data"] == str(folder)
    assert load_recipe(recipe, words)["max_bad_fraction"] == 0.4  # one of five cannot be read


@pytest.mark.usefixtures("no_encoder_yet")
def test_the_commands_for_boxes_parse_and_name_what_was_given(tmp_path, capsys):
    sheet = tmp_path / "pictures" / "scenes.jpg"
    words = ["scenes:easy", "--split", "test", "--format", "scenes", "--num_examples", "5", "--save", str(sheet)]
    assert main(["data", *words]) == 0
    printed = capsys.readouterr().out
    assert sheet.is_file()
    assert "5, the first of the data" in printed
    commands = commands_in(printed)
    assert [words[1] for words in commands] == ["pretrain", *["finetune"] * 4]  # boxes, masks, pixels, images
    for _, _, recipe, *overrides in commands:
        resolved = load_recipe(recipe, overrides)
        assert (resolved["data"], resolved["format"], resolved["train_split"]) == ("scenes:easy", "scenes", "test")
    assert resolved["encoder"] == load_recipe(commands[0][2], [])["output_dir"]


@pytest.mark.usefixtures("no_encoder_yet")
@pytest.mark.parametrize("has_validation", [False, True])
def test_commands_hold_images_out_where_there_is_no_split_for_it(has_validation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val")[: 1 + has_validation]:
        write_coco(tmp_path / "data" / split / "_annotations.coco.json", tmp_path / "data" / split, num_images=4)
    assert main(["data", "data"]) == 0
    for _, command, recipe, *overrides in commands_in(capsys.readouterr().out):
        expected = 0.1 if command == "finetune" and not has_validation else None
        assert load_recipe(recipe, overrides).get("holdout") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all does not exist"),
        (["scenes", "--split", "trian"], "trian"),
        (["scenes", "--format", "coko"], "unknown format 'coko'"),
        (["scenes", "--num_examples", "0"], "--num_examples 0: it must be above 0"),
        (["scenes", "--save", "sheet"], "--save sheet: name a picture"),
        (["scenes", "--save", "sheet.txt"], "--save sheet.txt: name a picture"),
        (["scenes", "--json", "."], "is a folder"),
        (["scenes", "--json", "file/report.json"], "cannot be written"),
    ],
)
def test_what_a_user_mistypes_is_said_in_a_line(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_json_holds_the_report_the_classes_and_the_first_examples(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for row in range(60):
        Image.new("RGB", (30 + row, 40), (row, 0, 0)).save(tmp_path / f"{row:02d}.png")
    box = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "categories": ["ant"]}
    rows = [
        {"file_name": f"{row:02d}.png", "label": "ab"[row % 2], "objects": box if row else {}} for row in range(59)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", str(tmp_path), "--format", "imagefolder", "--json", "data.json"]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "data.json").read_text())
    assert (saved["format"], saved["class_names"], saved["label_names"]) == ("imagefolder", ["ant"], ["a", "b"])
    assert saved["report"] in printed
    assert len(saved["examples"]) == 50
    expected = {"file": str(tmp_path / "00.png"), "width": 30, "height": 40, "label": 0, "boxes": [], "categories": []}
    assert saved["examples"][0] == expected
    expected = {"file": str(tmp_path / "01.png"), "width": 31, "height": 40, "label": 1}
    assert saved["examples"][1] == {**expected, "boxes": [[1, 2, 3, 4]], "categories": [0]}
    # What opening warns of is in the report too.
    assert [text for text in saved["findings"] if "1 images are left out" in text and "59.png" in text]
    assert "1 images are left out" in saved["report"]


def test_json_of_images_without_labels(folder, tmp_path):
    arguments = ["--save", str(tmp_path / "sheet.png"), "--json", str(tmp_path / "data.json")]
    assert main(["data", str(folder), *arguments]) == 0
    saved = json.loads((tmp_path / "data.json").read_text())
    assert saved["class_names"] is saved["label_names"] is None
    assert {(e["label"], e["boxes"], e["categories"]) for e in saved["examples"]} == {(None, None, None)}


def test_images_and_classes_of_other_splits_are_compared(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, names in {"train": ["x/a", "x/b", "y/c"], "val": ["x/a", "y/e"], "test": ["d"]}.items():
        for name in names:
            path = tmp_path / "data" / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / f"{path.stem}.png").read_bytes())
    assert main(["data", "data", "--json", "data.json"]) == 0
    printed = capsys.readouterr()
    assert "images that split 'validation' holds too, byte for byte" in printed.out
    issues = {issue["what"]: issue["where"] for issue in json.loads((tmp_path / "data.json").read_text())["issues"]}
    assert issues == {
        f"images that split {split!r} holds too, byte for byte": ["data/train/x/a.png"]
        for split in ("test", "validation")
    }
    assert "lie in no folder of a class" not in printed.err  # which is said of the test split when that is opened
