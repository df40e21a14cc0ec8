"""AMX tiles for Python: libraries that use them, once the system has allowed this process to.

Never run on a CPU that has tiles: the project's own machines have none. What was tested is the same code with the tile
instructions emulated (`tiles_emulated.h`), and that the real ones assemble to what compilers emit for them. So AMX
kernels are kernels of their own beside those on vector instructions, on the same packed weights: where they are wrong
or slower, the gate or the profiler leaves them out.
"""

from __future__ import annotations

import os
from typing import Any

from autotune.errors import DeviceError

# Fewer rows go to vector instructions: half a tile's rows would be empty. Not measured; a tile takes as long for one
# row as for sixteen where its shape stays.
LEAST_ROWS = 16


def check(library: Any) -> None:
    """Before a library that uses tiles is first called.

    Raises:
        DeviceError: `kernel.amx` where the system refuses tiles (Linux before 5.16, some virtual machines and
            sandboxes).
    """
    if refused := library.autotune_amx_allowed():
        message = f"the system does not let this process use AMX tiles: {os.strerror(refused)}."
        raise DeviceError("kernel.amx", message, "Linux 5.16 or newer does; kernels on vector instructions go on.")
