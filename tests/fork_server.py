"""Python programs in processes forked from one that has imported the libraries: most of a short program's time.

python fork_server.py FILE_DESCRIPTOR_OF_A_SOCKET MODULE...
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class ForkedProcess:
    """As much of `subprocess.Popen` as the tests need."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.request({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the process {self.pid} has not ended in {timeout} s")
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Imports `modules` once; what they read of `environment` when imported is the same for all programs."""

    def __init__(self, modules: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(theirs.fileno()), *modules]
        with theirs:
            self.process = subprocess.Popen(words, cwd=folder, env=environment, pass_fds=[theirs.fileno()])

    def request(self, content: dict[str, Any], *, files: Sequence[int] = ()) -> Any:
        socket.send_fds(self.socket, [json.dumps(content).encode()], files)
        return json.loads(self.socket.recv(1024) or b'"the fork server has ended"')

    def popen(
        self,
        words: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = False,
    ) -> ForkedProcess:
        """As `subprocess.Popen` of a command that begins with `sys.executable`."""
        if words[0] != sys.executable:
            raise ValueError(f"the fork server runs programs in Python, not {words[0]}")
        settings = {"cwd": str(cwd or Path.cwd()), "env": {**(env or os.environ)}}
        settings["start_new_session"] = start_new_session
        files = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        return ForkedProcess(self, self.request({"words": list(words[1:]), **settings}, files=files))

    def run(self, words: Sequence[str], *, timeout: float = 300.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run(words, capture_output=True, text=True)`."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            code = self.popen(words, stdout=output, stderr=errors, **options).wait(timeout)
            printed = [(file.seek(0), file.read())[1] for file in (output, errors)]
        return subprocess.CompletedProcess(words, code, *printed)

    def stop(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


def serve(connection: socket.socket) -> None:
    """Answers each request until there are no more; a forked process becomes its program instead."""
    while True:
        content, files, *_ = socket.recv_fds(connection, 2**20, 2)
        if not content:
            return
        request = json.loads(content)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            connection.close()
            become(files=files, **request)
        for file in files:
            os.close(file)
        connection.send(json.dumps(answer).encode())


def become(words: list[str], cwd: str, env: dict[str, str], start_new_session: bool, files: list[int]) -> None:
    """Continues as `python WORDS`."""
    if start_new_session:
        os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [str(Path(words[0]).parent) if words[0] not in ("-c", "-m") else cwd]
    sys.path[1:1] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    code = run_program(words)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to clear away all that was imported takes seconds


def run_program(words: list[str]) -> int:
    """The code that Python would exit with."""
    try:
        if words[0] == "-c":
            code = words.pop(1)
            sys.argv = words
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            sys.stderr.write(f"{error.code}\n")
            return 1
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # what was imported is no garbage in any of the programs
    serve(socket.socket(fileno=int(sys.argv[1])))
