"""Do one thing in a process of its own, whose memory is its own and whose end harms nobody."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.errors import FtlevelError, Interrupted, RunError, is_out_of_memory

_LONGEST_REASON = 300  # characters


class StopWithParent(TrainerCallback):
    """End a run as SIGTERM does, with a checkpoint, when the process that asked for it is gone."""

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers calls it so
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Look for the parent."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            signal.raise_signal(signal.SIGTERM)


def do_apart(prepare: Callable[[], Any], work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns of `arguments`, computed in another process.

    A KeyboardInterrupt here is passed on as SIGTERM, and waits for what that process keeps.

    Args:
        prepare: called there first.
        work: a function of a module.
        arguments: that can be pickled, as what it returns.

    Raises:
        RunError: it failed; the message is its own.
        Interrupted: it was told to end.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # libraries are imported once, and no thread has started there
        context.set_forkserver_preload([prepare.__module__, work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process: Any = context.Process(target=_child, args=(sender, prepare, work, arguments))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        verdict, answer = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(_describe_end(process.exitcode)) from None
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    finally:
        receiver.close()
    process.join()
    if verdict == "interrupted":
        raise Interrupted(answer)
    if verdict == "failed":
        raise RunError(answer)
    return answer


def _describe_end(code: int | None) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "its process was killed, as the kernel does when memory runs out."
    return f"its process ended with code {code} and said nothing."


def _child(
    sender: Connection, prepare: Callable[[], Any], work: Callable[..., Any], arguments: Any
) -> None:
    """Send ("done", result), ("failed", message) or ("interrupted", message)."""
    if hasattr(os, "setsid"):  # Ctrl-C reaches the parent alone, which passes it on
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    try:
        reply = ("done", work(*arguments))
    except Interrupted as error:
        reply = ("interrupted", str(error))
    except FtlevelError as error:
        reply = ("failed", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on, and it is shown
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        reply = ("failed", f"{kind}: {' '.join(str(error).split())[:_LONGEST_REASON]}")
    with contextlib.suppress(BrokenPipeError):  # a second signal has ended who asked
        sender.send(reply)
