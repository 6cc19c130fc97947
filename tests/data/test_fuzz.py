"""Broken files of all formats: none crashes or hangs a stream; each is read, or counted, or refused with its name."""

import json
import os
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz.py")


def fuzz(fork_server, target, seed, count, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(PROGRAM), target, str(seed), str(count), str(folder)]
    done = fork_server.run(words, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read"] + found["refused"] == count
    assert min(found.values()) > 0.1 * count  # the mutants are neither all harmless nor all hopeless
    return found


@pytest.mark.parametrize(("target", "count"), [("images", 800), ("annotations", 200)])
def test_mutated_files(fork_server, tmp_path, target, count):
    fuzz(fork_server, target, 0, count, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "count"), [("images", 20_000), ("annotations", 3_000)])
def test_many_mutated_files(fork_server, tmp_path, target, count):
    fuzz(fork_server, target, 1, count, tmp_path)
