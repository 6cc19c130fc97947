"""A run of pretraining as a job on machines of the Hub (huggingface_hub's Jobs).

The package is sent along, as it is here, with the recipe: no registry decides what runs there.
"""

import difflib
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import JobHardware, get_token, run_uv_job

from hf_vlm.data.io.files import is_remote
from hf_vlm.deploy.hub import hub_errors, refuse_tokens
from hf_vlm.training.provenance import is_hub_id
from hf_vlm.training.recipe import shipped_folder

__all__ = ["HubJob", "describe_job", "plan_job", "submit_job"]

PACKAGE = Path(__file__).parents[1]
SHIPPED = ("recipes", "model_cards")
ARCHIVE, RECIPE, SCRIPT = "hf_vlm.zip", "recipe.yaml", "job"
# Short and without the ending of a file: the client looks for files among the arguments, whose names have a length.
UNPACK = 'python -m zipfile -e "$1" . && exec bash job'
SOURCES = ("data", "probe_data", "encoder")  # keys of a recipe that name what is read


@dataclass(frozen=True, kw_only=True)
class HubJob:
    """A run on a machine of the Hub.

    Attributes:
        flavor: The machine, one of `JobHardware`.
        recipe: The resolved recipe.
        timeout: Time after which the Hub ends the job, such as `12h`.
    """

    flavor: str
    recipe: dict[str, Any]
    timeout: str

    @property
    def num_gpus(self) -> int:
        number = re.search(r"x(\d+)$", self.flavor)
        return 0 if self.flavor.startswith("cpu") else int(number[1]) if number else 1

    @property
    def script(self) -> str:
        """What runs in the folder of the unpacked archive."""
        devices = ["--cpu", "--num_processes 1", "--mixed_precision no"]
        if self.num_gpus:
            devices = ["--multi_gpu"] * (self.num_gpus > 1)
            devices += [f"--num_processes {self.num_gpus}", "--mixed_precision bf16"]
        return (
            'export PYTHONPATH="$PWD"\n'
            f"exec accelerate launch {' '.join(devices)} --num_machines 1 -m hf_vlm.cli pretrain {RECIPE}\n"
        )

    def files(self) -> dict[str, Path | bytes]:
        """The files of the archive by their path in it: package, recipe, script."""
        folders = {"hf_vlm": PACKAGE, **{f"hf_vlm/{name}": shipped_folder(name) for name in SHIPPED}}
        files: dict[str, Path | bytes] = {
            f"{name}/{path.relative_to(folder).as_posix()}": path
            for name, folder in folders.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
        return files | {
            RECIPE: yaml.safe_dump(self.recipe, sort_keys=False).encode(),
            SCRIPT: self.script.encode(),
        }

    @property
    def dependencies(self) -> list[str]:
        """What the package requires, without its extras."""
        return [line for line in metadata.requires("hf_vlm") or [] if "extra ==" not in line]


def plan_job(recipe: dict[str, Any], machine: str, timeout: str) -> HubJob:
    """The job of a recipe on a machine that is named `hub:FLAVOR`.

    Raises:
        ValueError: There is no such machine, it could not read what the recipe names, nothing would be left of the
            run, or the recipe holds a token.
    """
    flavors = [str(flavor.value) for flavor in JobHardware]
    place, _, flavor = machine.partition(":")
    if place != "hub" or flavor not in flavors:
        near = difflib.get_close_matches(flavor, flavors, n=1)
        hint = f"Did you mean hub:{near[0]}? " if near else ""
        raise ValueError(f"--on {machine}: there is no such machine. {hint}There are: hub:{', hub:'.join(flavors)}.")
    for key in SOURCES:
        given = recipe.get(key) or ()
        for name in [given] if isinstance(given, str) else given:  # a mixture names several
            if name.split(":")[0] != "scenes" and not is_remote(name) and not is_hub_id(name):
                raise ValueError(
                    f"{key}: a machine of the Hub cannot read {name}. Publish it first, with hf-vlm push, and give "
                    "its name on the Hub, or a URL."
                )
    if not (recipe.get("push_to_hub") and recipe.get("hub_model_id")):
        raise ValueError(
            "The disk of a job goes with it: give --push_to_hub true --hub_model_id my-org/my-encoder, and the run is "
            "published there whenever it saves."
        )
    if recipe.get("hub_token"):
        raise ValueError("hub_token: leave it out of the recipe. A job is given the token of `hf auth login`, hidden.")
    return HubJob(flavor=flavor, recipe=recipe, timeout=timeout)


def describe_job(job: HubJob) -> str:
    """What would run where, without any secret."""
    size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in job.files().values())
    return (
        f"A job on hub:{job.flavor} for at most {job.timeout}, with HF_TOKEN as a secret; sent along: hf_vlm as it is "
        f"here and the recipe ({size / 1e6:.1f} MB).\n\n{job.script}\n{RECIPE}:\n"
        f"{yaml.safe_dump(job.recipe, sort_keys=False)}"
    )


def submit_job(job: HubJob, run_job: Callable[..., Any] = run_uv_job) -> str:
    """Starts the job; the URL of its page.

    Raises:
        ValueError: There is no token to push with, the recipe holds one, or the Hub refuses the job.
    """
    token, files = get_token(), job.files()
    if not token:
        raise ValueError("A job needs a token to publish its run with: run `hf auth login`, or set HF_TOKEN.")
    refuse_tokens(files)
    with tempfile.TemporaryDirectory() as folder, hub_errors(str(job.recipe["hub_model_id"])):
        archive = Path(folder, ARCHIVE)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
            for name, content in files.items():
                written.writestr(name, content if isinstance(content, bytes) else content.read_bytes())
        started = run_job(
            "bash",
            script_args=["-c", UNPACK, "bash", str(archive)],
            dependencies=job.dependencies,
            flavor=job.flavor,
            secrets={"HF_TOKEN": token},
            timeout=job.timeout,
            name="hf-vlm-pretrain",
        )
    return str(started.url)
