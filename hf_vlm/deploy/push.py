"""A run on the Hub: weights, code, image processor, recipe and card, and nothing else."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

from hf_vlm.deploy.exported_card import PARITY_FILE, PREDICT_FILE
from hf_vlm.deploy.model_card import CARD_MARKER, write_model_card
from hf_vlm.features.exported import EXPORT_FILE, is_exported, program_files
from hf_vlm.training.provenance import recorded_origins

__all__ = ["files_to_push", "push"]

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
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\s", re.MULTILINE)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload a model trained with hf_vlm",
    license: str | None = None,
) -> str:
    """Upload a finished run, or an export, as a model repository that loads without hf_vlm installed.

    Uploads what `files_to_push` names and a card written by `write_model_card` (a card whose marker line was deleted
    is uploaded as it is). Weights and code of earlier pushes that this run does not have are deleted. The token is
    that of `hf auth login` or of the variable HF_TOKEN.

    Args:
        repo_id: Name on the Hub, `name` or `owner/name`; created where it does not exist.
        private: Whether to create the repository as private.
        revision: Branch to push to, created where it does not exist; the main branch by default.
        license: Identifier of the weights' licence, for the card; apache-2.0 by default, but required where weights of
            others were used.

    Returns:
        The address of the model's page.

    Raises:
        ValueError: Where the folder is not a finished run, would publish a token or needs a licence, and where the Hub
            cannot be reached, does not accept the token, the name or the card.
    """
    run_dir = Path(run_dir)
    files = files_to_push(run_dir)
    if license is None and writes_card(run_dir) and (origins := recorded_origins(_json(run_dir / "run.json"))):
        raise ValueError(
            f"{run_dir} was trained with weights of {' and '.join(origins)}: name with --license a licence that their "
            "terms allow."
        )
    with _as_value_error(repo_id):
        if get_token() is None:
            raise ValueError("There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.")
        api = HfApi(library_name="hf_vlm")
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise ValueError(f"{url.repo_id} exists and is public: make it private in its settings, or push without.")
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        if writes_card(run_dir):
            write_model_card(run_dir, repo_id=url.repo_id, license=license)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run_dir,
            allow_patterns=[*files, "README.md"],
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.py"],
            revision=revision,
            commit_message=commit_message,
        )
    return f"{url}/tree/{revision}" if revision else str(url)


def writes_card(run_dir: Path) -> bool:
    """Whether pushing writes the card: there is none, or one of a run that still has the marker line."""
    card = run_dir / "README.md"
    return not card.is_file() or CARD_MARKER in card.read_text(encoding="utf-8")


def files_to_push(run_dir: str | Path) -> list[str]:
    """Names of the files of a run or an export that are published: configurations, weights, code, recipe and record.

    Checkpoints, optimiser state and training logs are not among them.

    Raises:
        ValueError: Where one of them is missing (all missing ones are named), or one holds a token.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give the folder that a run wrote.")
    described = EXPORT_DESCRIPTION if is_exported(run_dir) else DESCRIPTION
    missing = [f"{name} ({what})" for name, what in described.items() if not (run_dir / name).is_file()]
    weights = program_files(run_dir) if is_exported(run_dir) else _weights(run_dir)
    missing += ["model.safetensors (the weights)"] if not weights else []
    missing += [name for name in weights if not (run_dir / name).is_file()]
    code = [PREDICT_FILE] if is_exported(run_dir) and (run_dir / PREDICT_FILE).is_file() else []
    for name in ("config.json", "preprocessor_config.json"):
        if (run_dir / name).is_file():
            code += [file for file in _code(run_dir, name) if file not in code]
    missing += [f"{name} (code that the configuration names)" for name in code if not (run_dir / name).is_file()]
    if missing:
        raise ValueError(f"{run_dir} is not the folder of a finished run; it has no {', no '.join(missing)}.")
    for name in [*described, *code, *(["README.md"] if (run_dir / "README.md").is_file() else [])]:
        if TOKEN.search((run_dir / name).read_text(encoding="utf-8")):
            raise ValueError(f"{run_dir / name} holds what looks like a Hugging Face token: remove it before pushing.")
    return [*described, *weights, *code]


def _weights(run_dir: Path) -> list[str]:
    index = run_dir / "model.safetensors.index.json"
    if index.is_file():
        return [index.name, *sorted(set(_json(index)["weight_map"].values()))]
    return ["model.safetensors"] if (run_dir / "model.safetensors").is_file() else []


def _code(run_dir: Path, config_name: str) -> list[str]:
    """Files of the classes in a configuration's `auto_map`, and all that these import from the same folder."""
    auto_map: Mapping[str, Any] = _json(run_dir / config_name).get("auto_map") or {}
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


@contextmanager
def _as_value_error(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors into what the user can do about them."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name that the Hub accepts: {error}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no such branch: {error.server_message or error}") from error
    except HfHubHTTPError as error:
        status, text = error.response.status_code, error.server_message or str(error)
        if status == 401:
            message = f"The Hub does not accept the token ({text}): run `hf auth login`, or set HF_TOKEN."
        elif status in (403, 404):
            owner = repo_id.split("/")[0]
            message = f"The token may not write to {repo_id} ({text}): use a token with write access to {owner!r}."
        else:
            message = f"The Hub refused {repo_id} with status {status}: {text}"
        raise ValueError(message) from error
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The Hub cannot be reached: {error}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
