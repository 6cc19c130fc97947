"""Installed packages against the bounds of hf_vlm, and installations that are known to break."""

import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_vlm.deploy.doctor.finding import Finding

__all__ = ["check_packages", "check_torch"]

Installed = Callable[[str], str | None]  # the version of a package; None where it is not installed

SHOWN = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub")
OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-python-headless", "opencv-contrib-python-headless")
HIDDEN_EXTRAS = ("dev", "page")
ACCELERATORS = ("nvidia[0-9]*", "kfd")  # in /dev: CUDA, ROCm
PROBE_SECONDS = 120
# Importing torch takes seconds, and may end the process: it is done in another one, where there is a reason to.
PROBE = """
import json, warnings
found = {"devices": []}
try:
    import torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                found["devices"].append([torch.cuda.get_device_name(index), free, total])
        elif torch.backends.mps.is_available():
            found["devices"].append(["MPS", None, None])
    found["warnings"] = [str(warning.message) for warning in caught]
except Exception as error:
    found["torch"] = f"{type(error).__name__}: {error}"
else:
    try:
        import torchvision
    except ModuleNotFoundError as error:
        found["torchvision"] = None if error.name == "torchvision" else str(error)
    except Exception as error:
        found["torchvision"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements_of(name: str) -> list[str]:
    """What an installed package requires; empty where it is not installed."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def check_packages() -> Iterator[Finding]:
    """Python, the dependencies, the extras, and packages that get in each other's way."""
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        package = metadata.metadata("hf_vlm")
    except metadata.PackageNotFoundError:
        yield Finding("ok", python)
        yield Finding(
            "wrong", "hf_vlm runs from its sources and is not installed", "pip install -c constraints.txt -e ."
        )
    else:
        yield Finding("ok", f"{python}, hf_vlm {package['Version']}")
        if importlib.util.find_spec("packaging") is None:  # with which the others are examined
            yield Finding("wrong", "packaging is not installed", "pip install packaging")
        else:
            yield from check_requirements(package.get_all("Requires-Dist") or [], installed_version)
            yield check_extras(
                package.get_all("Provides-Extra") or [], package.get_all("Requires-Dist") or [], installed_version
            )
    yield from check_opencv(installed_version, import_error("cv2"))


def check_python(required: str, version: str) -> Iterator[Finding]:
    """A version of Python outside of the bounds."""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(required).contains(version, prereleases=True):
        yield Finding("wrong", f"Python is {version}, but hf_vlm needs {required}", "make an environment with another")


def check_requirements(lines: Sequence[str], installed: Installed) -> Iterator[Finding]:
    """The dependencies against their bounds.

    Args:
        lines: Requirements as in a package's metadata; those of extras are left out.
    """
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in lines]
    requirements = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    fitting = {}
    for requirement in requirements:
        version = installed(requirement.name)
        wanted = f'pip install "{requirement.name}{requirement.specifier}"'
        if version is None:
            yield Finding("wrong", f"{requirement.name} is not installed", wanted)
        elif not requirement.specifier.contains(version, prereleases=True):
            bounds = f"hf_vlm needs {requirement.specifier}"
            yield Finding("wrong", f"{requirement.name} {version} is installed, but {bounds}", wanted)
        else:
            fitting[requirement.name] = version
    shown = ", ".join(f"{name} {fitting[name]}" for name in SHOWN if name in fitting)
    num_others = len(fitting) - len(fitting.keys() & {*SHOWN})
    if fitting:
        yield Finding("ok", f"{shown or 'dependencies'} and {num_others} others are as hf_vlm needs them")


