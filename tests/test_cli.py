"""The command line: exit codes, one clear message with a stable code, and help that is quick."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from rich.console import Console

from autotune import cli
from autotune.plan import Plan
from autotune.store import locked

COMMANDS = [
    "recover",
    "tune",
    "profile",
    "score",
    "search",
    "verify",
    "apply",
    "report",
    "plan",
    "targets",
    "doctor",
    "clean",
    "advise",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    tiny.make_model("llama", folder / "other", seed=1, num_hidden_layers=1)
    tiny.write_documents(folder / "data.jsonl", 16, 40)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command as the shell would: (exit code, stdout, stderr without line breaks)."""
    monkeypatch.setattr(cli, "console", Console(highlight=False, width=200))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["autotune", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


SMALL = ["calibration_tokens=200", "score_tokens=200", "score_length=48", "score_draws=1", "search_tokens=200"]
SMALL += ["search_length=48", "finalists=2", "measured_points=3"]


@pytest.fixture
def tune(call, home, monkeypatch):
    """`autotune tune` on the tiny model, latencies by arithmetic."""

    def run(out, *arguments, certify_tokens=600, model="model"):
        options = [part for item in [*SMALL, f"certify_tokens={certify_tokens}"] for part in ("--set", item)]
        options += ["--data", home / "data.jsonl", "--workload", "1,8,4", "--out", out, "--trials", "4"]
        with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
            return call("tune", home / model, *options, *arguments)

    return run


def assert_one_clear_message(stderr, code):
    assert re.match(rf"error {re.escape(code)}: .+\. .+", stderr), stderr  # what and where. what to do next
    assert "Traceback" not in stderr


def test_help_names_every_command_and_costs_no_torch():
    program = "import sys; sys.argv = ['autotune', '--help']; from autotune.cli import main\n"
    program += "try: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert "Usage" in out


def test_every_option_says_what_it_is(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = call("tune", "--help")
    for option in ("--max-loss", "--target", "--workload", "--max-memory", "--trials", "--minutes", "--seed", "--out"):
        line = next(line for line in out.splitlines() if option in line)
        assert len(re.sub(r"[^a-z ]", "", line).split()) >= 3, line


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["tune"],
        ["tune", "model", "--nonsense"],
        ["tune", "model", "--trials", "many"],
        ["profile"],
    ],
)
def test_what_the_parser_refuses_is_usage(call, arguments):
    assert call(*arguments)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--max-loss", "lots"], "config.max_loss"),
        (["--max-memory", "lots"], "config.max_memory"),
        (["--minutes", "5"], "config.trials"),
        (["--workload", "chatt"], "workload.unknown"),
        (["--workload", "1,2"], "workload.syntax"),
        (["--set", "finalists"], "config.set"),
    ],
)
def test_flags_that_make_no_sense_exit_2(tune, tmp_path, arguments, code):
    status, _, err = tune(tmp_path / "run", *arguments)
    assert status == 2
    assert_one_clear_message(err, code)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["--schemes", "w8a8-int"], "scheme.unknown", "Did you mean 'w8a8-int8'"),
        (["--data", "gone.jsonl"], "data.missing", "jsonl"),
        (["--dtype", "fp16"], "config.schema", ""),
        (["--set", "finalist=2"], "config.schema", "Did you mean 'finalists'"),
    ],
)
def test_input_that_cannot_be_used_exits_3(tune, tmp_path, arguments, code, hint):
    status, _, err = tune(tmp_path / "run", *arguments)
    assert status == 3
    assert f"error {code}: " in err
    assert hint in err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_an_unknown_target_exits_3_with_the_nearest(call, home, tmp_path):
    status, _, err = call("tune", home / "model", "--target", "h10", "--out", tmp_path / "run")
    assert status == 3
    assert_one_clear_message(err, "target.unknown")
    assert "Did you mean 'h100'" in err
    assert not (tmp_path / "run").exists()


def test_advice_is_printed_and_written(call, home, tmp_path, monkeypatch):
    from autotune import advise_command

    monkeypatch.setattr(advise_command, "console", Console(highlight=False, width=200))
    status, out, _ = call("advise", home / "model", "--target", "h100", "--json", tmp_path / "advice.json")
    assert status == 0
    assert "decode is bound by" in out and re.search(r"w8a16-int8 +\d\.\d\dx", out)
    assert json.loads((tmp_path / "advice.json").read_text())["target"] == "h100"
    status, _, err = call("advise", home / "model", "--target", "h10")
    assert status == 3
    assert_one_clear_message(err, "target.unknown")


