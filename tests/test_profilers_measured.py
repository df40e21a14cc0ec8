"""Tables from other machines: imported, compared, and used where a target is not here; a table from a bare config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.errors import InputError
from autotune.profilers import measured
from autotune.profilers.table import LatencyRow, LatencyTable
from autotune.targets import target

ESTIMATE = LatencyRow(
    "cuda.bf16", "bf16", (64, 32), 128, False, "bf16", 1, None, 10.0, 10.0, 10.0, 0, "estimated", False, "roofline", 99
)
MEASURED = replace(ESTIMATE, median_us=14.0, low_us=13.5, high_us=14.5, rounds_timed=20, status="measured", reason="")
H100 = target.load("h100")


def table(*rows, name="cuda-nvidia-h100-80gb-hbm3", fingerprint="abc"):
    return LatencyTable(name, fingerprint, rows)


@pytest.fixture
def written(tmp_path):
    def write(made, name="one.csv"):
        made.to_csv(tmp_path / name)
        return tmp_path / name

    return write


def test_a_measured_row_takes_an_estimates_place(written):
    other = replace(ESTIMATE, rows=4)
    filled = measured.fill(table(ESTIMATE, other, name="h100"), H100, [written(table(MEASURED))])
    assert filled.rows[0].median_us == 14.0 and filled.rows[0].status == "measured"
    assert filled.rows[0].reason == "measured elsewhere: one.csv" and filled.rows[1] == other


def test_other_devices_and_failures_are_not_used(written):
    failed = replace(MEASURED, status="failed", median_us=None, low_us=None, high_us=None)
    estimates = table(ESTIMATE, name="h100")
    for made in (table(failed), table(MEASURED, name="cuda-nvidia-h200"), table(ESTIMATE)):
        assert measured.fill(estimates, H100, [written(made)]) == estimates
    here = table(MEASURED, name="h100")
    assert measured.fill(here, H100, [written(table(replace(MEASURED, median_us=20.0)))]) == here


def test_the_later_file_counts(written):
    paths = [written(table(MEASURED), "a.csv"), written(table(replace(MEASURED, median_us=13.8)), "b.csv")]
    assert measured.fill(table(ESTIMATE, name="h100"), H100, paths).rows[0].median_us == 13.8


def test_import_keeps_a_table_for_later(written, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    kept = measured.import_table(written(table(MEASURED)))
    assert kept == tmp_path / "home/tables/cuda-nvidia-h100-80gb-hbm3-abc.csv" and kept in measured.files()
    assert measured.fill(table(ESTIMATE, name="h100"), H100).rows[0].status == "measured"
    with pytest.raises(InputError, match=r"latency\.estimated"):
        measured.import_table(written(table(ESTIMATE)))
    with pytest.raises(InputError, match=r"latency\.missing"):
        measured.import_table(tmp_path / "none.csv")


def test_differences_largest_first():
    small = replace(MEASURED, rows=4, median_us=14.2)
    faster = replace(MEASURED, median_us=7.0, low_us=6.9, high_us=7.1)
    found = measured.diff(
        table(small, MEASURED, replace(ESTIMATE, rows=8)), table(faster, replace(small, median_us=14.4))
    )
    assert [(item.row.rows, item.apart) for item in found] == [(1, True), (4, False)]
    assert found[0].ratio == 0.5
    assert measured.typical_ratio(found) == pytest.approx((0.5 * 14.4 / 14.2) ** 0.5)
    assert measured.typical_ratio([]) == 1.0


def test_a_table_from_a_config_alone(tmp_path, monkeypatch):
    """The 8B's shapes for a card that is not here: no weights, every row an estimate or measured elsewhere."""
    from pathlib import Path

    from typer.testing import CliRunner

    from autotune.cli import app

    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    config = Path(__file__).parent.parent / "benchmarks/shapes/llama-3.1-8b/config.json"
    out = tmp_path / "table.csv"
    command = ["profile", "--shapes", str(config), "--target", "h100", "--workload", "decode", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = LatencyTable.from_csv(out).rows
    assert {(row.members, row.in_features) for row in rows} >= {((4096, 1024, 1024), 4096), ((14336, 14336), 4096)}
    assert {row.status for row in rows} == {"estimated"} and {"triton.w4a16", "cuslt.fp8"} <= {
        row.kernel for row in rows
    }
    faster = replace(rows[0], status="measured", median_us=1.0, low_us=0.9, high_us=1.1)
    other = tmp_path / "other.csv"
    table(faster, name="cuda-nvidia-h100-80gb-hbm3").to_csv(other)
    assert CliRunner().invoke(app, ["tables", "import", str(other)]).exit_code == 0
    CliRunner().invoke(app, command)
    assert LatencyTable.from_csv(out).rows[0].median_us == 1.0
    shown = CliRunner().invoke(app, ["tables", "diff", str(other), str(out)])
    assert "1.0 -> 1.0 us" in shown.output and "1 in both" in shown.output


def test_profile_wants_a_run_or_shapes(capsys):
    from typer.testing import CliRunner

    from autotune.cli import app
    from autotune.errors import UsageError

    assert isinstance(CliRunner().invoke(app, ["profile"]).exception, UsageError)
