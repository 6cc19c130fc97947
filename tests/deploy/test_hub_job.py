"""A run on a machine of the Hub: what is sent there runs, and no token is shown."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from huggingface_hub import HfApi

from hf_vlm.cli.main import main
from hf_vlm.deploy import hub_job
from hf_vlm.deploy.hub_job import plan_job, submit_job
from hf_vlm.training.recipe import load_recipe

TOKEN = "hf_" + "a" * 30
PUSHED = ["--push_to_hub", "true", "--hub_model_id", "my-org/encoder"]


def recipe(*overrides):
    return load_recipe("mae/vit_small.yaml", ["--data", "my-org/images", *PUSHED, *overrides])


def test_the_job_runs_the_recipe_with_the_package_as_it_is_here(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_job, "get_token", lambda: TOKEN)
    sent = {}

    def run_job(script, **options):
        sent.update(options, script=script)
        archive = Path(options["script_args"][-1])
        shutil.copy(archive, tmp_path / "sent.zip")
        api, files = HfApi(), []
        monkeypatch.setattr(api, "_upload_scripts_to_bucket", lambda **found: files.append(found) or [])
        names = ("script_args", "dependencies", "secrets")
        built = {name: options[name] for name in names}
        sent["command"], *_ = api._create_uv_command_env_and_secrets(
            script=script, **built, env=None, python=None, namespace="me", token=None
        )
        assert files[0]["remote_to_local_file_names"] == {archive.name: str(archive)}
        return SimpleNamespace(url="https://huggingface.co/jobs/me/1")

    job = plan_job(recipe("--images_to_see", "1e6"), "hub:h200x8", "12h")
    assert submit_job(job, run_job) == "https://huggingface.co/jobs/me/1"
    assert (sent["flavor"], sent["timeout"], sent["secrets"]) == ("h200x8", "12h", {"HF_TOKEN": TOKEN})
    assert any(line.startswith("torch>=") for line in sent["dependencies"])
    assert not any("pytest" in line for line in sent["dependencies"])

    # The command of the container, with its mounted archive here and the launcher recording its words.
    command = sent["command"][sent["command"].index("bash") :]
    command[-1] = str(tmp_path / "sent.zip")
    work, programs = tmp_path / "work", tmp_path / "bin"
    for folder in (work, programs):
        folder.mkdir()
    (programs / "accelerate").write_text('#!/bin/bash\nprintf "%s\\n" "$PYTHONPATH" "$@" > words\n')
    (programs / "accelerate").chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=work, env=os.environ | path, check=True)
    python_path, _, *words = (work / "words").read_text().splitlines()
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.multi_gpu, args.num_processes, args.mixed_precision) == (True, 8, "bf16")
    assert args.training_script_args == ["pretrain", "recipe.yaml"]
    assert Path(python_path) == work
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        assert load_recipe(work / "recipe.yaml") == job.recipe == yaml.safe_load(archive.read("recipe.yaml"))
        assert {"hf_vlm/cli/__main__.py", "hf_vlm/recipes/mae/vit_small.yaml"} < set(archive.namelist())
        assert not any(TOKEN.encode() in archive.read(name) for name in archive.namelist())


def test_by_default_it_is_only_printed(monkeypatch, capsys):
    monkeypatch.setattr(hub_job, "get_token", lambda: TOKEN)
    monkeypatch.setattr(hub_job, "run_uv_job", None)
    words = ["pretrain", "mae/vit_small.yaml", "--data", "my-org/images", *PUSHED, "--on", "hub:a10g-small"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "accelerate launch --num_processes 1 --mixed_precision bf16" in printed.out
    assert "data: my-org/images" in printed.out
    assert "Nothing is started" in printed.out
    assert TOKEN not in printed.out + printed.err


@pytest.mark.parametrize(
    ("flavor", "words"),
    [
        ("cpu-basic", "--cpu --num_processes 1 --mixed_precision no"),
        ("a10g-largex2", "--multi_gpu --num_processes 2 --mixed_precision bf16"),
        ("rtx-pro-6000", "launch --num_processes 1 --mixed_precision bf16"),
    ],
)
def test_the_launcher_takes_the_machine_as_it_is(flavor, words):
    assert words in plan_job(recipe(), f"hub:{flavor}", "1h").script


def test_what_cannot_run_there_is_refused(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    refused = [
        (recipe(), "hub:h200x9", "Did you mean hub:h200"),
        (recipe(), "aws:p5", "there is no such machine"),
        (recipe("--data", str(tmp_path / "images")), "hub:h200", "data: a machine of the Hub cannot read"),
        (recipe("--data", "{my-org/images: 0.5, ./more: 0.5}"), "hub:h200", r"data: .* cannot read \./more"),
        (recipe("--probe_data", "./labelled"), "hub:h200", "probe_data: a machine of the Hub cannot read"),
        (recipe("--push_to_hub", "false"), "hub:h200", "The disk of a job goes with it"),
        (recipe("--hub_token", TOKEN), "hub:h200", "leave it out of the recipe"),
    ]
    for given, machine, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            plan_job(given, machine, "1h")
        assert TOKEN not in str(error.value)
    monkeypatch.setattr(hub_job, "get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        submit_job(plan_job(recipe("--data", "scenes:hard"), "hub:h200", "1h"), None)
    monkeypatch.setattr(hub_job, "get_token", lambda: TOKEN)
    with pytest.raises(ValueError, match=r"recipe\.yaml holds what looks like a Hugging Face token"):
        submit_job(plan_job(recipe("--run_name", TOKEN), "hub:h200", "1h"), None)
