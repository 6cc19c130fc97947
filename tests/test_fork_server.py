"""A forked program ends, prints and gets its arguments as a fresh interpreter's."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("end", "returncode"),
    [("", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1), ("import os; os.abort()", -signal.SIGABRT)],
)
def test_programs_end_as_those_of_a_fresh_interpreter(fork_server, tmp_path, end, returncode):
    words = [sys.executable, "-c", f"import sys; print(__name__, sys.argv, flush=True); {end}", "a", "b"]
    options = {"cwd": tmp_path, "env": {**os.environ}}
    fresh = subprocess.run(words, capture_output=True, text=True, **options)
    forked = fork_server.run(words, **options)
    assert forked.returncode == fresh.returncode == returncode
    assert forked.stdout == fresh.stdout == "__main__ ['-c', 'a', 'b']\n"
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.parametrize("as_module", [False, True])
def test_files_and_modules_are_run(fork_server, tmp_path, as_module):
    (tmp_path / "program.py").write_text("import os, sys; print(__name__, sys.argv[1:], sys.path[0], os.getcwd())")
    words = [sys.executable, *(["-m", "program"] if as_module else [str(tmp_path / "program.py")]), "a"]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": ""}}
    fresh = subprocess.run(words, capture_output=True, text=True, **options)
    assert fork_server.run(words, **options).stdout == fresh.stdout == f"__main__ ['a'] {tmp_path} {tmp_path}\n"


def test_the_libraries_are_imported_and_the_package_is_not(fork_server, tmp_path):
    code = "import sys; print([name in sys.modules for name in ('torch', 'transformers', 'datasets', 'hf_vlm')])"
    printed = fork_server.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": ""}).stdout
    assert printed == "[True, True, True, False]\n"


def test_a_program_is_killed_and_another_ends_meanwhile(fork_server, tmp_path):
    endless = fork_server.popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path)
    assert fork_server.run([sys.executable, "-c", ""], cwd=tmp_path).returncode == 0
    assert endless.poll() is None
    endless.terminate()
    assert endless.wait() == -signal.SIGTERM