def check_extras(extras: Sequence[str], lines: Sequence[str], installed: Installed) -> Finding:
    """The extras of the package: which are installed, and how to install the others."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in lines]
    present: list[str] = []
    absent: list[str] = []
    for extra in extras:
        if extra in HIDDEN_EXTRAS:
            continue
        of_extra = [
            item
            for item in requirements
            if item.marker is not None
            and item.marker.evaluate({"extra": extra})
            and not item.marker.evaluate({"extra": ""})
        ]
        fits = [
            version is not None and item.specifier.contains(version, prereleases=True)
            for item in of_extra
            if item.name.replace("-", "_") != "hf_vlm"
            for version in [installed(item.name)]
        ]
        (present if all(fits) else absent).append(extra)
    text = f"extras: {', '.join(present) or 'none'}"
    if not absent:
        return Finding("ok", text)
    return Finding("ok", f"{text}; not installed: {', '.join(absent)}", f'pip install "hf_vlm[{",".join(absent)}]"')


def import_error(name: str) -> str | None:
    """Why a module cannot be imported; None where it can, or is not there."""
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        return None if error.name == name else str(error)
    except Exception as error:  # broken binaries raise anything
        return f"{type(error).__name__}: {error}"
    return None


def check_opencv(installed: Installed, error: str | None) -> Iterator[Finding]:
    """The owners of the folder cv2, of which the last installed one wins."""
    owners = [name for name in OPENCV if installed(name) is not None]
    repair = f"pip uninstall -y {' '.join(owners)} && pip install opencv-python-headless"
    if error is not None:
        yield Finding("wrong", f"cv2 cannot be imported: {error}", repair)
    elif len(owners) > 1:
        text = f"{' and '.join(owners)} write the same folder cv2: uninstalling one breaks the other"
        yield Finding("warning", text, f"only if cv2 fails: {repair}")


def check_torch() -> Iterator[Finding]:
    """Devices, and torchvision, which hf_vlm does not need but transformers imports where it is installed."""
    torch, torchvision = installed_version("torch"), installed_version("torchvision")
    if torch is None:
        return
    pinned = [line for line in requirements_of("torchvision") if line.startswith("torch=")]
    mismatch = torchvision_mismatch(torch, torchvision, pinned)
    if mismatch is not None:
        yield mismatch
    seen = [path.name for pattern in ACCELERATORS for path in Path("/dev").glob(pattern)]
    if not seen and (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        seen = ["MPS"]
    if seen and torch_cuda() is None and seen != ["MPS"]:
        advice = "install the build for it that https://pytorch.org/get-started/locally names"
        yield Finding("warning", f"there is a GPU, but torch {torch} is a build for CPUs alone", advice)
    elif seen or (torchvision is not None and mismatch is None):
        yield from check_probe(probe(), has_accelerator=bool(seen))
    else:
        yield Finding("ok", "no accelerator")


def torchvision_mismatch(torch: str, torchvision: str | None, pinned: Sequence[str]) -> Finding | None:
    """A torchvision that was built for another torch; None where there is none.

    Args:
        pinned: Requirements of torchvision for torch, such as `torch==2.13.0`.
    """
    if torchvision is None:
        return None
    wanted = re.search(r"==\s*([\d.]+)", " ".join(pinned))
    text = None
    if wanted and wanted[1] != torch.partition("+")[0]:
        text = f"torchvision {torchvision} was built for torch {wanted[1]}, but torch is {torch}"
    elif ("+cpu" in torch) != ("+cpu" in torchvision):
        text = f"torchvision {torchvision} and torch {torch} are builds for different devices"
    return Finding("wrong", f"{text}: transformers fails with it", "pip uninstall -y torchvision") if text else None


def torch_cuda() -> str | None:
    """The CUDA or ROCm version that torch was built for, read without importing torch; None for a build for CPUs."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    found = re.search(r"^(?:cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)", file.read_text(), re.MULTILINE)
    return found[1] if found else None


def probe() -> dict[str, Any]:
    """What another process finds when it imports torch, and torchvision where that is installed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"torch": f"no answer within {PROBE_SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        return {"torch": lines[-1] if lines else f"the process ended with status {done.returncode}"}
    return found


def check_probe(found: dict[str, Any], *, has_accelerator: bool) -> Iterator[Finding]:
    """Findings of what `probe` returns."""
    if error := found.get("torch"):
        yield Finding("wrong", f"torch cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    if error := found.get("torchvision"):
        text = f"torchvision cannot be imported, and transformers fails with it: {error}"
        yield Finding("wrong", text, "pip uninstall -y torchvision")
    for name, free, total in found["devices"]:
        memory = f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free" if total else ", which shares the memory above"
        yield Finding("ok", f"{name}{memory}")
    if has_accelerator and not found["devices"]:
        reason = (found.get("warnings") or ["torch finds none that it can use"])[0].splitlines()[0]
        text = f"there is an accelerator, but torch does not use it: {reason}"
        yield Finding("wrong", text, "update its driver, or install a torch that fits it")
    elif not has_accelerator:
        yield Finding("ok", "no accelerator")
