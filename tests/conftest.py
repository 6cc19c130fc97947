"""Programs in processes of their own, for what only a process of its own shows, and a Hub on loopback for them."""

import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from fork_server import ForkServer
from hub_server import Hub

ROOT = Path(__file__).parents[1]

# What programs import; nothing of hf_vlm, which some of them must not find.
LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.flop_counter", "torch.multiprocessing"),
    *("transformers.trainer", "transformers.pipelines", "transformers.models.auto"),
    *("transformers.image_processing_backends", "transformers.modeling_layers"),
    *("accelerate", "aiohttp", "cv2", "datasets", "datasets.distributed", "evaluate", "faster_coco_eval"),
    *("matplotlib.pyplot", "pandas", "PIL.ImageDraw", "scipy.optimize", "sklearn.linear_model", "upath"),
    "torchdata.stateful_dataloader",
)

# Whoever loads a model from the Hub has no hf_vlm: the blocker makes sure that none is found by accident.
BLOCKER = """
import sys
assert not any(name.partition(".")[0] == "hf_vlm" for name in sys.modules)
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vlm":
            raise ModuleNotFoundError("No module named 'hf_vlm' (blocked by the test)", name=name)
sys.meta_path.insert(0, NoPackage())
"""

RunProcess = Callable[..., str]


def pytest_configure() -> None:
    """Ctrl-C is heard by tests and their programs: a shell has what it starts in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempts what was imported from garbage collection, which every training runs at its end: 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no folder are not looked for on the Hub, which takes half a minute of retries; see `hub`."""
    if "hub" not in request.fixturenames:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub on loopback. There is one, for clients read its address when they are imported; `hub.clear()` empties it.

    It has `endpoint`, `tokens`, `repos`, `files(repo_id)` and the `requests` it served.
    """
    server = Hub().start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def program_environment(hub: Hub) -> Mapping[str, str]:
    """The environment of programs, whose Hub is on loopback and whose caches are in the folder they work in."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": "hf_home",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }


@pytest.fixture(scope="session")
def fork_server(
    program_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    """Runs programs in Python that need not import the libraries again, as `subprocess` does."""
    server = ForkServer(LIBRARIES, tmp_path_factory.mktemp("fork_server"), program_environment)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def run_process(fork_server: ForkServer, program_environment: Mapping[str, str]) -> RunProcess:
    """`run_process(code, folder, forbid_hf_vlm=False, token=None, **environment)` returns what the code printed.

    It works in `folder`, where no source of hf_vlm is in sight, with the loopback Hub. With an `environment` it is a
    fresh interpreter, for the libraries read theirs when they are imported; without, a fork of one that has done that.
    """

    def run(
        code: str, folder: Path, *, forbid_hf_vlm: bool = False, token: str | None = None, **environment: str
    ) -> str:
        settings = {**program_environment, "PYTHONPATH": "" if forbid_hf_vlm else str(ROOT), **environment}
        settings |= {"HF_TOKEN": token} if token else {}
        program = (BLOCKER if forbid_hf_vlm else "") + textwrap.dedent(code)
        fresh = functools.partial(subprocess.run, capture_output=True, text=True)
        start = fresh if environment else fork_server.run
        done = start([sys.executable, "-c", program], cwd=folder, env=settings, timeout=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
