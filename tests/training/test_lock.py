"""Two runs do not train in one folder; a run that was killed leaves no lock."""

import errno
import fcntl
import json
import socket
import subprocess
import sys

import pytest

from hf_vlm.training.lock import LOCK_FILE, run_lock
from hf_vlm.training.run import pretrain

HOLDER = """
import fcntl, json, os, socket, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), file=file, flush=True)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Another process that has the lock of the test's folder."""
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_names_the_first_and_changes_nothing(make_recipe, tmp_path, hold):
    recipe = make_recipe("mae", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"in use: process {hold.pid} on {socket.gethostname()} trains there"):
        pretrain(recipe)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    hold.kill()
    hold.wait()
    assert (tmp_path / LOCK_FILE).is_file()  # which stays, and means nothing
    pretrain(recipe | {"max_steps": 1, "probe_steps": 0})
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_was_deleted_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Else two runs would have locks of two files of one name."""
    stock, calls = fcntl.lockf, []

    def lockf(descriptor, operation):
        stock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path):
        assert len(calls) == 2
        assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("kind", ["system", "file system"])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog, kind):
    def lockf(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    if kind == "system":
        monkeypatch.setattr("hf_vlm.training.lock.fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(tmp_path):
        assert f"{tmp_path} is not locked: " in caplog.text
        assert f"the {kind} has" in caplog.text.replace("this system", "the system")
