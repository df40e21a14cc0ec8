"""What nvcc makes of a CUDA C++ kernel for any generation, no card needed: registers, spills, tensor-core product."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from autotune.kernels.cuda.build import compiled

_INSTRUCTIONS = ("mma.sp", "mma.sync")


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    spilled_bytes: int
    instruction: str  # the tensor-core instruction, "" where there is none

    def __str__(self) -> str:
        spilled = "spills" if self.stack_bytes or self.spilled_bytes else "no spills"
        return f"{self.instruction or 'no tensor cores'}, {self.registers} registers, {spilled}"


def inspect(name: str, capability: float) -> Resources:
    """Compile NAME.cu, of one kernel, for sm_80, sm_90, ... and read the assembler's report.

    Raises:
        DeviceError: `kernel.compiler`.
    """
    number = round(capability * 10)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "made.ptx"
        compiled(name, ptx, "-ptx", f"-arch=compute_{number}")
        report = compiled(name, Path(folder) / "made.cubin", "-cubin", f"-arch=sm_{number}", "-Xptxas=-v")
        text = ptx.read_text()
    registers, stack = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes stack frame", report)
    assert registers and stack, report
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    instruction = next((found for found in _INSTRUCTIONS if found in text), "")
    return Resources(int(registers[1]), int(stack[1]), spilled, instruction)
