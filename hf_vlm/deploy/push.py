"""Models on the Hub: a run with weights, code, image processor, recipe and card, or a folder of `hf-vlm export`."""

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.parsing import parse_yaml
from hf_vlm.deploy.exported_card import PARITY_FILE, PREDICT_FILE
from hf_vlm.deploy.hub import Repository, Upload, refuse_tokens
from hf_vlm.deploy.model_card import (
    CARD_MARKER,
    model_auto_class,
    model_card,
    model_task,
    provenance,
    write_model_card,
)
from hf_vlm.features.exported import EXPORT_FILE, is_exported, program_files
from hf_vlm.training.provenance import RUN_FILE, recorded_origins

__all__ = [
    "export_upload",
    "files_to_push",
    "model_files",
    "model_license",
    "model_upload",
    "push",
    "upload_of",
    "write_hub_files",
]

DESCRIPTION = {
    "config.json": "the model's configuration",
    "preprocessor_config.json": "the image processor",
    "recipe.yaml": "the resolved recipe",
    "run.json": "the record of the run",
}
EXPORT_DESCRIPTION = {
    "config.json": "the model's configuration",
    "preprocessor_config.json": "the image processor",
    EXPORT_FILE: "the manifest of the program",
    PARITY_FILE: "the record of the gate",
}
# Of a model that reads texts, as the tokenisers of transformers are saved.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
PROVENANCE = "## Licence and provenance"
STALE = ("*.safetensors", "*.safetensors.index.json", "*.py")
STALE_EXPORTS = ("*.onnx", "*.onnx.data", "*.xml", "*.bin", "*.pt2", "*.pte")
# What an inference endpoint needs beside what it has; torch is among that.
ENDPOINT_REQUIREMENTS = "transformers>=5.23,<6\npillow>=12\nscipy>=1.17\n"
# Pictures in a run's folder: what is beneath them in the card, and whether they show images of the data.
PICTURES = {
    "predictions.png": ("Predictions.", True),
    "confusion.png": ("Confusion matrix.", False),
    "probes.png": ("The features while it was trained.", False),
    "pseudo_labels.png": ("What was taken for objects, without labels.", True),
}
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\s", re.MULTILINE)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload a model trained with hf_vlm",
    license: str | None = None,
    pictures: bool = False,
    verify: bool = False,
) -> str:
    """Upload a finished run as a model repository that loads without hf_vlm installed, or an exported model.

    Uploads what `model_upload` or `export_upload` names. Weights and code of earlier pushes that this one does not
    have are deleted; content that the Hub has is not sent again. The token is that of `hf auth login` or of the
    variable HF_TOKEN.

    Args:
        folder: Folder of a run, or of `hf-vlm export`.
        repo_id: Name on the Hub, `name` or `owner/name`; created where it does not exist.
        private: Whether to create the repository as private.
        revision: Branch to push to, created where it does not exist; the main branch by default.
        license: Identifier of the weights' licence, for the card; apache-2.0 by default, but required where weights of
            others were used.
        pictures: Whether to publish pictures that show images of the data too; those of built-in images always are.
        verify: Whether to load what was pushed in another process, and to compare its outputs with the folder's.

    Returns:
        The address of the model's page.

    Raises:
        ValueError: Where the folder is not a finished run, would publish a token or needs a licence, where the Hub
            cannot be reached, does not accept the token, the name or the card, and where verification fails.
    """
    folder = Path(folder)
    upload = upload_of(folder, repo_id, license=license, pictures=pictures)
    repository = Repository(repo_id, private=private, revision=revision)
    if repository.id != repo_id:  # the owner was left out
        upload = upload_of(folder, repository.id, license=license, pictures=pictures)
    if not is_exported(folder) and isinstance(card := upload.files["README.md"], bytes):
        replace_text(folder / "README.md", card.decode())
    commit = repository.send(upload, message=commit_message)
    if verify:
        verify_push(folder, repository.id, commit)
    return repository.address


