"""The recovery benchmark on a tiny model: what it writes is consistent, and the control stays where it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("recovery")
    model = tiny.make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    letters = np.random.default_rng(3).integers(97, 123, 20_000)
    (folder / "more.txt").write_text(bytes(letters.tolist()).decode())
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("bench_recovery", BENCHMARKS / "recovery.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arguments = [str(model), "--data", str(folder / "more.txt"), "--json", str(folder / "rows.json")]
        arguments += ["--tokens", "12288", "--documents", "2", "--marks", "4", "--compression", "wanda"]
        code = module.main([*arguments, "--rate", "0.02", "--threads", str(threads)])
    sys.modules.pop("compression", None)
    sys.modules.pop("compression_rivals", None)
    return json.loads((folder / "rows.json").read_text()) | {"code": code}


def test_it_recovers_some_and_says_whether_it_is_enough(value):
    assert 0 < value["kept_kl"] < 1
    assert value["code"] == (0 if value["kept_kl"] <= 1 / 3 else 1)


def test_the_rows_belong_together(value):
    before, after, control = value["rows"]
    assert [row["state"] for row in value["rows"]] == ["one-shot", "recovered", "dense, trained as long"]
    assert value["kept_kl"] == pytest.approx(after["kl_nats"]["mean"] / before["kl_nats"]["mean"])
    gain = before["kl_nats"]["mean"] - after["kl_nats"]["mean"]
    assert value["gain"]["kl_nats"]["mean"] == pytest.approx(gain)
    assert control["kl_nats"]["mean"] < 1e-3 * before["kl_nats"]["mean"]


def test_the_curves_are_of_the_same_tokens(value):
    tokens = [mark["tokens"] for mark in value["curve"]]
    assert tokens == [mark["tokens"] for mark in value["control_curve"]]
    assert tokens[0] == 0 and tokens[-1] == value["train_tokens"] == 12_288
    assert value["curve"][-1]["check_nats"] < value["curve"][0]["check_nats"]
