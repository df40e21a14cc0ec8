"""Every exporter of the table, under every scheme: the tool's own code reads back exactly what the plan says.

Adding an exporter needs no change here. A scheme may be carried exactly or refused with `export.unsupported`; there is
nothing between.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_export_saved import saved_run

from autotune import plan as plan_file
from autotune.errors import InputError
from autotune.export import exporters
from autotune.export.exporters import EXPORTERS, Exporter
from autotune.kernels.reference import dequantize
from autotune.search_space import schemes
from autotune.search_space.schemes import SCHEMES, NumberFormat, Scheme

pytestmark = pytest.mark.filterwarnings("ignore")
GROUPS = ("model.layers.0.self_attn.qkv", "model.layers.1.mlp.down_proj")
EACH_EXPORTER = pytest.mark.parametrize("item", EXPORTERS, ids=lambda item: item.name)
QUANTIZED = [item.name for item in SCHEMES if not item.is_dense]
QUANTIZED += ["w8a16-int8-g64", "w4a16-int4-g64-asym", "w3a16-int3-g64", "w2a16-int2-g32", "w8a16-fp8"]
QUANTIZED += ["w8a8-fp8-tensor", "w4a16-nf4-g64", "w4a16-mxfp4", "w4a16-nvfp4", "4:8", "50%+w8a16-int8"]


def _exported(item: Exporter, folder: Path, names: dict[str, str], **options: Any) -> SimpleNamespace:
    run = saved_run(folder, "llama", names, **options)
    report = exporters.load(item).write(run.run, folder / "out", run.source)
    return SimpleNamespace(run=run, report=report, folder=folder / "out")


def _check_weights(item: Exporter, done: SimpleNamespace) -> None:
    read = exporters.load(item).read(done.folder)
    for group in done.run.opened.spec.groups:
        ours = dequantize(done.run.weights[group.name]).to(done.run.opened.dtype)
        for member, rows in zip(group.members, ours.split([m.out_features for m in group.members]), strict=True):
            theirs = read[member.module]
            assert torch.equal(theirs, rows), member.module
            assert int((theirs == 0).sum()) == int((rows == 0).sum())


@EACH_EXPORTER
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_exact_or_refused(item: Exporter, name: str, dtype: str, tmp_path: Path) -> None:
    try:
        done = _exported(item, tmp_path, dict.fromkeys(GROUPS, name), dtype=dtype)
    except InputError as error:
        assert error.code == "export.unsupported" and GROUPS[0] in error.message
        return
    _check_weights(item, done)
    assert done.report.schemes == done.run.plan.configuration
    sparse = schemes.scheme(name).sparsity != "dense"
    assert any("no speed-up" in note for note in done.report.notes) is sparse


@EACH_EXPORTER
def test_sizes(item: Exporter, tmp_path: Path) -> None:
    """Four bits cost about half of eight, and what the report says is what is on disk."""
    bytes_ = {}
    for name in ("fp32", "w8a16-int8", "w4a16-int4-g128"):
        run = saved_run(tmp_path / name, "llama", {})
        every = {group.name: name for group in run.opened.spec.groups}
        done = _exported(item, tmp_path / f"{name}-all", every)
        bytes_[name] = done.report.bytes
        assert done.report.bytes < sum(file.stat().st_size for file in done.folder.iterdir())
        stored = json.loads((done.folder / "export_report.json").read_text())
        assert stored["bytes"] == done.report.bytes and stored["plan_sha256"] == done.run.plan.digest()
    weights = sum(group.weights for group in run.opened.spec.groups)
    assert bytes_["fp32"] - bytes_["w8a16-int8"] > 2.8 * weights
    assert bytes_["w8a16-int8"] - bytes_["w4a16-int4-g128"] > 0.4 * weights


@EACH_EXPORTER
def test_same_run_same_bytes(item: Exporter, tmp_path: Path) -> None:
    done = _exported(item, tmp_path, dict.fromkeys(GROUPS, "w4a16-int4-g64"))
    exporters.load(item).write(done.run.run, tmp_path / "again", done.run.source)
    for file in done.folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@EACH_EXPORTER
def test_an_existing_folder_is_kept_unless_forced(item: Exporter, tmp_path: Path) -> None:
    run = saved_run(tmp_path, "llama", dict.fromkeys(GROUPS, "w8a8-int8"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    module = exporters.load(item)
    with pytest.raises(InputError, match=r"export\.exists"):
        module.write(run.run, out, run.source)
    assert (out / "mine").read_text() == "keep"
    for needed in (run.run, run.run / "model", run.source):
        with pytest.raises(InputError, match=r"export\.exists"):
            module.write(run.run, needed, run.source, force=True)
    module.write(run.run, out, run.source, force=True)
    assert not (out / "mine").exists() and (out / "plan.json").is_file()


@EACH_EXPORTER
def test_a_failed_write_leaves_nothing(item: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved_run(tmp_path, "llama", dict.fromkeys(GROUPS, "w8a8-int8"))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_file.Plan, "save", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        exporters.load(item).write(run.run, tmp_path / "out", run.source)
    assert sorted(tmp_path.iterdir()) == before


@EACH_EXPORTER
def test_a_scheme_nobody_knows_is_refused(item: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3-bit weights with 5-bit activations are storable by us, and no tool has them."""
    odd = Scheme("w3a5", NumberFormat("int", 3, 32), NumberFormat("int", 5))
    monkeypatch.setitem(schemes._BY_NAME, odd.name, odd)
    run = saved_run(tmp_path, "llama", {GROUPS[1]: odd.name})
    with pytest.raises(InputError, match=r"export\.unsupported") as raised:
        exporters.load(item).write(run.run, tmp_path / "out", run.source)
    assert GROUPS[1] in raised.value.message and not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"export\.unsupported") as raised:
        exporters.load(item).write(run.run, tmp_path / "out", run.source)
    assert GROUPS[1] in raised.value.message and not (tmp_path / "out").exists()


def test_the_table_names_each_exporter_once() -> None:
    assert len({item.name for item in EXPORTERS}) == len(EXPORTERS)
    assert all(exporters.exporter(item.name) is item for item in EXPORTERS)
    with pytest.raises(InputError, match=r"export\.unknown.*compressed-tensors"):
        exporters.exporter("compressed-tensor")
