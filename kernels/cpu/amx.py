"""AMX tiles for Python: libraries that use them, once the system has allowed this process to.

Never run on a CPU that has tiles: the project's own machines have none. What was tested is the same code with the tile
instructions emulated (`tiles_emulated.h`), and that the real ones assemble to what compilers emit for them. So AMX
kernels are kernels of their own beside those on vector instructions, on the same packed weights: where they are wrong
or slower, the gate or the profiler leaves them out.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

from autotune.errors import DeviceError
from autotune.kernels.cpu import build

# Fewer rows go to vector instructions: half a tile's rows would be empty. Not measured; a tile takes as long for one
# row as for sixteen where its shape stays.
LEAST_ROWS = 16


@cache
def function(library: str, name: str) -> Any:
    """A kernel's C function (packed, x, rows, y, threads) -> 0, or 1 when memory ran out.

    Raises:
        DeviceError: `kernel.amx` where the system refuses tiles (Linux before 5.16, some virtual machines and
            sandboxes); what `build.library` raises.
    """
    loaded = build.library(library)
    if refused := loaded.autotune_amx_allowed():
        message = f"the system does not let this process use AMX tiles: {os.strerror(refused)}."
        raise DeviceError("kernel.amx", message, "Linux 5.16 or newer does; kernels on vector instructions go on.")
    call = getattr(loaded, name)
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    call.restype = ctypes.c_int
    return call
