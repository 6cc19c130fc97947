"""Commands as a user types them."""

import json
import logging
import shlex
import subprocess
import sys

import pytest
from full_disk import no_file_above
from PIL import Image
from safetensors.torch import load_file
from sample_data import write_images

import hf_vlm
from hf_vlm.cli.main import COMMANDS, main
from hf_vlm.training.callbacks import read_log

ENCODER = ["--encoder_config", "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8}"]
SHORT = [
    *ENCODER,
    *("--image_size", "32", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
    *("--save_strategy", "no", "--logging_steps", "1", "--dataloader_num_workers", "0", "--data", "scenes:easy"),
    *("--num_probe_examples", "16", "--shuffle_block", "16"),
]
HEAD = [
    "--model_config",
    "{hidden_size: 32, intermediate_size: 32, num_decoder_layers: 1, num_queries: 5, neck_num_blocks: 1, "
    "num_self_attention_heads: 4, num_cross_attention_heads: 4}",
]


def test_the_whole_way(tmp_path, capsys):
    encoder, detector, picture = (str(tmp_path / name) for name in ("encoder", "detector", "scene.png"))
    decoder = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    assert (
        main(
            [
                "pretrain",
                "mae/vit_small.yaml",
                *SHORT,
                "--output_dir",
                encoder,
                "--model_config.decoder_config",
                decoder,
            ]
        )
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: hf-vlm finetune"))
    words = shlex.split(line.removeprefix("Next: hf-vlm ").replace("YOUR_LABELLED_IMAGES", "scenes:easy"))
    assert words[:2] == ["finetune", "detection/vit_nano_cpu.yaml"]
    words += [*SHORT[len(ENCODER) :], *HEAD, "--output_dir", detector]
    assert main([*words, "--num_train_examples", "8", "--num_eval_examples", "4"]) == 0
    assert "AP50" in capsys.readouterr().out

    figures = tmp_path / "figures.json"
    words = ["evaluate", detector, "--data", "scenes:easy", "--split", "test", "--num_examples", "4"]
    assert main([*words, "--save", str(figures)]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "scenes:easy, split test: 4 images"
    printed = dict(line.split(maxsplit=1) for line in lines)
    saved = json.loads(figures.read_text())
    assert float(printed["ap50"]) == pytest.approx(saved["ap50"], abs=1e-4)
    assert saved["ap_large"] is None
    assert printed["ap_large"].split(maxsplit=1) == ["-", "no large objects in this split"]

    Image.new("RGB", (80, 60), "grey").save(picture)
    out = tmp_path / "out.png"
    assert main(["predict", detector, picture, "--threshold", "0", "--save", str(out)]) == 0
    prediction = json.loads(capsys.readouterr().out)
    assert (prediction["height"], prediction["width"]) == (60, 80)
    assert len(prediction["detections"]) > 0
    with Image.open(out) as drawn:
        assert drawn.size[0] >= 80
    check_many_images(detector, tmp_path / "many", capsys)


def check_many_images(detector, folder, capsys):
    for name in ("a/1.png", "a/1.jpg", "b/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)
    drawn = folder.with_name("drawn")
    words = ["predict", detector, str(folder)]
    assert main([*words, "--save", str(drawn / "all.png")]) == 2
    assert "name a folder, for there are 3 images" in capsys.readouterr().err
    assert main([*words, "--save", str(drawn)]) == 0
    pictures = sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*.png"))
    assert pictures == ["a/1.jpg.png", "a/1.png.png", "b/1.png"]
    capsys.readouterr()
    (folder / "broken.png").write_bytes(b"no image")
    assert main(words) == 2
    printed = capsys.readouterr()
    assert [json.loads(line)["path"][-7:] for line in printed.out.splitlines()] == ["a/1.jpg", "a/1.png", "b/1.png"]
    assert "1 of 4 images could not be read" in printed.err
    assert printed.err.count("broken.png") == 1
    assert main(["predict", detector, str(folder / "b" / "1.png"), "--save", str(drawn / "out.xyz")]) == 2
    assert "name a picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretain"], "no command 'pretain'"),
        (["pretrain", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["pretrain", "mae/vit_small.yaml", "--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["pretrain", "mae/vit_small.yaml", "--data", "no/such/folder", "--use_cpu", "true"], "no/such/folder"),
        (["pretrain", "mae/vit_small.yaml", "--max_stps", "5"], "Unknown key 'max_stps' in the command line; did you"),
        (["plan", "mae/vit_small.yaml", "--gpus", "0"], "--gpus 0: it must be above 0"),
        (["plan", "mae/vit_small.yaml", "--mfu", "1.5"], "--mfu 1.5: it must be above 0, and at most 1"),
        (["plan", "mae/vit_small.yaml", "--network", "nan"], "--network nan: it must be above 0"),
        (["evaluate", "no/such/run", "--data", "scenes"], "no/such/run"),
        (["predict", "no/such/run", "x.jpg"], "no images at 'x.jpg'"),
        (["predict", "no/such/run", __file__], "no/such/run"),
        (["push", "no/such/run", "me/model"], "no/such/run"),
    ],
)
def test_what_a_user_mistypes_is_said_in_a_line_without_a_traceback(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_names_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """torchrun and accelerate with two gloo processes give the weights of one process on the joined batch."""
    common = [
        *("pretrain", "simclr/vit_small.yaml", *SHORT, "--max_steps", "4", "--learning_rate", "1e-3"),
        *("--num_train_examples", "25", "--shuffle_block", "16", "--optim", "sgd", "--ema_decay", "0.5"),
        *("--model_config", "{projection_hidden_size: 32, projection_size: 16}"),
    ]
    ours = ["-m", "hf_vlm.cli"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611", *ours]
    accelerate = [
        *("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", "2"),
        *("--mixed_precision", "no", "--main_process_port", "29612", *ours),
    ]
    found, logged = {}, {}
    launches = (("one", ours, "8"), ("torchrun", torchrun, "4"), ("accelerate", accelerate, "4"), ("start", ours, "8"))
    for name, launcher, batch in launches:
        folder = tmp_path / name
        words = [*launcher, *common, "--per_device_train_batch_size", batch, "--output_dir", str(folder)]
        words += ["--learning_rate", "0.0"] if name == "start" else []  # the weights before any step
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("The encoder is in") == 1
        found[name] = load_file(folder / "model.safetensors")
        logged[name] = [entry for entry in read_log(folder / "log.jsonl") if "loss" in entry]  # of steps, not probes
    assert logged["one"]
    for name in ("torchrun", "accelerate"):
        for entry, expected in zip(logged[name], logged["one"], strict=True):
            assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert entry["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-4)
        for key, expected in found["one"].items():
            moved = (expected - found["start"][key]).norm()
            assert moved > 0, key
            assert (found[name][key] - expected).norm() < 0.001 * moved + 1e-6, (name, key)


def test_outputs_that_cannot_be_written_end_in_a_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    decoder = ["--model_config.decoder_config", "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"]
    words = ["pretrain", "mae/vit_small.yaml", *SHORT, *decoder, "--output_dir", str(tmp_path / "file")]
    assert main(words) == 2
    assert f"hf-vlm pretrain: The run could not be written to {tmp_path}/file: File exists" in capsys.readouterr().err
    with no_file_above(100):
        assert main(["data", "scenes:easy", "--num_examples", "2", "--save", str(tmp_path / "sheet.png")]) == 2
    assert capsys.readouterr().err.endswith("data: File too large; free space there, or write elsewhere.\n")


@pytest.fixture
def log_as_commands(monkeypatch):
    """A function after which the next command sets up its log, as in a process of its own."""
    level = logging.root.level
    yield lambda: monkeypatch.setattr(logging.root, "handlers", [])
    logging.root.setLevel(level)


def test_what_is_found_in_data_is_shown_once_by_commands_that_open_two_splits(tmp_path, capsys, log_as_commands):
    for split in ("train", "val"):
        write_images(tmp_path / "data", [f"{split}/{row % 2}/{row}.png" for row in range(8)])
    write_images(tmp_path / "data", ["cover.png"])
    words = [*SHORT[:-6], "--data", str(tmp_path / "data"), "--shuffle_block", "8", "--num_probe_examples", "8"]
    encoder, labels = str(tmp_path / "encoder"), ["--data", str(tmp_path / "data"), "--split", "validation"]
    for command in (
        ["pretrain", "lejepa/vit_nano_cpu.yaml", *words, "--output_dir", encoder],
        ["finetune", *words[len(ENCODER) :], "--encoder", encoder, "--output_dir", str(tmp_path / "classifier")],
        ["evaluate", encoder, *labels],
    ):
        log_as_commands()
        assert main(command) == 0
        assert capsys.readouterr().err.count("images in cover.png are ignored") == 1


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_vlm {hf_vlm.__version__}\n"


def test_a_mistyped_command_names_the_nearest(capsys):
    assert main(["predic"]) == 2
    assert "did you mean 'predict'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "offered"),
    [(["data", "x", "--splitt", "test"], "--split"), (["export", "x", "--formt=onnx"], "--format")],
)
def test_a_mistyped_option_names_the_nearest(words, offered, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"did you mean '{offered}'?" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_a_command_in_silence():
    command = f"{sys.executable} -m hf_vlm.cli evaluate --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
