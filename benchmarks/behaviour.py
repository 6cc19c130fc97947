"""Whether a change of the code changed what the models compute: every row of the registry, equal to the bit.

    OMP_NUM_THREADS=1 PYTHONPATH=<the tree before> python benchmarks/behaviour.py save FILE
    OMP_NUM_THREADS=1 PYTHONPATH=<the tree after> python benchmarks/behaviour.py compare FILE

`save` builds the tiny models of tests/tiny.py, each with two encoders (a plain one; one with rotary positions, gated
MLP, LayerScale, register tokens and stochastic depth), and keeps configuration, weights, batch, outputs, loss and
gradients of a step in training, the loss of the step after, and the outputs of evaluation. `compare` builds them from
the kept configurations, compares their initial weights with the kept ones, loads these strictly and computes the same
again. It ends with exit code 1 where anything differs; the last line of stdout is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_vlm
from hf_vlm.registry import MODELS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import BACKBONE, TINY, batch, config_fields

VARIED = {
    "position_embedding_type": "rope",
    "use_gated_mlp": True,
    "layerscale_value": 0.5,
    "num_register_tokens": 2,
    "drop_path_rate": 0.5,
}
BACKBONES = {"plain": BACKBONE, "varied": BACKBONE | VARIED}
ROWS = {entry.name: entry for entry in MODELS}
# What the tree before the rebuild called by another name.
OLD_ROWS = {"mae_image_losses": "mae"}
OLD_FIELDS = {"mask_patch_size": "mask_unit_size"}
IS_OLD = "mae_image_losses" not in ROWS


def build(name: str, fields: dict[str, Any]) -> Any:
    """The model of a name of the table, freshly initialised with seed 0."""
    row = TINY[name].row
    if IS_OLD:
        row = OLD_ROWS.get(row, row)
        fields = {OLD_FIELDS.get(key, key): value for key, value in fields.items()}
    torch.manual_seed(0)
    return ROWS[row].model_class(ROWS[row].config_class(**fields))


def flat(prefix: str, value: Any) -> dict[str, Tensor]:
    """Tensors within outputs, by dotted names."""
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    pairs = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for name, item in pairs for key, tensor in flat(f"{prefix}.{name}", item).items()}


def compute(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients of a step, the loss of the next one, and the outputs of evaluation."""
    found: dict[str, Tensor] = {}
    fixed = {key: value for key, value in inputs.items() if key in ("pixel_values", "local_pixel_values", "labels")}
    for seed, given in enumerate((inputs, fixed)):  # the second time masks are sampled
        torch.manual_seed(seed)
        model.train().zero_grad()
        output = model(**given)
        found |= flat(f"train{seed}", dict(output))
        if output.get("loss") is not None:
            output["loss"].backward()
        else:
            sum(tensor.float().square().sum() for tensor in _tensors(output)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"gradient{seed}.{name}": gradient.clone() for name, gradient in gradients.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter.sub_(gradients[name], alpha=0.1)
        if hasattr(model, "after_step"):
            model.after_step(0.3)
    found |= {f"state.{name}": value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(2)
        return found | flat("eval", dict(model.eval()(**inputs)))


def _tensors(output: Any) -> list[Tensor]:
    """Tensors of an output, with their gradients."""
    return [t for value in output.values() for t in (value if isinstance(value, tuple) else (value,))]


def save(path: Path) -> None:
    """Keeps what every model of the table computes."""
    cases: dict[str, Any] = {}
    for name in TINY:
        for of_backbone, backbone in BACKBONES.items():
            with tempfile.TemporaryDirectory() as folder:
                fields = config_fields(name, folder, backbone)
                model = build(name, fields)
            state = {key: value.clone() for key, value in model.state_dict().items()}
            torch.manual_seed(3)
            inputs = batch(name)
            cases[f"{name} {of_backbone}"] = {"name": name, "state": state, "inputs": inputs}
            cases[f"{name} {of_backbone}"] |= {"backbone": backbone, "results": compute(model, inputs)}
    torch.save(cases, path)
    print(json.dumps({"saved": len(cases), "tree": str(Path(hf_vlm.__file__).parents[1])}))


def compare(path: Path) -> int:
    """Prints one line per case; returns the number of those that differ."""
    differing = {}
    for case, kept in torch.load(path).items():
        with tempfile.TemporaryDirectory() as folder:
            model = build(kept["name"], config_fields(kept["name"], folder, kept["backbone"]))
        found = {f"initial.{name}": value.clone() for name, value in model.state_dict().items()}
        expected = {f"initial.{name}": value for name, value in kept["state"].items()}
        model.load_state_dict(kept["state"], strict=True)
        found |= compute(model, kept["inputs"])
        expected |= kept["results"]
        worst = {name: _difference(found.get(name), expected.get(name)) for name in {**found, **expected}}
        wrong = {name: value for name, value in worst.items() if value != 0}
        print(f"{case:<28} {len(expected)} tensors, " + ("equal" if not wrong else f"{len(wrong)} differ"))
        for name, value in sorted(wrong.items(), key=lambda item: -item[1])[:5]:
            print(f"    {name}: {value:.3g}")
        if wrong:
            differing[case] = max(wrong.values())
    print(json.dumps({"differing": differing, "tree": str(Path(hf_vlm.__file__).parents[1])}))
    return len(differing)


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference of two tensors; infinite where one is missing or has another shape or type."""
    if found is None or expected is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    return 0.0 if torch.equal(found, expected) else (found.double() - expected.double()).abs().max().item()


def main() -> None:
    """Saves or compares; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description="What every model computes, before and after a change.")
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if options.action == "save":
        save(options.file)
    elif compare(options.file):
        sys.exit(1)


if __name__ == "__main__":
    main()
