"""The report's pictures, page and terminal text, drawn from synthetic `report.json` contents."""

from __future__ import annotations

import importlib.util
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread
from plotly.offline import get_plotlyjs
from rich.console import Console

from autotune import plan as plans
from autotune import store
from autotune.errors import DeviceError
from autotune.report import page, palette, pareto, terminal, words
from autotune.report.write import write_report
from autotune.search_space.schemes import MORE, SCHEMES

# Test files are no package, so the samples are loaded by path.
_spec = importlib.util.spec_from_file_location("report_sample", Path(__file__).with_name("test_report_sample.py"))
sample = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sample)


@pytest.fixture(params=sample.VARIANTS, name="report")
def _report(request):
    return sample.VARIANTS[request.param]()


class _Tags(HTMLParser):
    """Counts elements, and keeps what could load or run something."""

    def __init__(self, text):
        super().__init__()
        self.names, self.suspects = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.suspects += [(tag, key) for key, _ in attrs if key in ("src", "href", "srcset") or key.startswith("on")]


def test_all_files_are_written(report, tmp_path):
    write_report(tmp_path, report)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "layers.png",
        "pareto.png",
        "report.html",
        "report.json",
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for name in ("pareto.png", "layers.png"):
        pixels = imread(tmp_path / name)
        assert pixels.shape[1] == 1400
        assert len(np.unique(pixels[..., :3] @ [1.0, 300.0, 90000.0])) > 50


def test_page_says_what_calibration_missed_of_a_groups_experts():
    html = page.render(sample.make())
    assert html.count("8 experts, 2 a token, 1 hardly reached by calibration; each ") == 1


def test_page_loads_nothing(report):
    html = page.render(report)
    assert html.count(get_plotlyjs()) == 1
    own = html.replace(get_plotlyjs(), "")
    assert "http://" not in own and "https://" not in own
    tags = _Tags(own)
    assert tags.suspects == [] and tags.names.count("script") == 3 and not {"link", "img", "iframe"} & set(tags.names)
    assert "default-src &#x27;none&#x27;" in own


def test_charts_are_valid_plotly(report):
    for chart in page._charts(report).values():
        text = json.dumps(chart)
        for name in ("ink", "muted", "faint", "grid", "page", "chosen"):
            text = text.replace(f'"@{name}"', '"#123456"')
        go.Figure(json.loads(text))


def test_the_page_says_whether_tensor_cores_are_active(tmp_path):
    report = sample.make()
    kernel = report["groups"][0]["roofline"][0]["kernel"]
    report["target"]["machine_code"] = {kernel: "wgmma.mma_async, 72 registers, no spills", "cuda.bf16": ""}
    shares = [row["peak_share"] for group in report["groups"] for row in group["roofline"]]
    write_report(tmp_path, report)
    text = (tmp_path / "report.html").read_text()
    assert f"{kernel}: wgmma.mma_async, 72 registers, no spills (up to {max(shares):.0%} of the compute peak)" in text
    assert "cuda.bf16: a library, which chooses its own" in text


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'[red]$\\frac{"
FIXED = {"task", "certified", "status", "phase", "bound", "dtype", "uniform", "device", "name", "role"}


