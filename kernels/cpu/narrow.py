"""Weights of three and two bits in scale groups: less to read than four, for a row at a time.

Packed by `integer`, which says how activations are met; the layouts are `Int3` and `Int2` of `formats.h`. A library of
its own, `narrow.cpp`, so that nobody waits for compiling it who does not ask for these schemes.
"""

from __future__ import annotations

from autotune.kernels.cpu import integer
from autotune.kernels.cpu.call import NativeLinear

linear = NativeLinear("narrow", "autotune_narrow")
pack, tensors, bind = integer.pack, integer.tensors, integer.bind
run, native = linear.run, linear.native
