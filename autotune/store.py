"""Files that survive a crash: atomic writes, canonical JSON, hashes, an append-only memo, and the run folder's lock.

A write goes to a temporary file in the same folder, is fsynced, renamed over the old one, and the folder is fsynced:
after a crash the reader sees the old file or the new one, never a mix. Nothing here knows what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.errors import BusyError, DeviceError, InputError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
_OLD = ".old.tmp"  # what a replaced folder is called while the new one takes its place


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, shortest floats, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(value: Any) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = value if isinstance(value, bytes) else canonical_json(value).encode()
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably; on any failure the old file stays and no temporary is left.

    Raises:
        DeviceError: `store.no_space`, `store.write`.
    """
    with _write_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    _settle(path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented for people, key order kept, NaN refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, code: str) -> Any:
    """Parse a JSON file that may be hostile: size, depth and duplicate keys are checked.

    Raises:
        InputError: `<code>.missing`, `<code>.too_large`, `<code>.syntax`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{code}.too_large", f"{path} is larger than {MAX_JSON_BYTES} bytes.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{code}.missing", f"{path} does not exist.", "Check the path.") from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{code}.syntax", f"{path} cannot be read: {error}.") from error
    return parse_json(text, code, str(path))


def parse_json(text: str, code: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{code}.syntax", f"{where} is not valid JSON: {error}.") from error
    if _depth(value) > MAX_JSON_DEPTH:
        raise InputError(f"{code}.syntax", f"{where} is nested deeper than {MAX_JSON_DEPTH} levels.")
    return value


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder; on success it is fsynced and renamed to `path`, on failure removed.

    An existing `path` is moved aside first and deleted only once the new one is in place; a failure, or `sweep` after
    a crash in between, puts it back.

    Raises:
        DeviceError: `store.no_space`, `store.write`.
    """
    import shutil

    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for item in (*temporary.rglob("*"), temporary):
                _fsync(item)
            os.chmod(temporary, 0o755)
            _exchange(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _settle(path)
    shutil.rmtree(_aside(path), ignore_errors=True)


def _exchange(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of `path`, which goes aside; on failure `path` is as before."""
    import shutil

    old = _aside(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD}")


def _settle(path: Path) -> None:
    """Make a finished rename durable."""
    try:
        _fsync(path.parent)
    except OSError as error:
        what = f"{path} was written, but may not survive a loss of power: {error.strerror or error}."
        raise DeviceError("store.write", what, "Check the disk and start again.") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _write_errors(path: Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, size, error) from error


def sweep(folder: Path) -> None:
    """Remove what a killed write left behind. Only the holder of the folder's lock may call this."""
    import shutil

    for stale in sorted(folder.rglob(".*.tmp")):
        moved_aside = stale.with_name(stale.name[1:].removesuffix(_OLD))
        if stale.name.endswith(_OLD) and not moved_aside.exists():
            os.replace(stale, moved_aside)
        elif stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one process. `flock` goes with the process, so a killed run leaves no stale lock.

    Raises:
        BusyError: `store.locked`, naming who holds it.
        DeviceError: `store.write` where the folder cannot be made.
    """
    with _write_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closed below, in the caller's time
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            hint = "Wait for it to end, or use another --out folder."
            raise BusyError("store.locked", f"{folder} is in use by {holder}.", hint) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        sweep(folder)
        yield


class Memo:
    """A durable map from a key to a JSON value in one SQLite file; values are never changed once put.

    `put` returns after the value is on disk (WAL, synchronous=FULL), so an acknowledged value survives `kill -9`.
    """

    def __init__(self, path: Path) -> None:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            with contextlib.ExitStack() as opened:
                opened.callback(self._db.close)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("CREATE TABLE IF NOT EXISTS memo (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
                opened.pop_all()  # all is well: it stays open
        except sqlite3.Error as error:
            hint = "Move the file away to start afresh."
            raise DeviceError("store.database", f"{path} cannot be opened: {error}.", hint) from error

    def get(self, key: str) -> Any | None:
        row = self._db.execute("SELECT value FROM memo WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        try:
            self._db.execute("INSERT OR IGNORE INTO memo VALUES (?, ?)", (key, canonical_json(value)))
        except sqlite3.Error as error:
            hint = "Free some space or check the disk, then start again: everything put before is kept."
            raise DeviceError("store.no_space", f"a result could not be saved: {error}.", hint) from error

    def items(self) -> Iterator[tuple[str, Any]]:
        for key, value in self._db.execute("SELECT key, value FROM memo ORDER BY key"):
            yield key, json.loads(value)

    def close(self) -> None:
        self._db.close()


def user_folder() -> Path:
    """Where measurements shared by all runs of a user live: $AUTOTUNE_HOME, else the platform's cache folder."""
    if home := os.environ.get("AUTOTUNE_HOME"):
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "autotune"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
    return deepest


def _write_error(path: Path, size: int, error: OSError) -> DeviceError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = "store.no_space" if full else "store.write"
    space = f"at least {size} bytes" if size else "some space"
    hint = f"Free {space} and start again." if full else "Check the folder and its permissions."
    return DeviceError(
        code,
        f"{path} could not be written: {error.strerror or error}. What was there before is untouched.",
        hint,
    )
