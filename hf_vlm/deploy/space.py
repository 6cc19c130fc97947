"""A Space on the Hub that shows a model's predictions, with all that it needs.

That is the model, a page and this package; for an export with its `predict.py` the package and torch are left out.
"""

import platform
import re
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

import yaml

from hf_vlm.data.images import image_paths
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.deploy.exported_card import PARITY_FILE, PREDICT_FILE, RUNTIMES
from hf_vlm.deploy.hub import Upload, refuse_tokens
from hf_vlm.deploy.model_card import model_task, provenance
from hf_vlm.deploy.push import model_files, model_license
from hf_vlm.features.exported import is_exported

__all__ = ["space_upload"]

GRADIO = "6.31.0"
CPU_WHEELS = "--extra-index-url https://download.pytorch.org/whl/cpu"  # the others bring gigabytes of CUDA
PACKAGE = Path(__file__).parents[1]
STALE = ("app.py", "hf_vlm/*", "model/*", "examples/*")


def space_upload(
    folder: str | Path, repo_id: str, *, license: str | None = None, examples: Sequence[str | Path] = ()
) -> Upload:
    """The files of a Space: page, requirements, README, the model, and for a run this package as it is here.

    The package is sent along, and not required by name: no registry decides what runs in the Space.

    Args:
        folder: Folder of a run, or of `hf-vlm export`.
        repo_id: Name of the Space.
        license: Identifier of the weights' licence; as for `push`.
        examples: Images to choose from on the page: files, folders or wildcards.

    Raises:
        ValueError: The folder is neither a finished run nor an export, would publish a token, needs a licence, or
            holds an encoder; or an example is no image.
    """
    folder = Path(folder)
    name = repo_id.split("/")[-1]
    license = model_license(folder, license)
    if model_task(folder) == "image-feature-extraction":
        raise ValueError(f"{folder} holds an encoder, which predicts no classes: name a fine-tuned model.")
    images = [Path(path) for given in examples for path in image_paths(given)]
    needs_torch = not (folder / PREDICT_FILE).is_file()
    template = resources.files("hf_vlm.deploy.templates").joinpath("space.py" if needs_torch else "space_exported.py")
    package = sorted(PACKAGE.rglob("*.py")) if needs_torch else []
    files: dict[str, Path | bytes] = {
        "README.md": _readme(name, license, folder).encode(),
        "app.py": template.read_text(encoding="utf-8").replace("{{ name }}", name).encode(),
        "requirements.txt": _requirements(folder, needs_torch=needs_torch).encode(),
        **{f"model/{path}": content for path, content in model_files(folder).items()},
        **{f"examples/{number:02d}{path.suffix.lower()}": path for number, path in enumerate(images)},
        **{f"hf_vlm/{path.relative_to(PACKAGE).as_posix()}": path for path in package},
    }
    refuse_tokens(files)
    return Upload(files, STALE)


def _readme(name: str, license: str, folder: Path) -> str:
    """The README of a Space, whose metadata say how it is started."""
    values = {
        "title": name,
        "emoji": "🔎",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "app_file": "app.py",
        "license": license,
        "tags": ["hf_vlm"],
    }
    header = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    text = "Drop an image, and see what the model in `model/` predicts. Made by hf_vlm."
    return f"---\n{header}---\n\n{text}\n\n{provenance(folder, license)}"


def _requirements(folder: Path, *, needs_torch: bool) -> str:
    """The packages that the model, and hf_vlm where it is there, need in the versions that are installed here, with
    torch for CPUs.
    """
    names = ["numpy", "pillow"]
    if needs_torch:
        lines = [line for line in metadata.requires("hf_vlm") or [] if "extra ==" not in line]
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]
    if is_exported(folder):
        record = parse_json((folder / PARITY_FILE).read_text(encoding="utf-8"))
        names += [RUNTIMES[record["format"]]] if record.get("format") in RUNTIMES else []
    versions = {name: f"=={metadata.version(name).partition('+')[0]}" for name in names}
    versions["pillow"] = ""  # gradio's bounds are narrower than ours
    if needs_torch:
        versions["torch"] += "+cpu"
    lines = [f"{name}{version}" for name, version in sorted(versions.items())]
    return "\n".join([CPU_WHEELS, *lines] if needs_torch else lines) + "\n"
