"""Runs `"module:function"` with JSON arguments in a child process that may crash, hang or leak without hurting us.

    stream("package.module:function", {"n": 3}, step_timeout_s=30)   yields each dict the function yields or returns

The child is its own process group. Each dict is one JSON line on a pipe of its own (not stdout) and is handed over when
produced, so what came before a crash is kept; a function with a parameter `emit` is given one, to send dicts from its
depths. The time limit is per step: since the child's last line, while we were waiting for it. Whatever happens, the
whole group is killed with SIGKILL at the end, grandchildren included; a watcher process in the group does the same when
*we* die, even if the child hangs inside native code. No pickle is read.

Follows helion's `benchmark_worker.py`, with JSON for pickle and a stream for a single result. A grandchild that makes a
session of its own leaves the group and is not killed. POSIX only.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from autotune.errors import AutotuneError, DeviceError

MAX_LINE_BYTES = 64 * 2**20
_POLL_S = 0.5  # how often to look whether the child has ended
_LAST_WORDS = 600  # characters of the child's stderr that an error quotes


class ChildTimeout(DeviceError):
    """The child took longer than the limit for one step. Code `isolate.timeout`."""


class ChildDied(DeviceError):
    """The child ended without a word: by a signal, or with exit code `returned`. Code `isolate.died`."""

    def __init__(self, message: str, hint: str, signal_number: int | None, returned: int | None) -> None:
        super().__init__("isolate.died", message, hint)
        self.signal_number = signal_number
        self.returned = returned


class ChildFailed(DeviceError):
    """The child raised. `code` is its own error code, or `isolate.<ExceptionName>`."""


def stream(
    target: str,
    args: Mapping[str, Any],
    step_timeout_s: float,
    env: Mapping[str, str] | None = None,
    first_timeout_s: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Run `target(**args)` in a child and yield the dicts it yields (or the one it returns).

    Args:
        env: set on top of our own environment.
        first_timeout_s: limit for the first line, where imports are paid for; None: as for any other step.

    Raises:
        ChildTimeout, ChildDied, ChildFailed.
    """
    results, child_end = os.pipe()
    with tempfile.TemporaryFile() as words:
        try:
            child = _spawn(target, child_end, words, env or {})
        finally:
            os.close(child_end)
        try:
            _send(child, args)
            yield from _lines(child, results, words, target, step_timeout_s, first_timeout_s or step_timeout_s)
        finally:
            os.close(results)
            _kill_group(child)