def upload_of(folder: str | Path, repo_id: str, *, license: str | None = None, pictures: bool = False) -> Upload:
    """What [`push`] sends.

    Raises:
        ValueError: As there, but of what the Hub says.
    """
    folder = Path(folder)
    if is_exported(folder):
        return export_upload(folder, license)
    return model_upload(folder, repo_id, license, pictures)


def verify_push(folder: Path, repo_id: str, commit: str) -> None:
    """Verifies a pushed commit; see [`verify_model`] and [`verify_export`].

    Raises:
        ValueError: The model does not load from the Hub, or gives something else than the folder's.
    """
    from hf_vlm.deploy.verify import verify_export, verify_model

    if not is_exported(folder):
        verify_model(folder, model_auto_class(folder), repo_id, commit)
    elif (folder / PREDICT_FILE).is_file():
        verify_export(folder, repo_id, commit)


def model_upload(folder: Path, repo_id: str, license: str | None = None, pictures: bool = False) -> Upload:
    """The files of a run that are published: those of `files_to_push`, pictures, the handler of an endpoint, a card.

    A card whose marker line was deleted is uploaded as it is.

    Raises:
        ValueError: Where the folder is not a finished run, would publish a token, or needs a licence.
    """
    files = model_files(folder)
    if is_own_card := not writes_card(folder):
        files["README.md"] = folder / "README.md"
    refuse_tokens(files)
    if not is_own_card:
        license = model_license(folder, license)
        shown = _pictures(folder, pictures)
        files |= {name: folder / name for name in shown}
        files["README.md"] = model_card(folder, repo_id=repo_id, license=license, pictures=shown).encode()
    return Upload(files | _endpoint_files(folder), STALE)


def export_upload(folder: Path, license: str | None = None) -> Upload:
    """The files of an exported model, whose card gets the licence, and where the weights came from.

    Raises:
        ValueError: Where it holds a token, has no card, or needs a licence.
    """
    from huggingface_hub import ModelCard

    files = model_files(folder)
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md: export it again (hf-vlm export).")
    card = ModelCard.load(folder / "README.md")
    card.data.license = license = model_license(folder, license)
    text = str(card)
    if PROVENANCE not in text:
        text = f"{text.rstrip()}\n\n{provenance(folder, license)}"
    files["README.md"] = text.encode()
    refuse_tokens(files)
    return Upload(files, (*STALE, *STALE_EXPORTS))


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of `files_to_push`, by name.

    Raises:
        ValueError: Where the folder is neither a finished run nor an export.
    """
    return {name: folder / name for name in files_to_push(folder)}


def model_license(folder: Path, license: str | None) -> str:
    """The licence of a model's weights: what is given, or apache-2.0 for weights that are the publisher's own.

    Raises:
        ValueError: Where none is given and weights of others were used, or an export does not record whether.
    """
    if license is not None:
        return license
    record = folder / RUN_FILE
    if not record.is_file():
        raise ValueError(
            f"{folder} does not record where its weights came from: name with --license a licence that the terms of "
            "their origins allow, such as apache-2.0 for your own."
        )
    if origins := recorded_origins(_json(record)):
        raise ValueError(
            f"{folder} was trained with weights of {' and '.join(origins)}: name with --license a licence that their "
            "terms allow."
        )
    return "apache-2.0"


def writes_card(run_dir: Path) -> bool:
    """Whether pushing writes the card: there is none, or one of a run that still has the marker line."""
    card = run_dir / "README.md"
    return not card.is_file() or CARD_MARKER in card.read_text(encoding="utf-8")


def files_to_push(run_dir: str | Path) -> list[str]:
    """Names of the files of a run or an export that are published: configurations, weights, code, recipe and record.

    Checkpoints, optimiser state and training logs are not among them.

    Raises:
        ValueError: Where one of them is missing (all missing ones are named).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give the folder that a run wrote.")
    described = EXPORT_DESCRIPTION if is_exported(run_dir) else DESCRIPTION
    missing = [f"{name} ({what})" for name, what in described.items() if not (run_dir / name).is_file()]
    weights = program_files(run_dir) if is_exported(run_dir) else _weights(run_dir)
    missing += ["model.safetensors (the weights)"] if not weights else []
    missing += [name for name in weights if not (run_dir / name).is_file()]
    optional = (PREDICT_FILE, RUN_FILE) if is_exported(run_dir) else ()
    code = [name for name in optional if (run_dir / name).is_file()]
    for name in ("config.json", "preprocessor_config.json"):
        if (run_dir / name).is_file():
            code += [file for file in _code(run_dir, name) if file not in code]
    missing += [f"{name} (code that the configuration names)" for name in code if not (run_dir / name).is_file()]
    if missing:
        raise ValueError(f"{run_dir} is not the folder of a finished run; it has no {', no '.join(missing)}.")
    tokenizer = [name for name in TOKENIZER_FILES if (run_dir / name).is_file()]
    return [*described, *weights, *code, *tokenizer]


