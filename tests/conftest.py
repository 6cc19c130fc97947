"""Processes of their own, for what only a fresh interpreter shows."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Whoever loads a model from the Hub has no hf_vlm: the blocker makes sure that none is found by accident.
BLOCKER = """
import sys
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vlm":
            raise ModuleNotFoundError("No module named 'hf_vlm' (blocked by the test)", name=name)
sys.meta_path.insert(0, NoPackage())
"""

RunProcess = Callable[..., str]


@pytest.fixture(scope="session")
def run_process() -> RunProcess:
    """`run_process(code, folder, forbid_hf_vlm=False, **environment)` returns what the code printed.

    It works in `folder`, where no source of hf_vlm is in sight, without the settings of the real Hub.
    """

    def run(code: str, folder: Path, *, forbid_hf_vlm: bool = False, **environment: str) -> str:
        settings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "" if forbid_hf_vlm else str(ROOT),
            **environment,
        }
        program = (BLOCKER if forbid_hf_vlm else "") + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
