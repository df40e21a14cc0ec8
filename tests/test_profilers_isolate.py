"""Real children that yield, raise, crash, hang and leave grandchildren. None of them imports torch."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from autotune.profilers.isolate import ChildDied, ChildFailed, ChildTimeout, call, stream

CHILDREN = """
import os, signal, subprocess, sys, time
from autotune.errors import InputError

def count(n):
    for i in range(n):
        yield {"i": i}

def one(**args):
    print("chatter on stdout")
    return {"args": args, "env": os.environ.get("PROBE")}

def raises(known):
    yield {"i": 0}
    raise InputError("model.sad", "it is sad.", "Cheer it up.") if known else ValueError("bad value")

def dies(how):
    yield {"i": 0}
    print("last words", file=sys.stderr, flush=True)
    os._exit(3) if how == "exit" else os.kill(os.getpid(), how)
    time.sleep(60)

def hangs(steps, pause):
    for i in range(steps):
        time.sleep(pause)
        yield {"i": i, "pid": os.getpid()}
    time.sleep(60)

def stubborn(end):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    yield {"grandchild": child.pid, "pid": os.getpid()}
    if end == "hang":
        time.sleep(60)
    if end == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)

def forks():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    yield {"grandchild": pid}
    os._exit(7)
"""


@pytest.fixture(autouse=True)
def children(tmp_path, monkeypatch):
    (tmp_path / "child_functions.py").write_text(CHILDREN)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(name, timeout_s=20.0, **args):
    return stream(f"child_functions:{name}", args, timeout_s)


def alive(pid):
    """A zombie that nobody has reaped yet counts as gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def gone(pid, within_s=5.0):
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_items_arrive_in_order():
    assert [item["i"] for item in run("count", n=5)] == [0, 1, 2, 3, 4]


def test_one_dict_with_arguments_environment_and_chatter():
    result = call("child_functions:one", {"a": [1, {"b": None}]}, 20, {"PROBE": "yes"})
    assert result == {"args": {"a": [1, {"b": None}]}, "env": "yes"}


@pytest.mark.parametrize(("known", "code"), [(True, "model.sad"), (False, "isolate.ValueError")])
def test_an_exception_keeps_its_code_and_what_came_before(known, code):
    seen = []
    with pytest.raises(ChildFailed) as caught:
        seen.extend(run("raises", known=known))  # extend keeps what was produced before the raise
    assert seen == [{"i": 0}] and caught.value.code == code


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_names_its_signal(number):
    seen = []
    with pytest.raises(ChildDied, match=number.name) as caught:
        seen.extend(run("dies", how=int(number)))
    assert seen == [{"i": 0}] and caught.value.signal_number == number
    assert "last words" in caught.value.hint


def test_a_silent_exit_is_not_a_success():
    with pytest.raises(ChildDied) as caught:
        list(run("dies", how="exit"))
    assert caught.value.returned == 3 and caught.value.signal_number is None


def test_the_limit_is_per_step():
    """Four steps of 0.4 s under a limit of 1.5 s, then a hang: only the hang is too long."""
    seen, start = [], time.monotonic()
    with pytest.raises(ChildTimeout):
        seen.extend(stream("child_functions:hangs", {"steps": 4, "pause": 0.4}, 1.5, first_timeout_s=20))
    assert len(seen) == 4 and time.monotonic() - start < 12
    assert gone(seen[0]["pid"])


def test_the_callers_own_time_does_not_count():
    for _ in stream("child_functions:count", {"n": 3}, 0.5, first_timeout_s=20):
        time.sleep(0.7)


@pytest.mark.parametrize("end", ["hang", "crash", "return"])
def test_a_grandchild_that_ignores_sigterm_goes_too(end):
    seen = []
    with contextlib.suppress(ChildTimeout, ChildDied):
        seen.extend(stream("child_functions:stubborn", {"end": end}, 0.5, first_timeout_s=20))
    assert gone(seen[0]["grandchild"]) and gone(seen[0]["pid"])


def test_a_forked_grandchild_cannot_hide_the_death():
    """It holds the result pipe open, so there is no end of file to see."""
    seen = []
    with pytest.raises(ChildDied):
        seen.extend(run("forks"))
    assert gone(seen[0]["grandchild"])


def test_abandoning_the_stream_kills_the_child():
    items = run("hangs", steps=1, pause=0.0)
    pid = next(items)["pid"]
    items.close()
    assert gone(pid)


def test_children_die_with_their_parent(tmp_path):
    """The parent is killed outright while its child has a stubborn grandchild and hangs."""
    code = """
        import sys
        from autotune.profilers.isolate import stream
        for item in stream("child_functions:stubborn", {"end": "hang"}, 60):
            print(item["pid"], item["grandchild"], flush=True)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_an_unknown_function_is_reported():
    with pytest.raises(ChildFailed, match="nowhere"):
        list(run("nowhere"))
