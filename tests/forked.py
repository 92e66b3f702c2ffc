"""Processes of the `ftlevel` program, forked from one that has all imports.

A process has its own arguments, environment, directory, streams, signals and exit code, as
`python -m ftlevel` has, and starts in 0.1 s instead of 5 s. The ranks that it starts for
`--num-processes` are forked, too, and so are the children that multiprocessing starts. Tests of the
start itself need a real interpreter.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PROGRAM = [sys.executable, "-m", "ftlevel"]
_FORKS = multiprocessing.get_context("fork")
_processes: list[subprocess.Popen[bytes]] = []
_servers: dict[str, socket.socket] = {}


class Forked:
    """A process of the program, with the methods of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        call: tuple[Callable[..., Any], Sequence[Any]] | None = None,
        imported: str = "ftlevel",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> None:
        """Start `ftlevel arguments`, or a function, which may return an exit code.

        Streams and the rest are as of `subprocess.Popen(text=True)`.

        Args:
            arguments: of the command line.
            call: function of a module and its arguments, in place of the command line.
            imported: `ftlevel`, or `libraries`: only what it imports.
            cwd: working directory.
            env: environment variables.
            stdin: nothing by default.
            stdout: stream.
            stderr: stream.
        """
        self.args = [str(a) for a in arguments]
        self.returncode: int | None = None
        self._imported = imported
        ends: list[int] = []
        self.stdin: IO[str] | None = None
        if stdin == subprocess.PIPE:
            read, write = os.pipe()
            ends.append(read)
            self.stdin = os.fdopen(write, "w", encoding="utf-8")
        else:
            ends.append(read := os.open(os.devnull, os.O_RDONLY))
        self.stdout, out = _stream(stdout, 1, ends)
        self.stderr, err = _stream(stderr, 2, ends) if stderr != subprocess.STDOUT else (None, out)
        request = {
            "arguments": self.args, "call": pickle.dumps(call).hex() if call else None,
            "cwd": str(cwd or Path.cwd()), "env": {**(os.environ if env is None else env)},
            "path": sys.path,
        }  # fmt: skip
        server = _started_server(imported)
        socket.send_fds(server, [_packed(request)], [read, out, err])
        self.pid = int(_answer(server))
        for end in ends:
            os.close(end)

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal, or None while it runs."""
        if self.returncode is None:
            server = _started_server(self._imported)
            server.sendall(_packed({"wait": self.pid}))
            self.returncode = _answer(server)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit code."""
        end = time.monotonic() + (timeout or 600)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 600)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their ends, wait, and return what they said."""
        said = {1: "", 2: ""}

        def read(number: int, stream: IO[str] | None) -> None:
            if stream is not None:
                with stream:
                    said[number] = stream.read()

        readers = [
            threading.Thread(target=read, args=pair, daemon=True)
            for pair in ((1, self.stdout), (2, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return said[1], said[2]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `ftlevel arguments` to its end, as `subprocess.run` with `capture_output`."""
    process = Forked(arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    assert done.returncode == 0 or not check, err
    return done


def run_slowly(arguments: Sequence[str], seconds: float = 0.1) -> NoReturn:
    """Be the program, which sleeps in each step, so that a signal finds a tiny run at its work."""
    from ftlevel.training.callbacks import Report

    report = Report.on_step_end

    def sleep_and_report(self: Any, *given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return report(self, *given, **named)

    Report.on_step_end = sleep_and_report  # type: ignore[method-assign]
    become(arguments, os.environ.copy())


def _stream(given: Any, number: int, ends: list[int]) -> tuple[IO[str] | None, int]:
    """Return the reader of a stream, if it is a pipe, and its descriptor in the process."""
    if given == subprocess.PIPE:
        read, write = os.pipe()
        ends.append(write)
        return os.fdopen(read, encoding="utf-8"), write
    if given == subprocess.DEVNULL:
        ends.append(os.open(os.devnull, os.O_WRONLY))
        return None, ends[-1]
    return None, number if given is None else given.fileno()


def _packed(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _answer(server: socket.socket) -> Any:
    answer = b""
    while not answer.endswith(b"\n"):
        part = server.recv(1 << 10)
        assert part, "the process that forks has ended"
        answer += part
    return json.loads(answer)


def _started_server(imported: str) -> socket.socket:
    """Return the connection to a process that forks; the first call starts both."""
    if not _servers:
        pairs = {name: socket.socketpair() for name in ("libraries", "ftlevel")}
        numbers = [theirs.fileno() for _, theirs in pairs.values()]
        _processes.append(subprocess.Popen(
            [sys.executable, __file__, *map(str, numbers)], pass_fds=numbers,
            stdin=subprocess.DEVNULL,
        ))  # fmt: skip
        for name, (own, theirs) in pairs.items():
            theirs.close()
            _servers[name] = own
            assert _answer(own) == "ready"
    return _servers[imported]


def _serve(libraries: socket.socket, whole: socket.socket) -> None:
    """Import the libraries, and in a fork of this process ftlevel; fork for each request."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # as `import ftlevel` does
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401
    import transformers.trainer  # noqa: F401

    connection, other = libraries, whole
    if os.fork() == 0:
        connection, other = whole, libraries
        import ftlevel.commands.train  # noqa: F401
    other.close()
    _serve_forks(connection)


def _serve_forks(connection: socket.socket) -> None:
    """Fork a process for each request, until the tests have ended."""
    connection.sendall(_packed("ready"))
    running: set[int] = set()
    while True:
        text, given, *_ = socket.recv_fds(connection, 1 << 16, 4)
        while text and not text.endswith(b"\n"):
            text += connection.recv(1 << 16)
        if not text:
            for pid in running:  # of a test that has failed
                os.kill(pid, signal.SIGKILL)
            return
        request = json.loads(text)
        if "wait" in request:
            ended, status = os.waitpid(request["wait"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            running.discard(ended)
            connection.sendall(_packed(code))
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            for number, descriptor in enumerate(given):
                os.dup2(descriptor, number)
            for descriptor in given:
                os.close(descriptor)
            os.chdir(request["cwd"])
            if request["call"]:
                own = request["env"].get("PYTHONPATH", "").split(os.pathsep)
                sys.path[:] = [*filter(None, own), *request["path"]]
                _end_after(partial(_call, request["call"]), request["env"])
            become(request["arguments"], request["env"])
        for descriptor in given:
            os.close(descriptor)
        running.add(pid)
        connection.sendall(_packed(pid))


def _call(pickled: str) -> None:
    work, arguments = pickle.loads(bytes.fromhex(pickled))
    raise SystemExit(work(*arguments))


def become(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the program from now on."""
    subprocess.Popen = _ForkedRank  # type: ignore[misc]
    multiprocessing.get_context = lambda _=None: _FORKS  # type: ignore[assignment]
    sys.argv = ["ftlevel", *arguments]
    _end_after(
        lambda: runpy.run_module("ftlevel", run_name="__main__", alter_sys=True), environment
    )


def _end_after(work: Callable[[], Any], environment: Mapping[str, str]) -> NoReturn:
    """Do the work of this forked process, and end it as an interpreter ends."""
    code = 1
    try:
        for number in HANDLED:  # as in a terminal, though the tests may run under nohup
            own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, own)
        os.environ.clear()
        os.environ.update(environment)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120  # as Python exits then
        os._exit(code)


class _ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    """A process that the program starts: where that is a rank of its run, a fork of itself."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *more: Any) -> None:
        if not isinstance(args, list) or args[:3] != _PROGRAM:
            super()._execute_child(args, executable, preexec_fn, *more)  # type: ignore[misc]
            return
        env = more[3]
        self.pid = os.fork()
        if self.pid == 0:
            if preexec_fn is not None:
                preexec_fn()
            become(args[3:], os.environ.copy() if env is None else env)
        self._child_created = True


if __name__ == "__main__":
    _serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:]))
