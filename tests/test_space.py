"""The search space: every (group, scheme) is there, usable or with the reason why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from autotune.errors import InputError
from autotune.kernels.spec import KERNELS
from autotune.search_space.coverage import KernelSpec, Limits
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.rules import legality
from autotune.search_space.schemes import SCHEMES, scheme
from autotune.search_space.space import build
from autotune.targets import target

TARGET = replace(tiny.here(), name="t", features=("avx2",))


def group(in_features=256, out_features=64, name="g"):
    return LayerGroup(name, "o", 0, (Linear(name, name, out_features, in_features, False),))


def model(*groups, dtype="fp32"):
    return ModelSpec("m", "M", "causal-lm", dtype, None, groups, (), False)


def kernel(name, *schemes, **limits):
    return KernelSpec(name, schemes, "cpu", ("fp32",), "m", Limits(**limits))


def judge(item, kernels, shape=None, **options):
    return legality(scheme(item), shape or group(), "fp32", options.pop("target", TARGET), kernels, True)


DENSE, INT4 = kernel("dense", "fp32"), kernel("int4", "w4a16-int4-g128")


def test_a_kernel_here_makes_it_run():
    found = judge("w4a16-int4-g128", [DENSE, INT4])
    assert (found.status, found.kernels, found.usable) == ("runs", ("int4",), True)


def test_a_kernel_there_makes_it_estimated():
    found = legality(scheme("fp32"), group(), "fp32", TARGET, [DENSE], local=False)
    assert (found.status, found.usable) == ("estimated", True)
    assert "not this machine" in found.reason


@pytest.mark.parametrize("item", [item.name for item in SCHEMES if item.weight.group_size])
def test_inputs_that_no_scale_group_divides_are_illegal_with_the_reason(item):
    found = judge(item, KERNELS, group(in_features=200))
    assert (found.status, found.usable, found.kernels) == ("illegal", False, ())
    assert "200 inputs" in found.reason
    assert str(scheme(item).weight.group_size) in found.reason


@pytest.mark.parametrize("item", [item.name for item in SCHEMES if item.sparsity == "2:4"])
def test_inputs_that_four_does_not_divide_cannot_be_sparse(item):
    found = judge(item, KERNELS, group(in_features=130))
    assert found.status == "illegal"
    assert "130 inputs" in found.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"in_multiple": 512}, "256 inputs are not a multiple of 512"),
        ({"out_multiple": 48}, "64 outputs are not a multiple of 48"),
        ({"features": ("amx_int8",)}, "t lacks amx_int8"),
        ({"min_compute_capability": 8.0}, "needs compute capability 8.0, t has 0.0"),
    ],
)
def test_a_kernels_limits_are_reasons(limits, reason):
    found = judge("fp32", [kernel("k", "fp32", **limits)])
    assert found.status == "illegal"
    assert found.reason == f"k: {reason}"


def test_one_fitting_kernel_is_enough():
    assert judge("fp32", [kernel("k", "fp32", in_multiple=512), DENSE]).kernels == ("dense",)


def test_no_kernel_for_the_device_or_dtype_is_a_reason():
    assert "no cpu kernel implements 2:4" in judge("2:4", [DENSE]).reason
    assert "the model runs in bf16" in legality(scheme("fp32"), group(), "bf16", TARGET, [DENSE], True).reason


def test_every_pair_is_listed_once():
    spec = model(group(name="a"), group(name="b"))
    space = build(spec, TARGET, [DENSE, INT4], True)
    pairs = [(entry.group, entry.scheme) for entry in space.entries]
    others = [item.name for item in SCHEMES if not item.is_dense]
    assert sorted(pairs) == sorted((name, item) for name in "ab" for item in ["fp32", *others])
    assert all(entry.legality.reason for entry in space.entries)


def test_the_dense_scheme_comes_first():
    space = build(model(group()), TARGET, [INT4, DENSE], True)
    assert [entry.scheme for entry in space.schemes("g")] == ["fp32", "w4a16-int4-g128"]


def test_schemes_not_asked_for_leave_with_the_reason():
    space = build(model(group()), TARGET, [DENSE, INT4], True, allowed=["w8a8-int8"])
    reasons = {entry.scheme: entry.legality.reason for entry in space.entries}
    assert reasons["w4a16-int4-g128"] == "excluded by --schemes"
    assert [entry.scheme for entry in space.usable()] == ["fp32"]  # dense always stays


def test_an_unknown_scheme_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'w8a8-int8'") as error:
        build(model(group()), TARGET, [DENSE], True, allowed=["w8a8-int"])
    assert error.value.code == "scheme.unknown"


def test_a_group_that_cannot_even_run_dense_is_an_error():
    with pytest.raises(InputError, match="g") as error:
        build(model(group()), TARGET, [INT4], True)
    assert error.value.code == "space.no_dense"


def test_dropping_keeps_the_entry_and_its_reason():
    space = build(model(group()), TARGET, [DENSE, INT4], True)
    after = space.without({("g", "w4a16-int4-g128"): "slower here"})
    entry = next(entry for entry in after.entries if entry.scheme == "w4a16-int4-g128")
    assert (entry.legality.status, entry.legality.reason) == ("illegal", "slower here")
    assert len(after.entries) == len(space.entries)
    assert [entry.scheme for entry in space.schemes("g")] == ["fp32", "w4a16-int4-g128"]  # the first is as it was


@pytest.mark.parametrize("name", target.names())
def test_every_shipped_target_can_run_a_plain_group_dense(name):
    item = target.load(name)
    if item.device == "mps":  # no kernel of ours runs there: for `advise` only
        with pytest.raises(InputError, match=r"space\.no_dense.*no mps kernel"):
            build(model(group(256, 256), dtype="bf16"), item, KERNELS, False)
        return
    space = build(model(group(256, 256), dtype="bf16"), item, KERNELS, False)
    assert space.schemes("g")[0].scheme == "bf16"


def test_a_group_by_name_or_an_error():
    spec = model(group(name="a"))
    assert spec.group("a").name == "a"
    with pytest.raises(InputError, match="'b'") as error:
        spec.group("b")
    assert error.value.code == "model.group"
