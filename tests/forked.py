"""Processes of the `ftlevel` program, forked from a process that has all imports.

Like `python -m ftlevel`, a process has its own arguments, environment, directory, streams, signals
and exit code, but it starts in 0.1 s instead of 5 s. Ranks of `--num-processes` and children of
multiprocessing are forked, too. Tests of the start itself need a real interpreter. The workers of
a test session share the processes that fork. `python forked.py run ARGUMENTS` is for shell scripts.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

from filelock import FileLock

from ftlevel.safe_io import python_command

ADDRESS = "FTLEVEL_TESTS_FORKS"  # path of the sockets of the forking processes, without suffix
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_IMPORTED = ("libraries", "ftlevel")
_PROGRAMS = ([sys.executable, "-m", "ftlevel"], python_command("ftlevel"))  # torchrun, ftlevel
_FORK_CONTEXT = multiprocessing.get_context("fork")
_processes: list[subprocess.Popen[bytes]] = []
_servers: dict[str, socket.socket] = {}
_one_request = threading.Lock()


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
        """Start `ftlevel arguments`, or call a function, which may return an exit code.

        Streams and other options are those of `subprocess.Popen(text=True)`.

        Args:
            arguments: of the command line.
            call: module-level function and its arguments, instead of the command line.
            imported: `ftlevel`, or `libraries` for its dependencies only.
            cwd: working directory.
            env: environment variables.
            stdin: empty by default; PIPE, or a descriptor.
            stdout: stream.
            stderr: stream.
        """
        self.args = [str(a) for a in arguments]
        self.returncode: int | None = None
        self._imported = imported
        descriptors: list[int] = []
        self.stdin: IO[str] | None = None
        if stdin == subprocess.PIPE:
            read, write = os.pipe()
            descriptors.append(read)
            self.stdin = os.fdopen(write, "w", encoding="utf-8")
        elif stdin is not None:
            read = stdin
        else:
            descriptors.append(read := os.open(os.devnull, os.O_RDONLY))
        self.stdout, out = _stream(stdout, 1, descriptors)
        self.stderr, err = (
            _stream(stderr, 2, descriptors) if stderr != subprocess.STDOUT else (None, out)
        )
        request = {
            "arguments": self.args, "call": pickle.dumps(call).hex() if call else None,
            "cwd": str(cwd or Path.cwd()), "env": {**(os.environ if env is None else env)},
            "path": sys.path,
        }  # fmt: skip
        server = connect(imported)
        with _one_request:
            socket.send_fds(server, [_encode_message(request)], [read, out, err])
            self.pid = int(_receive(server))
        for end in descriptors:
            os.close(end)

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal, or None while the process runs."""
        if self.returncode is None:
            server = connect(self._imported)
            with _one_request:
                server.sendall(_encode_message({"wait": self.pid}))
                self.returncode = _receive(server)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended, and return its exit code."""
        end = time.monotonic() + (timeout or 600)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 600)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their ends, wait, and return their text."""
        output = {1: "", 2: ""}

        def read(number: int, stream: IO[str] | None) -> None:
            if stream is not None:
                with stream:
                    output[number] = stream.read()

        readers = [
            threading.Thread(target=read, args=pair, daemon=True)
            for pair in ((1, self.stdout), (2, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return output[1], output[2]

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `ftlevel arguments` to its end, like `subprocess.run` with `capture_output`."""
    process = Forked(arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    result = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    assert result.returncode == 0 or not check, err
    return result


def run_slowly(arguments: Sequence[str], seconds: float = 0.1) -> NoReturn:
    """Run the program with a sleep in each step, so that a signal arrives during a tiny run."""
    from ftlevel.training.callbacks import Report

    original_report = Report.on_step_end

    def sleep_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original_report(self, *args, **kwargs)

    Report.on_step_end = sleep_and_report  # type: ignore[method-assign]
    run_as_program(arguments, os.environ.copy())


def _stream(stream: Any, number: int, descriptors: list[int]) -> tuple[IO[str] | None, int]:
    """Return the reader of a stream, if it is a pipe, and its descriptor in the process."""
    if stream == subprocess.PIPE:
        read, write = os.pipe()
        descriptors.append(write)
        return os.fdopen(read, encoding="utf-8"), write
    if stream == subprocess.DEVNULL:
        descriptors.append(os.open(os.devnull, os.O_WRONLY))
        return None, descriptors[-1]
    if isinstance(stream, int):
        return None, stream
    return None, number if stream is None else stream.fileno()


def _encode_message(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(server: socket.socket) -> Any:
    message = b""
    while not message.endswith(b"\n"):
        chunk = server.recv(1 << 10)
        assert chunk, "the process that forks has ended"
        message += chunk
    return json.loads(message)


def connect(imported: str) -> socket.socket:
    """Return the connection to a forking process; the first call starts both processes."""
    with _one_request:
        return _connections()[imported]


def _connections() -> dict[str, socket.socket]:
    if not _servers:
        if ADDRESS not in os.environ:
            os.environ[ADDRESS] = f"{tempfile.mkdtemp()}/forks"
        with FileLock(f"{os.environ[ADDRESS]}.lock"):
            try:
                _servers.update(_connect_both())
            except (FileNotFoundError, ConnectionRefusedError):
                _start_servers()
                _servers.update(_connect_both())
    return _servers


def _connect_both() -> dict[str, socket.socket]:
    connections = {}
    for name in _IMPORTED:
        connections[name] = socket.socket(socket.AF_UNIX)
        connections[name].connect(f"{os.environ[ADDRESS]}.{name}")
    return connections


def _start_servers() -> None:
    """Start the forking processes, which end after their last connection."""
    listeners = []
    for name in _IMPORTED:
        path = Path(f"{os.environ[ADDRESS]}.{name}")
        path.unlink(missing_ok=True)
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(path))
        listeners[-1].listen()
    numbers = [listener.fileno() for listener in listeners]
    _processes.append(subprocess.Popen(
        [sys.executable, __file__, *map(str, numbers)], pass_fds=numbers, stdin=subprocess.DEVNULL,
    ))  # fmt: skip
    for listener in listeners:
        listener.close()


def _serve(libraries_listener: socket.socket, ftlevel_listener: socket.socket) -> None:
    """Import the libraries, and ftlevel in a fork of this process; fork for each request.

    Files are not flushed, as in the tests' own process: no test turns the power off.
    """
    gc.disable()  # as `heavy_imports` does
    os.fsync = lambda _: None  # type: ignore[assignment]
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # as `import ftlevel` does
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401
    import transformers.trainer

    listener, unused = libraries_listener, ftlevel_listener
    if os.fork() == 0:
        listener, unused = ftlevel_listener, libraries_listener
        import transformers.models.llama.modeling_llama  # noqa: F401

        import ftlevel.cli.screen
        import ftlevel.cli.train
        import ftlevel.commands.train
        import ftlevel.extras.report.page  # noqa: F401
    unused.close()
    _serve_forks(listener)


def _serve_forks(listener: socket.socket) -> None:
    """Fork a process for each request, until the last connection is closed.

    Their garbage collectors skip what is imported here, as the program's own does.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    running: dict[socket.socket, set[int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection: Any = key.fileobj
                if connection is listener:
                    connection = listener.accept()[0]
                    running[connection] = set()
                    selector.register(connection, selectors.EVENT_READ)
                elif not _serve_request(connection, running[connection], (listener, *running)):
                    selector.unregister(connection)
                    connection.close()
                    for pid in running.pop(connection):  # of a failed test
                        os.kill(pid, signal.SIGKILL)
                    if not running:
                        return


def _serve_request(
    connection: socket.socket, running: set[int], inherited: Sequence[socket.socket]
) -> bool:
    """Fork a process, or reply whether one has ended; return False if the connection is closed."""
    text, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 4)
    while text and not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    if not text:
        return False
    request = json.loads(text)
    if "wait" in request:
        ended, status = os.waitpid(request["wait"], os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
        running.discard(ended)
        connection.sendall(_encode_message(code))
        return True
    pid = os.fork()
    if pid == 0:
        for unused in inherited:
            unused.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        for descriptor in descriptors:
            os.close(descriptor)
        os.chdir(request["cwd"])
        if request["call"]:
            paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
            sys.path[:] = [*filter(None, paths), *request["path"]]
            _run_and_exit(partial(_call_pickled, request["call"]), request["env"])
        run_as_program(request["arguments"], request["env"])
    for descriptor in descriptors:
        os.close(descriptor)
    running.add(pid)
    connection.sendall(_encode_message(pid))
    return True


def _call_pickled(pickled: str) -> None:
    work, arguments = pickle.loads(bytes.fromhex(pickled))
    raise SystemExit(work(*arguments))


def run_as_program(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run the program in this process and exit."""
    _fork_children()
    sys.argv = ["ftlevel", *arguments]
    _run_and_exit(
        lambda: runpy.run_module("ftlevel", run_name="__main__", alter_sys=True), environment
    )


def run_torchrun(arguments: Sequence[str]) -> None:
    """Run torchrun in this process; its ranks are forked."""
    _fork_children()
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main

    setattr(subprocess_handler, "Popen", subprocess.Popen)  # noqa: B010 - mypy sees no export
    main(list(arguments))


def _fork_children() -> None:
    """Fork the ranks and the multiprocessing children that this process starts."""
    subprocess.Popen = _ForkedRank  # type: ignore[misc]
    multiprocessing.get_context = lambda _=None: _FORK_CONTEXT  # type: ignore[assignment]


def _run_and_exit(work: Callable[[], Any], environment: Mapping[str, str]) -> NoReturn:
    """Call `work` in this forked process and exit like an interpreter."""
    code = 1
    try:
        for number in HANDLED_SIGNALS:  # as in a terminal, also under nohup
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120  # like Python
        os._exit(code)


class _ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    """A child process of the program; ranks of its run are forks of this process."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        words = [word for word in args if word != "-u"] if isinstance(args, list | tuple) else []
        if words[:3] not in _PROGRAMS:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        close_fds, env, start_new_session = rest[0], rest[3], rest[18]
        self.pid = os.fork()
        if self.pid == 0:
            if close_fds:
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            run_as_program(words[3:], os.environ.copy() if env is None else env)
        self._child_created = True


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(Forked(sys.argv[2:], stdin=0).wait())
    _serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:]))
