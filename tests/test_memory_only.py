"""Schemes without a fast kernel: named, measured and chosen for memory alone, and said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

import autotune
from autotune.config import RunConfig
from autotune.errors import InfeasibleError, InputError
from autotune.export import exporters
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import KERNELS, kernel
from autotune.kernels.torch import unpack
from autotune.model import open_model
from autotune.planning import why
from autotune.report import words
from autotune.search_space.rules import legality
from autotune.search_space.schemes import MORE, SCHEMES, scheme
from autotune.targets import target
from autotune.tune import tune

CLOSE = "w4a16-int4-g64,w3a16-int3-g64"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    tiny.write_documents(folder / "data.jsonl")
    return tiny.make_model("llama", folder / "model")


def config_of(model, out, names, limit, **changes):
    changes |= {"schemes": tuple(names.split(",")), "max_memory_bytes": limit}
    return RunConfig.of(**tiny.settings(model, out, model.parent / "data.jsonl", **changes))


def sizes(model):
    """(bytes no scheme touches, the KV cache's among them, number of weights in groups)."""
    spec = open_model(str(model)).spec
    cache = 2 * 2 * 2 * 16 * 4 * (8 + 4)  # keys and values, layers, key heads, width, bytes, positions
    return spec.kept_bytes + cache, sum(group.weights for group in spec.groups)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run whose memory budget int4 misses and int3 keeps."""
    kept, weights = sizes(model)
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        run = tmp_path_factory.mktemp("run") / "run"
        return tune(config_of(model, run, CLOSE, kept + int(weights * 3.8 / 8)))


def test_nothing_changes_where_no_scheme_is_named():
    spec = open_model_spec()
    space = tiny.space_of(spec)
    assert {entry.scheme for entry in space.entries} <= {item.name for item in SCHEMES}
    assert not [entry for entry in space.entries if entry.legality.status == "memory_only"]
    assert not any("torch.cpu.unpack" in entry.legality.kernels for entry in space.entries)


def open_model_spec():
    from test_space import group, model

    return model(group(256, 64))


@pytest.mark.parametrize("item", [item for item in (*SCHEMES, *MORE) if not item.is_dense], ids=lambda item: item.name)
def test_every_scheme_can_be_named(item):
    space = tiny.space_of(open_model_spec(), [item.name])
    entry = next(entry for entry in space.entries if entry.scheme == item.name)
    assert entry.legality.usable
    if entry.legality.status == "memory_only":
        assert entry.legality.kernels == ("torch.cpu.unpack",)
        assert (
            "saves memory only: no cpu kernel implements" in entry.legality.reason or "takes" in entry.legality.reason
        )


def test_default_stands_for_all_that_are_searched_unnamed():
    named = tiny.space_of(open_model_spec(), ["default", "w4a16-nf4-g64"])
    plain = tiny.space_of(open_model_spec())
    assert {e.scheme for e in named.usable()} == {e.scheme for e in plain.usable()} | {"w4a16-nf4-g64"}
    with pytest.raises(InputError, match="w4a16-nf4-g64"):
        tiny.space_of(open_model_spec(), ["w4a16-nf4-g46"])


def test_another_machine_gets_no_estimate_of_unpacking():
    group = open_model_spec().groups[0]
    for name in target.names():
        found = legality(scheme("w3a16-int3-g64"), group, "bf16", target.load(name), KERNELS, False, for_memory=True)
        assert found.status == "illegal"


def test_the_plan_keeps_the_memory_budget_by_it(finished, model):
    config = finished.session.config
    assert finished.plan.prediction.weight_bytes <= config.max_memory_bytes
    chosen = [name for name, item in finished.plan.configuration.items() if item == "w3a16-int3-g64"]
    assert chosen and {finished.plan.kernels[name] for name in chosen} == {"torch.cpu.unpack"}
    statuses = {(e.group, e.scheme): e.legality.status for e in finished.space.entries}
    assert {statuses[name, "w3a16-int3-g64"] for name in chosen} == {"memory_only"}


def test_the_report_says_so(finished):
    notice = next(text for text in words.notices(finished.report) if "memory only" in text)
    assert "w3a16-int3-g64" in notice and "unpacked" in notice
    reasons = {entry.reason for entry in finished.plan.tensors if entry.scheme == "w3a16-int3-g64"}
    assert all("smaller than dense" in reason and "for memory only" in reason for reason in reasons)
    assert not [text for text in words.notices(without(finished.report)) if "memory only" in text]


def without(report):
    groups = [group | {"options": [o | {"status": "runs"} for o in group["options"]]} for group in report["groups"]]
    return report | {"groups": groups}


def test_a_reason_claims_no_speed(finished):
    group = finished.problem.groups[0]
    slow = next(option for option in group.options if option.scheme == "w3a16-int3-g64")
    assert "saves" not in why(group, slow, finished.space)
    assert slow.latency_us > group.options[0].latency_us
    quick = replace(slow, latency_us=0.0)  # not even where a disturbed run says so
    assert "saves" not in why(group, quick, finished.space)


def test_it_loads_again_and_holds_what_it_says(finished):
    loaded = autotune.load(finished.session.folder.path)
    ids = tiny.tokens(1)[0].unsqueeze(0)
    packed = [m.packed_bytes for m in loaded.modules() if getattr(m, "active", "") == "w3a16-int3-g64"]
    names = finished.plan.configuration
    assert sum(packed) == sum(g.weight_bytes for g in finished.plan.groups if names[g.name] == "w3a16-int3-g64") > 0
    with torch.inference_mode():
        assert torch.isfinite(loaded(ids).logits).all()


def test_the_loaded_model_computes_with_the_stored_codes(finished, model):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tiny.tokens(1)[0].unsqueeze(0)
    database = finished.chosen.weights(finished.database, finished.plan.configuration)
    for group in finished.session.spec.groups:
        name = finished.plan.configuration[group.name]
        if scheme(name).is_dense:
            continue
        parts = dequantize(database.load(group, name)).split([member.out_features for member in group.members])
        for member, part in zip(group.members, parts, strict=True):
            dense.get_submodule(member.module).weight.data = part
    loaded = autotune.load(finished.session.folder.path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


def test_the_exporter_refuses_it_by_name(finished, tmp_path):
    item = exporters.exporter("compressed-tensors")
    with pytest.raises(InputError, match=r"export\.unsupported.*w3a16-int3-g64"):
        exporters.load(item).write(finished.session.folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "bits", "expected"), [("w8a16-int8", 5.0, "w4a16-int4-g32"), ("w8a16-int8", 3.5, "w3a16-int3-g64")]
)
def test_too_small_a_budget_names_schemes_that_would_meet_it(model, tmp_path, names, bits, expected):
    kept, weights = sizes(model)
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        with pytest.raises(InfeasibleError, match="These would do") as error:
            tune(config_of(model, tmp_path / "run", names, kept + int(weights * bits / 8)))
        hint = error.value.hint
        assert expected in hint or "others too" in hint
        first = hint.rpartition("default,")[2].rstrip(".")
        config = config_of(model, tmp_path / "again", f"default,{first}", kept + int(weights * bits / 8))
        assert tune(config, until="profile").space.usable()


def test_a_piece_of_rows_is_unpacked_as_the_whole(monkeypatch):
    from autotune.kernels.reference import random_weight

    weight = random_weight("50%+w4a16-int4-g128", 37, 256, torch.float32, False, torch.Generator().manual_seed(0))
    packed = unpack.pack(weight, torch.float32)
    assert packed.bytes == scheme(weight.scheme).stored_bytes(37, 256)
    x = torch.eye(256)
    whole = unpack.run(packed, x)
    assert torch.equal(whole.T, dequantize(weight))
    monkeypatch.setattr(unpack, "_CHUNK_WEIGHTS", 1000)
    assert torch.equal(unpack.run(packed, x), whole)


def test_it_is_the_only_kernel_of_its_kind():
    assert [spec.name for spec in KERNELS if spec.memory_only] == ["torch.cpu.unpack"]
    item = kernel("torch.cpu.unpack")
    assert replace(item, memory_only=False) != item