def _poison(value, key=""):
    """Every string that a checkpoint or a command line could choose becomes hostile."""
    if isinstance(value, dict):
        return {name: _poison(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_poison(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key not in FIXED - {"name", "role"} else value


# Eighty layers hold no other texts than one layer does.
@pytest.mark.parametrize("name", [name for name in sample.VARIANTS if name != "eighty_layers"])
def test_hostile_text_stays_text(name, tmp_path):
    hostile = _poison(sample.VARIANTS[name]())
    write_report(tmp_path, hostile)
    own = (tmp_path / "report.html").read_text().replace(get_plotlyjs(), "")
    tags = _Tags(own)
    assert tags.suspects == [] and tags.names.count("script") == 3 and "img" not in tags.names
    data = own.split('id="charts">')[1].split("</script>")[0]
    assert "<img" not in json.dumps(json.loads(data)) and HOSTILE not in own


def _printed(draw, width):
    console = Console(file=io.StringIO(), width=width, no_color=True)
    draw(console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 120])
def test_summary_holds_the_numbers(report, width):
    text = _printed(lambda console: terminal.print_summary(report, console, "autotune export gguf"), width)
    flat = " ".join(text.split())
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= width
    assert words.ms(words.plan_ms(report)) in flat and words.size(report["plan"]["weight_bytes"]) in flat
    assert report["plan"]["statement"][1:] in flat and "autotune export gguf" in flat
    assert report["plan"]["why"] in flat
    assert words.timing(report) == "measured" or words.timing(report) in flat
    if report["samples"]:
        assert "statements." in flat and "expressions." in flat


def test_summary_reads_no_markup(report):
    text = _printed(lambda console: terminal.print_summary(_poison(report), console), 4000)
    assert "[red]" in text


def _plan(scheme, latency_us):
    group = plans.GroupEntry(
        name="layers.0.qkv",
        role="qkv",
        layer=0,
        kernel="onednn",
        predicted_latency_us=latency_us,
        latency_status="estimated",
        predicted_loss_nats=0.001,
        weight_bytes=1000,
    )
    reason = "fastest" if scheme else "compressed is slower"
    entry = {"tensor": "layers.0.q", "module": "q", "shape": (8, 8), "group": group.name, "scheme": scheme}
    return plans.Plan(
        generator="autotune 0.1.0",
        model=plans.ModelRef.model_validate(sample.make()["model"] | {"tied_embeddings": False}, extra="ignore"),
        target="xeon",
        runtime="torch",
        workload="chat",
        budget=plans.Limits(max_loss=0.01, max_memory_bytes=None, min_speedup=None),
        schemes={"w8a8-int8": plans.SchemeSpec.of("w8a8-int8")},
        groups=(group,),
        tensors=(plans.TensorEntry(**entry, reason=reason),),
        kept=(),
        prediction=plans.Prediction(
            latency_us=latency_us,
            dense_latency_us=200.0,
            loss_nats=None,
            search_kl_nats=None,
            weight_bytes=1000,
            dense_weight_bytes=2000,
        ),
        provenance=plans.Provenance(
            latency_table="", loss_table=None, documents=None, kernels={}, packages={}, seed=0, trials=1
        ),
    )


def test_plan_table_and_diff():
    dense, small = _plan(None, 200.0), _plan("w8a8-int8", 100.0)
    table = _printed(lambda console: terminal.print_plan_table(small, console), 120)
    assert "w8a8-int8" in table and "~100 µs" in table and "2.00" in table and "estimated" in table
    assert "compressed is slower" in _printed(lambda console: terminal.print_plan_table(dense, console), 120)
    diff = _printed(lambda console: terminal.print_plan_diff(dense, small, console), 120)
    assert "bf16 (onednn)" in diff and "w8a8-int8 (onednn)" in diff and "1 of 1 groups differ" in diff
    assert "0 of 1 groups differ" in _printed(lambda console: terminal.print_plan_diff(small, small, console), 120)


def test_report_json_comes_last(tmp_path, monkeypatch):
    write_report(tmp_path, sample.make(1))

    def fail(path, data):
        raise DeviceError("store.no_space", "full")

    monkeypatch.setattr(store, "write_bytes", fail)
    with pytest.raises(DeviceError):
        write_report(tmp_path, sample.make(1))
    assert not (tmp_path / "report.json").exists()


def test_labels_do_not_overlap(report):
    figure = pareto.draw(report)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    for index, box in enumerate(boxes):
        assert not any(box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9)) for other in boxes[:index])


def test_every_scheme_has_its_own_readable_colour():
    every = (*SCHEMES, *MORE)
    colours = [palette.COLOURS[scheme.name] for scheme in every]
    assert len(set(colours)) == len(every) == len({palette.short(scheme.name) for scheme in every})
    for colour in [*colours, palette.UNKNOWN]:
        ink, back = palette.luminance(palette.text_on(colour)), palette.luminance(colour)
        assert (max(ink, back) + 0.05) / (min(ink, back) + 0.05) >= 4.0
