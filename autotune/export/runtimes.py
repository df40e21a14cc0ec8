"""Which runtimes load a scheme, and whether it makes them faster: what our exporter writes, what they say they take.

Other tools' kernels are listed by their released sources (vLLM 0.33, SGLang 0.5.23, transformers 5.23; TensorRT-LLM's
repository), read and not run. Zeros of a pattern are stored as ordinary values, so nothing but autotune gains by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.export.compressed_tensors import is_plain, layout
from autotune.search_space.schemes import Scheme
from autotune.targets.target import Target


@dataclass(frozen=True)
class Runtime:
    """`gain`: "all" of the scheme, "numbers" where its zeros are read like any other weight, "none": dense speed."""

    name: str
    gain: str

    def __str__(self) -> str:
        return self.name + {"all": "", "numbers": " (zeros unused)", "none": " (dense speed)"}[self.gain]


def runtimes(item: Scheme, target: Target) -> tuple[Runtime, ...]:
    """Those that load what `autotune export --to compressed-tensors` writes of this scheme, on this target."""
    form = layout(item)
    if form is None and not is_plain(item):
        return ()
    gain = "none" if form is None else "all" if item.sparsity == "dense" else "numbers"
    engines = ("vLLM", "SGLang") if form is None else tuple(_engines(form, item, target))
    return (*(Runtime(name, gain) for name in engines), Runtime("transformers", "none"))


def _engines(form: str, item: Scheme, target: Target) -> list[str]:
    """Engines with a kernel of their own for a layout on this device."""
    bits = item.weight.bits
    if target.compute_capability is not None:
        if form == "float-quantized" and "fp8" not in target.features:
            return []
        found = ["vLLM"]
        if form != "pack-quantized" or bits in (4, 8):
            found.append("SGLang")
        return [*found, "TensorRT-LLM"] if form == "float-quantized" else found
    amx = "amx_int8" in target.features
    if target.device != "cpu" or "avx512f" not in target.features:
        return []
    if form == "pack-quantized":
        return ["vLLM"] if bits == 4 else []
    if form == "int-quantized":
        return ["vLLM", "SGLang"] if amx else ["vLLM"]
    return ["vLLM", "SGLang"] if amx else []
