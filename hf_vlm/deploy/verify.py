"""Whether what was pushed gives what the local model gives, by loading it as its users do."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import get_token

from hf_vlm.data.io.messages import one_line
from hf_vlm.deploy.templates import load_pushed

__all__ = ["verify_export", "verify_model"]

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the largest output; the same weights on the same machine differ by far less
SECONDS = 1800
CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE", "TRANSFORMERS_CACHE")


def verify_model(run_dir: Path, auto_class: str, repo_id: str, revision: str) -> float:
    """Compares the outputs of a pushed model with those of its folder on a fixed image.

    The pushed one is loaded in a process of its own, without hf_vlm, with the code from the Hub and empty caches.

    Args:
        auto_class: Name of the Auto class that loads it.
        revision: Commit that was pushed.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ValueError: It does not load there, or gives something else.
    """
    import hf_vlm.registry  # noqa: F401  the Auto classes have to know this package's

    logger.info("Verifying: %s is loaded from the Hub in another process, without hf_vlm", repo_id)
    num_channels = _num_channels(run_dir)
    image = fixed_image(num_channels)
    expected = load_pushed.compute_outputs(auto_class, str(run_dir), image)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "image.npy", image)
        arguments = [auto_class, repo_id, revision, "image.npy", "outputs.npz"]
        run_clean([load_pushed.__file__, *arguments], Path(folder), what=f"{repo_id} does not load from the Hub")
        with np.load(Path(folder) / "outputs.npz") as found:
            difference = compare_outputs(expected, dict(found), repo_id, run_dir)
    logger.info("Verified: its outputs are those of %s (largest relative difference %.1e)", run_dir, difference)
    return difference


def verify_export(folder: Path, repo_id: str, revision: str) -> None:
    """Compares what the `predict.py` of a pushed export prints for a fixed image with what the local one prints.

    Raises:
        ValueError: It does not run there, or prints something else.
    """
    from huggingface_hub import snapshot_download
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "pushed"
        snapshot_download(repo_id, revision=revision, local_dir=cache)
        Image.fromarray(fixed_image(3)).save(Path(temporary) / "image.png")
        printed = [
            run_clean([str(source / "predict.py"), "image.png"], Path(temporary), what=f"{source} does not run")
            for source in (folder.absolute(), cache)
        ]
    if printed[0] != printed[1]:
        raise ValueError(f"{repo_id} on the Hub does not predict what {folder} does: push it again.")
    logger.info("Verified: %s from the Hub predicts what %s does", repo_id, folder)


def fixed_image(num_channels: int) -> np.ndarray[Any, Any]:
    """A smooth picture (96, 128, num_channels) uint8, always the same."""
    rows, columns, channels = np.ogrid[0:96, 0:128, 0:num_channels]
    waves = np.sin(rows / (5 + 2 * channels)) + np.cos(columns / (7 + channels)) + np.sin((rows + columns) / 23)
    return np.asarray(128 + 40 * waves).astype(np.uint8)


def compare_outputs(expected: Mapping[str, Any], found: Mapping[str, Any], repo_id: str, run_dir: Path) -> float:
    """The largest difference of outputs, relative to the largest; ValueError where it is above `TOLERANCE`."""
    if expected.keys() != found.keys():
        raise ValueError(f"{repo_id} on the Hub returns {sorted(found)}, but {run_dir} returns {sorted(expected)}.")
    largest = 0.0
    for name, value in expected.items():
        other = found[name]
        difference = np.inf
        if value.shape == other.shape:
            difference = float(np.abs(value - other).max(initial=0.0) / max(np.abs(value).max(initial=0.0), 1e-6))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{repo_id} on the Hub does not give what {run_dir} gives: {name} differs by {difference:.1e} of its "
                "largest value. Do not use it; push again, from the folder that was trained."
            )
        largest = max(largest, difference)
    return largest


def run_clean(argv: Sequence[str], folder: Path, *, what: str) -> str:
    """What a Python program prints that runs in a folder, with caches of its own and no source of ours in sight.

    Raises:
        ValueError: It fails; the message is `what` and the last line of its errors.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", *CACHE_VARIABLES)}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_TOKEN": token} if (token := get_token()) else {}
    try:
        done = start([sys.executable, *argv], folder, environment)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{what}: no result within {SECONDS} s.") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ValueError(f"{what}: {one_line(lines[-1])}")
    return done.stdout


def start(argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    return subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def _num_channels(run_dir: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(run_dir, trust_remote_code=False)
    return int(getattr(config, "backbone_config", config).num_channels)
