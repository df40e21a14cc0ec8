"""Dense linear layer on weights that oneDNN has reordered once, instead of in every call as `F.linear` lets it.

The honest dense baseline of a CPU. One packed copy serves every number of rows; the packed tensor is opaque to torch
(no storage to save, no buffer), so it is counted as its dense size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotune.kernels.reordered import kept
from autotune.kernels.spec import Form, GroupWeight, Packed, dense_of

# The layout oneDNN picks depends a little on the number of rows it is told; one row gives a layout that is as fast as
# any for prefill here (ratio 1.0 at 512 rows) and the fastest for decode.
_ROWS_HINT = 1


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    dense = dense_of(weight).to(dtype)
    reordered = torch.ops.mkldnn._reorder_linear_weight(dense, _ROWS_HINT)
    bias = None if weight.bias is None else weight.bias.to(dtype)
    held = dense.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(dense.shape[0], dense.shape[1], dtype, held, (reordered, bias))


def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    return None, packed.data[1]


def plain(packed: Packed) -> torch.Tensor:
    """The weights as they were before oneDNN reordered them."""
    dense: torch.Tensor = packed.data[0].to_dense()
    return dense


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    dense, bias = held
    reordered = kept(dense, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT))
    return form.packed((reordered, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    reordered, bias = packed.data
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
    return y