def write_hub_files(folder: Path) -> None:
    """Writes what a saved model has beside it: its card, and where training pushes it, the handler of an endpoint.

    Raises:
        ValueError: One of the folder's files cannot be read.
    """
    write_model_card(folder)
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and parse_yaml(recipe.read_text(encoding="utf-8")).get("push_to_hub"):
        for name, content in _endpoint_files(folder).items():
            replace_text(folder / name, content.decode())


def _endpoint_files(folder: Path) -> dict[str, bytes]:
    """What an inference endpoint reads: how to answer requests, and packages that it does not have."""
    return {"handler.py": _handler(model_task(folder)).encode(), "requirements.txt": ENDPOINT_REQUIREMENTS.encode()}


def _handler(task: str) -> str:
    """The program of an inference endpoint for a task of transformers' pipelines."""
    template = resources.files("hf_vlm.deploy.templates").joinpath("handler.py").read_text(encoding="utf-8")
    return template.replace("{{ task }}", task)


def _pictures(folder: Path, all_of_them: bool) -> dict[str, str]:
    """Captions of the pictures to publish, by name; images of data stay private unless the user or the data say so."""
    source = str((_json(folder / RUN_FILE).get("data") or {}).get("source"))
    may_show_data = all_of_them or source.partition(":")[0] == "scenes"
    return {
        name: caption
        for name, (caption, shows_data) in PICTURES.items()
        if (folder / name).is_file() and (may_show_data or not shows_data)
    }


def _weights(run_dir: Path) -> list[str]:
    index = run_dir / "model.safetensors.index.json"
    if index.is_file():
        return [index.name, *sorted(set(_json(index)["weight_map"].values()))]
    return ["model.safetensors"] if (run_dir / "model.safetensors").is_file() else []


def _code(run_dir: Path, config_name: str) -> list[str]:
    """Files of the classes in a configuration's `auto_map`, and all that these import from the same folder.

    Of an export they are those of the configuration and the image processor: its program is the model.
    """
    auto_map: Mapping[str, Any] = _json(run_dir / config_name).get("auto_map") or {}
    if is_exported(run_dir):
        auto_map = {name: value for name, value in auto_map.items() if not name.startswith("AutoModel")}
    references = [ref for value in auto_map.values() for ref in (value if isinstance(value, list) else [value]) if ref]
    if not references:
        raise ValueError(
            f"{run_dir / config_name} names no code (auto_map), so that the model would load only where hf_vlm is "
            "installed: import hf_vlm.registry before save_pretrained."
        )
    if foreign := [ref for ref in references if "--" in ref]:
        raise ValueError(f"{run_dir / config_name} takes its code from another repository: {foreign[0]}.")
    names: list[str] = []
    waiting = [f"{ref.split('.')[0]}.py" for ref in references]
    while waiting:
        name = waiting.pop(0)
        if name in names:
            continue
        names.append(name)
        if (run_dir / name).is_file():
            text = (run_dir / name).read_text(encoding="utf-8")
            waiting += [f"{module}.py" for module in RELATIVE_IMPORT.findall(text)]
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, but holds a {type(content).__name__}.")
    return content
