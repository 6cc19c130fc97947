"""The model card of a run: every metric in it is read from the run's own files."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.messages import printable
from hf_vlm.data.io.parsing import parse_json, parse_yaml
from hf_vlm.data.scenes.render import PRESETS
from hf_vlm.deploy.markdown import code_span, fence_of, markdown
from hf_vlm.training.provenance import is_hub_id, recorded_origins

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from hf_vlm.tasks import Task

__all__ = [
    "CARD_MARKER",
    "model_auto_class",
    "model_card",
    "model_task",
    "provenance",
    "render_card",
    "write_model_card",
]

# push() rewrites a card that carries this line, and leaves alone one without it.
CARD_MARKER = "<!-- Written by hf_vlm from the run's files. Delete this line to keep your own edits when pushing. -->"


def write_model_card(run_dir: str | Path, *, repo_id: str | None = None, license: str | None = None) -> Path:
    """Write `README.md` into a run folder; see `model_card`, which gives its text. Returns its path."""
    path = Path(run_dir) / "README.md"
    text = model_card(run_dir, repo_id=repo_id, license=license)
    replace_text(path, text)
    return path


def model_card(
    run_dir: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The card of a run, from its `config.json`, `recipe.yaml`, `run.json` and weights.

    Sentences and sections whose values no file holds are left out. Names from the files, as of classes, are escaped:
    whoever made the data wrote them.

    Args:
        repo_id: Name on the Hub from which the model can be loaded once pushed; by default the recipe's
            `hub_model_id`, or else the folder, for a model that stays local.
        license: Identifier of the weights' licence, as https://huggingface.co/docs/hub/repositories-licenses lists it;
            apache-2.0 by default, or none where weights of others were used: their terms decide.
        pictures: Captions of pictures beside the card, by file name.

    Raises:
        ValueError: The folder holds no `config.json`, or one of its files cannot be read.
    """
    from hf_vlm.deploy.next_steps import finetune_command
    from hf_vlm.tasks import TASKS, TRAINABLE_TASKS

    run_dir = Path(run_dir)
    config = _read_config(run_dir)
    recipe, run = _read(run_dir / "recipe.yaml"), _read(run_dir / "run.json")
    repo_id = repo_id or recipe.get("hub_model_id")  # where the Trainer pushes to
    task = _task(config)
    values = _values(run_dir, config, recipe, run, task) | {
        "model_path": json.dumps(repo_id or f"./{run_dir.resolve().name}", ensure_ascii=False)[1:-1],  # in quotes
        "model_name": markdown((repo_id or run_dir.resolve().name).split("/")[-1]),
        "license": license or (None if recorded_origins(run) else "apache-2.0"),
        "pictures": pictures or {},
    }
    if task.name not in TRAINABLE_TASKS:  # an encoder, to be fine-tuned
        encoder, detection = getattr(config, "backbone_config", config), TASKS["object-detection"]
        command = finetune_command(detection, encoder, values["model_path"], "./my-coco-folder")
        values["detection_command"] = command
    values["card_data"] = _metadata(values, run, task).to_yaml()
    return render_card(task.card, values)


def render_card(template: str, values: Mapping[str, Any]) -> str:
    """The text of a card from a file of `model_cards/`; every variable of it must be given."""
    from hf_vlm.training.recipe import shipped_folder

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped_folder("model_cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["code"] = code_span
    text = environment.get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def provenance(folder: str | Path, license: str) -> str:
    """The section of a card on the licence and origins of the weights in a folder, from its `run.json`.

    Raises:
        ValueError: It cannot be read.
    """
    run = _read(Path(folder) / "run.json")
    return render_card("_provenance.md", _origin_values(run) | {"license": license})


def _origin_values(run: dict[str, Any]) -> dict[str, Any]:
    """What the templates say of where weights came from; None, or empty, where that is unknown."""
    source = _source(run.get("data") or {})
    return {
        "encoder": _describe_encoder(run["encoder"]) if run.get("encoder") else None,
        "origins": _describe_models(recorded_origins(run)),
        "from_scratch": "encoder" in run and not run["encoder"],
        "data": _describe_data(source) if source else None,
    }


def model_task(run_dir: str | Path) -> str:
    """Name of transformers' pipeline for the model in a folder.

    Raises:
        ValueError: The folder holds no `config.json`.
    """
    return _task(_read_config(Path(run_dir))).pipeline


def model_auto_class(run_dir: str | Path) -> str:
    """Name of the Auto class of transformers that loads the model in a folder, with its head.

    Raises:
        ValueError: The folder holds no `config.json`.
    """
    return _auto_class(_code_by_class(_read_config(Path(run_dir))))


def _read_config(run_dir: Path) -> "PreTrainedConfig":
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir} is not the folder of a trained model: it has no config.json.")
    # transformers takes seconds to import, which a folder that is no run should not cost.
    from transformers import AutoConfig

    import hf_vlm.registry  # noqa: F401  AutoConfig has to know the package's classes

    return AutoConfig.from_pretrained(run_dir, trust_remote_code=False)  # else it asks on the terminal


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:  # JSON is YAML, but json reads it faster and knows NaN
        text = path.read_text(encoding="utf-8")
        content = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, but holds a {type(content).__name__}.")
    return content


