"""What `hf-vlm doctor` finds, shown by installations and machines that are made up."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_vlm
from hf_vlm.cli.main import main
from hf_vlm.deploy.doctor import examine, hub, machine, packages
from hf_vlm.deploy.doctor.finding import Finding

ROOT = Path(__file__).parents[2]
REQUIREMENTS = [
    "torch>=2.11",
    "transformers<6,>=5.23",
    "pillow>=12",
    'onnx>=1.23; extra == "export"',
    'trackio>=0.40; extra == "log"',
    'pytest; extra == "dev"',
    'hf_vlm[export]; extra == "dev"',
    'tomli; python_version < "3.11"',
]


def levels(findings):
    return [finding.level for finding in findings]


def test_versions_out_of_bounds_and_missing_packages_are_named_with_the_command_that_fixes_them():
    versions = {"torch": "2.13.0+cpu", "transformers": "4.57.1"}
    wrong, missing, ok = packages.check_requirements(REQUIREMENTS, versions.get)
    assert wrong.text == "transformers 4.57.1 is installed, but hf_vlm needs <6,>=5.23"
    assert wrong.advice == 'pip install "transformers<6,>=5.23"'
    assert (missing.text, missing.advice) == ("pillow is not installed", 'pip install "pillow>=12"')
    assert levels((wrong, missing, ok)) == ["wrong", "wrong", "ok"]
    assert "torch 2.13.0+cpu and 0 others" in ok.text
    versions |= {"transformers": "5.24.0.dev0", "pillow": "12.3"}
    assert levels(packages.check_requirements(REQUIREMENTS, versions.get)) == ["ok"]


def test_extras_are_listed_but_not_that_of_developers():
    finding = packages.check_extras(["dev", "export", "log"], REQUIREMENTS, {"onnx": "1.23.2", "trackio": "0.1"}.get)
    assert finding == Finding("ok", "extras: export; not installed: log", 'pip install "hf_vlm[log]"')


def test_python_has_bounds_too():
    assert levels(packages.check_python(">=3.11", "3.10.13")) == ["wrong"]
    assert levels(packages.check_python(">=3.11", "3.14.0")) == []


def test_owners_of_cv2():
    both = {"opencv-python": "5.0", "opencv-python-headless": "5.0"}
    assert levels(packages.check_opencv({"opencv-python-headless": "5.0"}.get, None)) == []
    (finding,) = packages.check_opencv(both.get, None)
    assert finding.level == "warning"
    assert "opencv-python and opencv-python-headless write the same folder" in finding.text
    (finding,) = packages.check_opencv(both.get, "ImportError: libGL.so.1: cannot open")
    assert finding.level == "wrong"
    assert finding.advice == (
        "pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python-headless"
    )


@pytest.mark.parametrize(
    ("torch", "torchvision", "pinned", "text"),
    [
        ("2.13.0+cpu", None, [], None),
        ("2.13.0+cpu", "0.28.0+cpu", ["torch==2.13.0"], None),
        ("2.13.0", "0.28.0+cu130", ["torch==2.13.0"], None),
        ("2.13.0", "0.27.0", ["torch==2.12.0"], "was built for torch 2.12.0, but torch is 2.13.0"),
        ("2.13.0+cpu", "0.28.0", ["torch==2.13.0"], "are builds for different devices"),
    ],
)
def test_torchvision_of_another_torch(torch, torchvision, pinned, text):
    finding = packages.torchvision_mismatch(torch, torchvision, pinned)
    if text is None:
        assert finding is None
    else:
        assert finding.level == "wrong"
        assert text in finding.text
        assert finding.advice == "pip uninstall -y torchvision"


def test_devices_as_another_process_sees_them(monkeypatch, tmp_path):
    """The program that asks torch runs with a torch and a torchvision that are made up."""
    (tmp_path / "torch.py").write_text(
        "import types\n"
        "cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 1,\n"
        "    mem_get_info=lambda index: (100 * 10**9, 150 * 10**9), get_device_name=lambda index: 'H200')\n"
    )
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wrong, device = packages.check_probe(packages.probe(), has_accelerator=True)
    assert wrong.level == "wrong"
    assert "operator torchvision::nms does not exist" in wrong.text
    assert device == Finding("ok", "H200, 100.0 of 150.0 GB free")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    (finding,) = packages.check_probe(packages.probe(), has_accelerator=True)
    assert "libcudnn.so.9" in finding.text
    assert finding.level == "wrong"


def test_an_accelerator_that_torch_does_not_use():
    found = {"devices": [], "warnings": ["The NVIDIA driver on your system is too old\nmore"]}
    (finding,) = packages.check_probe(found, has_accelerator=True)
    assert (finding.level, finding.text.endswith("driver on your system is too old")) == ("wrong", True)
    assert packages.torch_cuda() == __import__("torch").version.cuda


def test_processor_and_container(tmp_path):
    flags = frozenset({"avx2", "avx512f"})
    assert machine.check_processor(8, None, flags, None) == Finding("ok", "8 CPU cores (AVX2, AVX-512)")
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    quota = machine.cpu_quota(tmp_path)
    finding = machine.check_processor(8, quota, flags, None)
    assert (quota, finding.level, finding.advice) == (2.0, "warning", "export OMP_NUM_THREADS=2")
    assert machine.check_processor(8, quota, flags, "2").level == "ok"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    assert machine.cpu_quota(tmp_path / "nothing") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n")
    assert machine.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "amx_bf16"}
    (tmp_path / "memory.max").write_text("2000000000\n")
    total, limit = machine.total_memory(tmp_path)
    assert (total, limit) == (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 2_000_000_000)
    assert machine.check_memory(total, limit).level == "warning"
    assert machine.check_memory(64_000_000_000, None) == Finding("ok", "64.0 GB of memory")


def test_shared_memory_and_open_files():
    assert machine.check_shared_memory(67_108_864).level == "warning"
    assert machine.check_shared_memory(8_000_000_000).level == "ok"
    assert machine.check_open_files(256).advice == "ulimit -n 4096"
    assert machine.check_open_files(20_000).text == "20,000 open files at most"


def test_disks_and_caches(tmp_path, monkeypatch):
    for free, level in ((5e8, "wrong"), (5e9, "warning"), (5e10, "ok")):
        monkeypatch.setattr(machine, "free_space", lambda path, free=free: free)
        assert machine.check_disk("runs", tmp_path / "not" / "there").level == level
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "a").write_bytes(bytes(3_000_000))
    (tmp_path / "hub" / "link").symlink_to(tmp_path / "hub" / "blobs" / "a")
    size, is_complete = machine.folder_size(tmp_path, time.monotonic() + 10)
    assert is_complete
    assert size - 3_000_000 < 1000
    assert machine.folder_size(tmp_path, time.monotonic() - 1) == (0, False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path
    assert machine.cache_folder().is_dir()
    assert [finding.text for finding in machine.check_cache(tmp_path)][1].startswith("3 MB of downloads in")


def test_the_hub_is_asked_once_and_no_token_is_shown(run_process, tmp_path):
    code = """
    import os
    from hf_vlm.deploy.doctor.hub import HubCheck
    for token in ("owner", "", "no such token"):
        os.environ["HF_TOKEN"] = token
        (finding,) = HubCheck.start().findings()
        print(finding.level, finding.text, finding.advice)
    """
    lines = run_process(code, tmp_path, token="owner").splitlines()
    assert lines[0].endswith("answers, logged in as me ")
    assert lines[1].startswith("ok the Hub at http://127.0.0.1")
    assert lines[1].endswith("no token: private and gated repositories and push need one hf auth login")
    assert lines[2].endswith("but does not accept the token hf auth login, or another HF_TOKEN")
    assert "no such token" not in "".join(lines)


def test_a_hub_that_does_not_answer_costs_a_bounded_time(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    monkeypatch.setattr(hub, "ask_hub", lambda: time.sleep(5))
    for name in hub.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    started = time.perf_counter()
    (finding,) = hub.HubCheck.start().findings()
    assert time.perf_counter() - started < 2
    assert (finding.level, "no answer within" in finding.text) == ("warning", True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(hub, "ask_hub", lambda: socket.create_connection(closed.getsockname()))
        monkeypatch.setattr(hub, "SECONDS", 3)
        (finding,) = hub.HubCheck.start().findings()
    assert "cannot be reached (ConnectionRefusedError" in finding.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = hub.HubCheck.start().findings()
    assert finding == Finding(
        "warning", "HF_HUB_OFFLINE set: nothing is read from or sent to the Hub", "unset HF_HUB_OFFLINE"
    )


def test_the_last_line_and_the_status_say_whether_all_is_well(monkeypatch, capsys):
    good, doubtful = Finding("ok", "fine"), Finding("warning", "a name\x1b[2J", "do this")
    monkeypatch.setattr(examine, "examine", lambda: iter([good, doubtful]))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["ok      fine", r"warning a name\x1b[2J", "          do this", "ok, with 1 warning"]
    monkeypatch.setattr(examine, "examine", lambda: iter([good, Finding("wrong", "no torch", "pip install torch")]))
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert printed.out.endswith("wrong   no torch\n          pip install torch\n")
    assert printed.err == "hf-vlm doctor: no torch\n"


def test_commands_without_a_model_start_without_torch_and_doctor_needs_no_package(tmp_path):
    """In a process in which nothing but the standard library can be imported."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "hf-vlm"
class NoPackages:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root != "hf_vlm" and root not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NoPackages())
from hf_vlm.cli.main import main
assert main(["--help"]) == 0
import os
os.environ["HF_HUB_OFFLINE"] = "1"
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "hf_vlm runs from its sources and is not installed" in done.stderr
    assert "open files at most" in done.stdout


def test_the_command_is_recognised_however_it_is_started(monkeypatch):
    for argv, orig_argv, expected in (
        (["/usr/bin/hf-vlm", "doctor"], ["python", "/usr/bin/hf-vlm", "doctor"], True),
        (["-m", "doctor"], ["python", "-X", "utf8", "-m", "hf_vlm.cli", "doctor"], True),
        (["train.py", "hf_vlm.cli"], ["python", "train.py", "hf_vlm.cli"], False),
        (["-m"], ["python", "-m", "pytest"], False),
        ([], [], False),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig_argv)
        assert hf_vlm._is_command() is expected