def call(
    target: str, args: Mapping[str, Any], timeout_s: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The last dict of `stream`, for functions that return one."""
    items = list(stream(target, args, timeout_s, env))
    return items[-1] if items else {}


def _spawn(target: str, child_end: int, words: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the child sees the modules we see
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "autotune.profilers.isolate", target, str(child_end)],
        stdin=subprocess.PIPE,  # also the lifeline: its end of file tells the watcher that we are gone
        stdout=words,
        stderr=words,
        pass_fds=(child_end,),
        env={**os.environ, "PYTHONPATH": path, **env},
        start_new_session=True,
    )


def _send(child: subprocess.Popen[bytes], args: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already; reading its results will say how
        child.stdin.write(json.dumps(dict(args)).encode() + b"\n")
        child.stdin.flush()


def _lines(
    child: subprocess.Popen[bytes], results: int, words: IO[bytes], target: str, step_s: float, first_s: float
) -> Iterator[dict[str, Any]]:
    buffer, limit_s = b"", first_s
    deadline = time.monotonic() + limit_s
    while True:
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            message = _parse(line, target)
            if "end" in message:
                return
            if "error" in message:
                raise ChildFailed(message["error"], f"{target}: {message['message']}", message["hint"])
            yield message["item"]
            limit_s = step_s
            deadline = time.monotonic() + limit_s  # the time the caller took with the item is not the child's
        data = _read(child, results, deadline)
        if data is None:
            hint = "It hangs, or the machine is very busy."
            raise ChildTimeout("isolate.timeout", f"{target} did nothing for {limit_s:g} s and was killed.", hint)
        if not data:
            raise _death(child, words, target)
        buffer += data
        if len(buffer) > MAX_LINE_BYTES:
            raise ChildFailed("isolate.protocol", f"{target} sent a line of more than {MAX_LINE_BYTES} bytes.")


def _read(child: subprocess.Popen[bytes], results: int, deadline: float) -> bytes | None:
    """What the child sent; empty once it has ended, None at the deadline."""
    while True:
        left_s = deadline - time.monotonic()
        if select.select([results], [], [], min(max(0.0, left_s), _POLL_S))[0]:
            return os.read(results, 2**16)
        if _ended(child):  # a forked grandchild may hold the pipe open
            return os.read(results, 2**16) if select.select([results], [], [], 0)[0] else b""
        if left_s <= 0:
            return None


def _parse(line: bytes, target: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ChildFailed("isolate.protocol", f"{target} sent what is not JSON: {line[:80]!r}.") from error
    if not isinstance(message, dict) or not {"item", "error", "end"} & set(message):
        raise ChildFailed("isolate.protocol", f"{target} sent an unknown message: {line[:80]!r}.")
    return message


def _death(child: subprocess.Popen[bytes], words: IO[bytes], target: str) -> DeviceError:
    """How the child ended, once its end of the pipe is closed."""
    deadline = time.monotonic() + 10.0
    while (status := _ended(child)) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    words.seek(0)
    quoted = words.read().decode(errors="replace")[-_LAST_WORDS:].strip()
    hint = f"Its last words: {quoted}" if quoted else "It left no message."
    if status is None:
        return ChildFailed("isolate.protocol", f"{target} closed its result pipe and went on.", hint)
    if status.si_code == os.CLD_EXITED:
        return ChildDied(f"{target} exited with code {status.si_status} before its end.", hint, None, status.si_status)
    name = signal.Signals(status.si_status).name
    return ChildDied(f"{target} was killed by {name}.", hint, status.si_status, None)


def _ended(child: subprocess.Popen[bytes]) -> Any:
    """How the child ended, None if it has not; it stays unreaped, so that its process group's number stays taken."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL the group before the leader is reaped: until then nobody else can have its number."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies may not be signalled
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


# ---- the child's side


def _child_main(target: str, results: int) -> None:
    os.set_inheritable(results, False)
    arguments = json.loads(_read_line(0))
    if os.fork() == 0:
        _watch(results)
    with os.fdopen(results, "w", encoding="utf-8") as pipe:

        def send(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message, allow_nan=False) + "\n")
            pipe.flush()

        try:
            module, _, name = target.partition(":")
            function = getattr(importlib.import_module(module), name)
            if "emit" in inspect.signature(function).parameters:
                arguments["emit"] = lambda item: send({"item": item})
            produced = function(**arguments) or ()
            for item in [produced] if isinstance(produced, dict) else produced:
                send({"item": item})
            send({"end": True})
        except AutotuneError as error:
            send({"error": error.code, "message": error.message, "hint": error.hint})
        except Exception as error:
            name = type(error).__name__
            send({"error": f"isolate.{name}", "message": f"{name}: {error}"[:2000], "hint": ""})


def _watch(results: int) -> None:
    """Wait for the parent's end of stdin to close, then kill the group. A process, not a thread: a kernel that hangs
    with the interpreter's lock held would stop a thread."""
    os.close(results)
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def _read_line(handle: int) -> bytes:
    """One line, byte exact: nothing past it may be buffered, the watcher reads on from here."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = os.read(handle, 2**16)
        if not chunk:
            os._exit(0)  # the parent died before it could ask for anything
        data += chunk
    return data


if __name__ == "__main__":
    _child_main(sys.argv[1], int(sys.argv[2]))