def _task(config: "PreTrainedConfig") -> "Task":
    """The task of a model; for a pretraining model, the task of its encoder."""
    from hf_vlm.registry import find_model_type
    from hf_vlm.tasks import TASKS

    entry = find_model_type(config.model_type)
    return TASKS.get(entry.task_in_use if entry else "", TASKS["image-feature-extraction"])


def _values(
    run_dir: Path, config: "PreTrainedConfig", recipe: dict[str, Any], run: dict[str, Any], task: "Task"
) -> dict[str, Any]:
    """Every variable of the templates; None, or empty, where it is unknown."""
    encoder = getattr(config, "backbone_config", config)
    processor = _read(run_dir / "preprocessor_config.json")
    size = processor.get("size")
    data = run.get("data") or {}
    recipe_text = yaml.safe_dump(recipe, sort_keys=True).strip() if recipe else None
    class_names = data.get("class_names") or [config.id2label[i] for i in sorted(config.id2label)]
    return {
        "config": config,
        "class_names": list(map(markdown, class_names)),
        "score_threshold": processor.get("score_threshold"),
        "method": _method_name(run.get("method")),
        "auto_class": _auto_class(_code_by_class(config)),
        **_origin_values(run),
        "metrics": _metric_rows(run.get("metrics") or {}, task),
        "train_split": data.get("split"),
        "eval_split": None if recipe.get("holdout") else recipe.get("eval_split"),  # held-out images are of none
        "held_out": f"{recipe['holdout']:.0%}" if recipe.get("holdout") else None,
        "num_examples": f"{data['num_examples']:,}" if data.get("num_examples") else None,
        "fingerprint": data.get("fingerprint"),
        "labels_from": recipe.get("labels_from") or ("regions" if data.get("labels_found") else None),
        "rounds": recipe.get("rounds", 1),
        "has_unlabelled": bool(recipe.get("unlabelled_data")),
        "training": _describe_training(run),
        "recipe": recipe_text,
        "fence": fence_of(recipe_text or ""),
        "versions": [
            (markdown(name), markdown(version)) for name, version in sorted((run.get("versions") or {}).items())
        ],
        "image_size": _size((size["height"], size["width"]) if size else encoder.image_size),
        "aspect_ratio": f"{'keeping' if processor.get('do_pad') else 'without keeping'} their aspect ratio",
        "patch_size": _size(encoder.patch_size),
        "num_parameters": _num_parameters(run_dir),
        "marker": CARD_MARKER,
        "num_hidden_layers": encoder.num_hidden_layers,
        "hidden_size": encoder.hidden_size,
        "num_attention_heads": encoder.num_attention_heads,
        "num_channels": encoder.num_channels,
    }


def _metadata(values: Mapping[str, Any], run: dict[str, Any], task: "Task") -> ModelCardData:
    source = _source(run.get("data") or {})
    models = [name for name in recorded_origins(run) if is_hub_id(name)]
    results = [
        EvalResult(
            task_type=task.pipeline,
            dataset_type=source if source and is_hub_id(source) else "unknown",
            dataset_name=printable(Path(source).name) if source else "unknown",
            dataset_split=values["eval_split"],
            metric_type=key,
            metric_name=_metric_name(key, task),
            metric_value=round(value, 4),
        )
        for key, value in (run.get("metrics") or {}).items()
        if _is_number(value)
    ]
    return ModelCardData(
        model_name=values["model_name"],
        library_name="transformers",
        pipeline_tag=task.pipeline,
        license=values["license"],
        tags=["hf_vlm", "vision-transformer", "self-supervised-learning"],
        datasets=[source] if source and is_hub_id(source) else None,
        base_model=models if len(models) > 1 else next(iter(models), None),
        eval_results=results or None,
    )


