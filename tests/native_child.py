"""Calls a compiled kernel on buffers of exactly the bytes it may touch; a process of its own, which ends if it strays.

Run as `native_child.py FOLDER malloc|guard`, where `calls.json` and the buffers' files are; outputs are written beside
them. `malloc`: a sanitizer watches. `guard`: memory behind every buffer cannot be touched. Nothing but ctypes: torch
under a sanitizer is slow, and allocates with slack.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path

TYPES = {"P": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32}
LIBC = ctypes.CDLL(None)
LIBC.malloc.argtypes, LIBC.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
LIBC.free.argtypes = (ctypes.c_void_p,)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Memory:
    """Buffers of a call; all given back at its end."""

    def __init__(self, guarded: bool) -> None:
        self.guarded = guarded
        self.places: list[int] = []
        self.maps: list[mmap.mmap] = []

    def of(self, size: int) -> int:
        if not self.guarded:
            self.places.append(LIBC.malloc(size))
            return self.places[-1]
        usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.maps.append(mmap.mmap(-1, usable + mmap.PAGESIZE))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.maps[-1]))
        if LIBC.mprotect(start + usable, mmap.PAGESIZE, 0):
            sys.exit("no memory could be guarded")
        return start + usable - size

    def holding(self, file: Path) -> int:
        data = file.read_bytes()
        place = self.of(len(data))
        ctypes.memmove(place, data, len(data))
        return place

    def free(self) -> None:
        for place in self.places:
            LIBC.free(place)
        self.maps.clear()


def call(folder: Path, job: dict, memory: Memory) -> None:
    function = getattr(ctypes.CDLL(job["library"]), job["function"])
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    names = [f"field{number}" for number in range(len(job["fields"]))]
    fields = [(name, TYPES[kind]) for name, (kind, _) in zip(names, job["fields"], strict=True)]
    values = [memory.holding(folder / value) if kind == "P" and value else value for kind, value in job["fields"]]
    packed = type("Packed", (ctypes.Structure,), {"_fields_": fields})(*values)
    x, y = memory.holding(folder / job["x"]), memory.of(job["y_bytes"])
    if function(ctypes.addressof(packed), x, job["rows"], y, job["threads"]):
        sys.exit("the kernel found no memory")
    (folder / job["y"]).write_bytes(ctypes.string_at(y, job["y_bytes"]))
    memory.free()


if __name__ == "__main__":
    home = Path(sys.argv[1])
    for job in json.loads((home / "calls.json").read_text()):
        call(home, job, Memory(sys.argv[2] == "guard"))
