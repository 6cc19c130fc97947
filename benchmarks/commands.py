"""Commands of the package, as a user types them, on one core."""

import os
import subprocess
import sys
from typing import IO

__all__ = ["hf_vlm"]


def hf_vlm(*words: str, log: IO[str] | None = None) -> None:
    """Runs `hf-vlm` with these words; what it prints goes to `log`, if there is one.

    Raises:
        CalledProcessError: The command failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "hf_vlm.cli", *words], env=environment, stdout=log, stderr=log, check=True)