def _code_by_class(config: "PreTrainedConfig") -> dict[str, str]:
    """The code of each Auto class that loads a model; names are those of a file, and may be anything there."""
    auto_map = getattr(config, "auto_map", None) or {}
    return {name: code for name, code in auto_map.items() if name.isidentifier()}


def _auto_class(auto_map: Mapping[str, Any]) -> str:
    return next((name for name in auto_map if name.startswith("AutoModelFor")), "AutoModel")


def _method_name(method: str | None) -> str | None:
    """A pretraining method's name as its authors write it, which its class keeps; None for other runs."""
    from hf_vlm.registry import MODELS

    names = {row.name: row.model_class.__name__ for row in MODELS if row.task == "pretraining"}
    return names[method].removesuffix("ForPreTraining") if method in names else None


def _source(data: Mapping[str, Any]) -> str | None:
    """The name of a run's data; for a mixture, the names of its sources."""
    source = data.get("source")
    return ", ".join(source) if isinstance(source, dict) else source


def _describe_data(source: str) -> str:
    name, _, preset = source.partition(":")
    if name == "scenes":
        settings = PRESETS.get(preset or "easy")  # None for a mixture
        composed = f", composed from {settings.origin}" if settings else ""
        return f"the built-in scenes of hf_vlm ({code_span(source)}){composed}"
    if is_hub_id(source):
        return f"the data set [{source}](https://huggingface.co/datasets/{source})"
    return f"a data set of the publisher ({code_span(Path(source).name)})"  # the folders above it are private


def _describe_encoder(encoder: str) -> str:
    if is_hub_id(encoder):
        return f"the pretrained encoder [{encoder}](https://huggingface.co/{encoder})"
    return f"the publisher's own pretrained encoder ({code_span(Path(encoder).name)})"


def _describe_models(names: list[str]) -> str:
    return " and ".join(f"[{n}](https://huggingface.co/{n})" if is_hub_id(n) else code_span(n) for n in names)


def _describe_training(run: dict[str, Any]) -> str | None:
    from hf_vlm.training.resume import SCHEDULE

    parts = []
    if run.get("num_steps"):
        parts.append(f"{run['num_steps']:,} optimiser steps")
    if run.get("num_images_seen"):
        parts.append(f"{run['num_images_seen']:,} images seen")
    parts += [
        f"from step {change['step']:,} with {name} {change[name][1]} in place of {change[name][0]}"
        for change in run.get("changes") or []
        for name in sorted(change.keys() & SCHEDULE)
    ]
    if run.get("seconds"):
        parts.append(_duration(run["seconds"]))
    if run.get("machine"):
        parts.append(f"on {markdown(run['machine'])}")
    if _is_number(run.get("train_loss")):
        parts.append(f"mean training loss {run['train_loss']:.4g}")
    if _is_number(rank := (run.get("probe") or {}).get("probe_effective_rank")):
        parts.append(f"effective rank of the features {rank:.1f}")
    if (run.get("git") or {}).get("commit"):
        parts.append(
            f"code at commit {code_span(run['git']['commit'])}" + (" with changes" if run["git"].get("dirty") else "")
        )
    return ", ".join(parts) + "." if parts else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _metric_rows(metrics: Mapping[str, Any], task: "Task") -> list[tuple[str, str]]:
    return [(markdown(_metric_name(key, task)), f"{value:.3f}") for key, value in metrics.items() if _is_number(value)]


def _metric_name(key: str, task: "Task") -> str:
    """The task's name of a metric; keys such as `ap/cat` also name the class."""
    metric, slash, class_name = key.partition("/")
    name = task.metric_names.get(metric + slash, metric)
    return printable(f"{name} of {class_name}" if slash else name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(size: Any) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return markdown(f"{height} x {width}")


def _num_parameters(run_dir: Path) -> str | None:
    from safetensors import safe_open

    count = 0
    for path in sorted(run_dir.glob("model*.safetensors")):
        with safe_open(path, framework="np") as weights:
            count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    if not count:
        return None
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"
