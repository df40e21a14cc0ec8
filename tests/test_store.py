"""Files survive crashes and full disks: old or new, never a mix, no leftovers; memo, lock and JSON likewise."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import store
from autotune.errors import BusyError, DeviceError, InputError
from autotune.store import Memo, canonical_json, digest, locked, new_folder, parse_json, read_json, sweep

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Faults:
    """Make the n-th of the os calls that write or name files fail; `done` counts them."""

    def __init__(self, monkeypatch, number: int, action) -> None:
        self.done = 0
        for name in ("open", "fsync", "replace", "chmod", "mkdir"):
            self._wrap(monkeypatch, name, getattr(os, name), number, action)

    def _wrap(self, monkeypatch, name, real, number, action):
        def call(*args, **kwargs):
            self.done += 1
            if self.done == number:
                action()
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def fail_with(code):
    def action():
        raise OSError(code, os.strerror(code))

    return action


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_file(path: Path) -> None:
    store.write_bytes(path, b"new")


def write_folder(path: Path) -> None:
    with new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"new")


def old_file(path: Path) -> None:
    path.write_bytes(b"old")


def old_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"old")


WRITERS = {"file": (write_file, old_file), "folder": (write_folder, old_folder)}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_whichever_call_fails_the_old_content_stays_and_nothing_is_left_over(tmp_path, monkeypatch, kind, code):
    """The n-th call fails, for n = 1, 2, ... until the write succeeds."""
    write, make_old = WRITERS[kind]
    for number in range(1, 50):
        home = tmp_path / f"{number}"
        home.mkdir()
        make_old(home / "x")
        before = contents(home)
        write(tmp_path / f"clean-{number}" / "x")
        after = contents(tmp_path / f"clean-{number}")
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, fail_with(code))
            try:
                write(home / "x")
                error = None
            except DeviceError as raised:
                error = raised
        if error is None:  # the call did not matter (the folder is there already), or there was no n-th call
            sweep(home)
            assert contents(home) == after
            if faults.done < number:
                assert number > 5
                return
            continue
        assert error.code == ("store.no_space" if code == errno.ENOSPC else "store.write") or "power" in error.message
        assert str(home / "x") in error.message
        if "power" in error.message:  # all was written, only the folder could not be synced
            sweep(home)
            assert contents(home) == after
        else:
            assert contents(home) == before
    raise AssertionError("never succeeded")


@pytest.mark.parametrize("kind", WRITERS)
def test_killed_at_any_call_the_next_start_finds_old_or_new_and_no_leftovers(tmp_path, kind):
    """`os._exit` at the n-th call, in a child; then what the next holder of the lock does: `sweep`."""
    write, make_old = WRITERS[kind]
    for number in range(1, 50):
        home = tmp_path / f"{number}"
        home.mkdir()
        make_old(home / "x")
        before = contents(home)
        child = os.fork()
        if child == 0:
            patch = pytest.MonkeyPatch()
            Faults(patch, number, lambda: os._exit(9))
            write(home / "x")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sweep(home)
        found = contents(home)
        new = {"x": b"new"} if kind == "file" else {"x/sub/file": b"new"}
        assert found in (before, new)
        if status == 0:
            assert found == new
            return
    raise AssertionError("never succeeded")


@pytest.mark.parametrize("kind", WRITERS)
def test_content_is_on_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch, kind):
    """A loss of power cannot be tested; the order of the calls that guard against it can."""
    write, calls, fsync, replace = WRITERS[kind][0], [], os.fsync, os.replace

    def spy_fsync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        return fsync(handle)

    def spy_replace(old, new):
        calls.append("replace")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write(tmp_path / "x")
    *before, named, after = calls
    assert (named, after) == ("replace", str(tmp_path))
    assert len(before) == (1 if kind == "file" else 3)  # the folder, the one inside, and the file
    assert all(path.startswith(f"{tmp_path}/.x.") for path in before)


def test_sweeping_reaches_folders_below_and_puts_back_what_was_moved_aside(tmp_path):
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / ".a.tmp").write_text("half")
    (tmp_path / ".model.123.tmp").mkdir()
    (tmp_path / ".model.old.tmp").mkdir()
    (tmp_path / ".model.old.tmp" / "file").write_text("old")
    sweep(tmp_path)
    assert contents(tmp_path) == {"model/file": b"old"}
    assert {path.name for path in tmp_path.iterdir()} == {"database", "model"}


def test_a_folder_that_fails_to_fill_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x") as temporary:
        (temporary / "half").write_text("half")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_write_below_a_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="file") as error:
        store.write_text(tmp_path / "file" / "x", "text")
    assert error.value.code == "store.write"


@given(JSON)
def test_canonical_json_reads_back_and_is_one_spelling(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


def test_equal_objects_have_equal_digests_whatever_their_order():
    assert digest({"a": 1, "b": [1.0]}) == digest({"b": [1.0], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_file_ever_holds_nan(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(tmp_path / "x", [value])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "duplicate"),
        ("[" * 40 + "]" * 40, "deeper"),
        ("[" * 1_000_000, "not valid"),
        ("{", "not valid"),
        ("", "not valid"),
        ("1" * 5000, "not valid"),
    ],
)
def test_hostile_json_is_refused(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_json(text, "plan", "the file")
    assert error.value.code == "plan.syntax"
    assert "the file" in str(error.value)


def test_json_of_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x04\xff")
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x", "plan")
    assert error.value.code == "plan.syntax"
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "absent", "plan")
    assert error.value.code == "plan.missing"


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(store.MAX_JSON_BYTES + 1)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x", "plan")
    assert error.value.code == "plan.too_large"


HOLD = "import sys; from pathlib import Path; from autotune.store import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(BusyError, match=f"pid {holder.pid} on ") as error, locked(tmp_path):
        pass
    assert (error.value.code, error.value.exit_code) == ("store.locked", 75)


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    (tmp_path / ".half.tmp").write_text("stale")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert not (tmp_path / ".half.tmp").exists()


def test_the_lock_is_free_again_after_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(DeviceError) as error, locked(tmp_path / "run"):
        pass
    assert error.value.code == "store.write"


def test_the_memo_keeps_the_first_value(tmp_path):
    memo = Memo(tmp_path / "m.sqlite")
    memo.put("k", {"a": 1.5})
    memo.put("k", {"a": 2.5})
    assert memo.get("k") == {"a": 1.5}
    assert memo.get("other") is None
    assert list(memo.items()) == [("k", {"a": 1.5})]
    memo.close()


WRITE = """
import sys
from pathlib import Path
from autotune.store import Memo
memo = Memo(Path(sys.argv[1]))
for number in range(100_000):
    memo.put(str(number), number)
    print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_what_the_memo_acknowledged_survives_sigkill(tmp_path, acknowledged):
    path = tmp_path / "m.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as process:
        seen = [int(process.stdout.readline()) for _ in range(acknowledged)]
        process.kill()
        seen += [int(line) for line in process.stdout if line.endswith("\n")]
    memo = Memo(path)
    values = dict(memo.items())
    memo.close()
    assert all(values[str(number)] == number for number in seen)
    assert len(values) <= len(seen) + 1  # at most the one in flight


