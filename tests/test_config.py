"""Settings are checked once, at the edge; what is written resolved reads back equal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import RunConfig, parse_bytes, parse_loss
from autotune.errors import InputError, UsageError

NEEDED = {"model": "m", "out": "o"}


def refusal(**values) -> InputError:
    with pytest.raises(InputError) as error:
        RunConfig.of(**NEEDED, **values)
    return error.value


def test_saved_settings_read_back_equal(tmp_path):
    config = RunConfig.of(**NEEDED, schemes=("w8a8-int8",), max_memory_bytes=5, min_speedup=1.5, trials=7)
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config


def test_an_unknown_key_is_named_with_its_nearest():
    error = refusal(max_los=0.1)
    assert (error.code, error.hint) == ("config.schema", "Did you mean 'max_loss' or 'max_memory_bytes'?")
    assert "max_los" in error.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_loss", 0),
        ("max_loss", -0.1),
        ("max_loss", float("nan")),
        ("max_loss", 11),
        ("max_memory_bytes", 0),
        ("min_speedup", float("inf")),
        ("minutes", float("inf")),
        ("trials", -1),
        ("trials", "many"),
        ("seed", 0.5),
        ("dtype", "fp16"),
        ("rounds", 19),
        ("finalists", 6),
        ("schemes", 5),
        ("data", ["a"]),
    ],
)
def test_a_bad_value_is_named(key, value):
    error = refusal(**{key: value})
    assert error.code == "config.schema"
    assert error.message.startswith(key)


def test_a_budget_is_needed_unless_only_latency_counts():
    assert "max_loss" in refusal(max_loss=None).message
    assert RunConfig.of(**NEEDED, max_loss=None, latency_only=True).max_loss is None


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig.of(**NEEDED).seed = 1


@pytest.mark.parametrize(
    "text",
    ["[1]", "", "a: b: c", "1: 2", "when: 2026-99-99", "[" * 5000, "!!python/object/apply:os.getcwd []", "\x00"],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        RunConfig.load(tmp_path / "config.yaml")
    assert error.value.code == "config.syntax"
    assert "config.yaml" in error.value.message


def test_an_alias_bomb_does_not_go_off(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "schemes: *a29"]))
    with pytest.raises(InputError) as error:
        RunConfig.load(tmp_path / "config.yaml")
    assert error.value.code == "config.schema"
    assert len(str(error.value)) < 1000


def test_an_absent_run_says_what_to_give(tmp_path):
    with pytest.raises(InputError, match=r"autotune tune") as error:
        RunConfig.load(tmp_path / "config.yaml")
    assert error.value.code == "config.missing"


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("0.5 %", 0.005), ("1000%", 10)])
def test_losses(text, value):
    assert parse_loss(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "abc", "0", "-1%", "nan", "inf", "1001%", "1%%x"])
def test_what_is_no_loss_is_refused(text):
    with pytest.raises(UsageError) as error:
        parse_loss(text)
    assert error.value.code == "config.max_loss"


@pytest.mark.parametrize(
    ("text", "value"), [("123", 123), ("4GiB", 4 * 2**30), ("800MB", 800 * 10**6), ("1.5 kib", 1536), ("7B", 7)]
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "abc", "0", "-1GiB", "nan", "inf", "1e400", "4GGB", "4 pounds"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError) as error:
        parse_bytes(text)
    assert error.value.code == "config.max_memory"


@given(st.text(max_size=12))
def test_no_text_crashes_the_parsers(text):
    for parse in (parse_loss, parse_bytes):
        try:
            assert parse(text) > 0
        except UsageError as error:
            assert error.hint