def test_a_pickled_model_exits_3_with_how_to_convert_it(call, tmp_path, home):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((home / "model" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    status, _, err = call("tune", folder, "--target", "x86-generic", "--out", tmp_path / "run")
    assert status == 3
    assert_one_clear_message(err, "model.pickle")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["profile", "score", "search", "verify", "apply", "report"])
def test_a_stage_of_no_run_exits_3_and_makes_no_folder(call, tmp_path, name):
    status, _, err = call(name, tmp_path / "gone")
    assert status == 3
    assert_one_clear_message(err, "config.missing")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("arguments", [["--max-memory", "1kB"], ["--min-speedup", "1000"]])
def test_an_unreachable_budget_exits_4_with_the_nearest_point(tune, tmp_path, arguments):
    status, _, err = tune(tmp_path / "run", *arguments)
    assert status == 4
    assert_one_clear_message(err, "search.infeasible")
    assert "nearest" in err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_full_disk_exits_5(tune, tmp_path, monkeypatch):
    def fsync(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = tune(tmp_path / "run")
    assert status == 5
    assert_one_clear_message(err, "store.no_space")


def test_nothing_certifies_exits_6_and_the_plan_says_so(tune, tmp_path):
    """Two documents are too few for a claim."""
    status, _, err = tune(tmp_path / "run", "--max-loss", "2%", "--compression", "wanda", certify_tokens=64)
    assert status == 6
    assert_one_clear_message(err, "certify.not_certified")
    assert "--data" in err
    assert json.loads((tmp_path / "run" / "report.json").read_text())["plan"]["certified"] == "not_certified"


def test_a_second_run_in_the_folder_exits_75(tune, tmp_path):
    with locked(tmp_path / "run"):
        status, _, err = tune(tmp_path / "run")
    assert status == 75
    assert_one_clear_message(err, "store.locked")
    assert f"pid {os.getpid()}" in err


def test_a_run_ends_with_0_and_its_parts_can_be_shown(tune, call, tmp_path, home):
    status, out, err = tune(tmp_path / "run", "--max-loss", "2%")
    assert (status, err) == (0, "")
    plan = Plan.load(tmp_path / "run" / "plan.json")
    status, out, _ = call("plan", "show", tmp_path / "run")
    assert status == 0
    assert all(name in out for name in {entry.scheme for entry in plan.tensors if entry.scheme})
    assert call("plan", "diff", tmp_path / "run", tmp_path / "run" / "plan.json")[0] == 0
    status, out, _ = call("plan", "validate", tmp_path / "run", "--model", home / "model")
    assert (status, plan.digest() in out) == (0, True)

    status, _, err = call("plan", "validate", tmp_path / "run", "--model", home / "other")
    assert status == 3
    assert_one_clear_message(err, "plan.model_mismatch")

    status, _, err = call("plan", "choose", tmp_path / "run")
    assert status == 2
    assert_one_clear_message(err, "plan.choose")

    file = json.loads((tmp_path / "run" / "plan.json").read_text())
    file["plan"]["target"] = "elsewhere"
    (tmp_path / "edited.json").write_text(json.dumps(file))
    status, _, err = call("plan", "show", tmp_path / "edited.json")
    assert status == 3
    assert_one_clear_message(err, "plan.edited")

    status, out, _ = call("clean", tmp_path / "run")
    assert status == 0
    assert not (tmp_path / "run" / "database").exists()
    assert (tmp_path / "run" / "plan.json").exists()


def test_a_dry_run_writes_nothing_and_names_what_is_not_legal(tune, tmp_path):
    status, out, _ = tune(tmp_path / "run", "--dry-run")
    assert status == 0
    assert "not a multiple of the scale group 128" in " ".join(out.split())
    assert "score 200 in documents of 48, search 200, certification 600 tokens; 4 trials, 2 finalists" in out
    assert "losses in fp32" in out
    assert "reduced" not in out
    assert not (tmp_path / "run").exists()


def test_cleaning_nothing_is_usage_and_makes_no_folder(call, tmp_path):
    status, _, err = call("clean")
    assert status == 2
    assert_one_clear_message(err, "clean.nothing")
    status, _, err = call("clean", tmp_path / "gone")
    assert status == 3
    assert not (tmp_path / "gone").exists()


def test_targets_are_listed_and_shown(call):
    status, out, _ = call("targets")
    assert status == 0
    assert "x86-generic" in out
    status, out, _ = call("targets", "show", "x86-generic")
    assert (status, "last_cache_bytes" in out) == (0, True)
    status, _, err = call("targets", "show", "x86-generik")
    assert status == 3
    assert "Did you mean 'x86-generic'" in err


def test_ctrl_c_exits_130_and_says_that_nothing_is_lost(call, monkeypatch, home, tmp_path):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("autotune.tune.tune", interrupt)
    status, _, err = call("tune", home / "model", "--out", tmp_path / "run")
    assert status == 130
    assert "resumes" in err


def test_markup_in_a_message_is_printed_as_it_is(call):
    status, _, err = call("targets", "show", "[red]x[/nonsense]")
    assert status == 3
    assert "[red]x[/nonsense]" in err