def test_a_memo_that_is_not_a_database_is_refused_untouched(tmp_path):
    (tmp_path / "m.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DeviceError, match="sqlite") as error:
        Memo(tmp_path / "m.sqlite")
    assert error.value.code == "store.database"
    assert (tmp_path / "m.sqlite").read_bytes().startswith(b"not a database")


def test_a_full_disk_loses_the_new_value_only(tmp_path):
    memo = Memo(tmp_path / "m.sqlite")
    memo.put("a", 1)
    memo._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(DeviceError) as error:
        memo.put("b", "x" * 100_000)
    assert error.value.code == "store.no_space"
    assert dict(memo.items()) == {"a": 1}
    memo.close()


def test_the_memo_waits_for_the_disk(tmp_path):
    memo = Memo(tmp_path / "m.sqlite")
    assert memo._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert memo._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    memo.close()


def test_two_processes_share_a_memo(tmp_path):
    first, second = Memo(tmp_path / "m.sqlite"), Memo(tmp_path / "m.sqlite")
    first.put("a", 1)
    second.put("b", 2)
    assert dict(first.items()) == dict(second.items()) == {"a": 1, "b": 2}
    first.close()
    second.close()
    with pytest.raises(sqlite3.ProgrammingError):
        first.get("a")


def test_the_users_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    assert store.user_folder() == tmp_path
    monkeypatch.delenv("AUTOTUNE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store.user_folder() == tmp_path / "cache" / "autotune"


def test_a_disk_that_fills_up_midway_leaves_the_old_file(tmp_path):
    """A real short write: the kernel refuses to let the file grow past a limit."""
    store.write_bytes(tmp_path / "x", b"old")
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.write_bytes(tmp_path / "x", b"n" * 5000)
        except DeviceError as error:
            os._exit(7 if error.code == "store.write" else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert contents(tmp_path) == {"x": b"old"}
