"""Workloads: requests, their phases, and how many rows a layer group sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import UsageError
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.workload import PRESETS, Phase, Request, parse

LINEAR = (Linear("w", "w", 8, 8, False),)
BODY, HEAD = LayerGroup("b", "b", 0, LINEAR), LayerGroup("lm_head", "lm_head", None, LINEAR, last_token_only=True)


def test_one_prefill_and_a_decode_step_for_every_generated_token():
    assert parse("2,128,64").phases == (Phase("prefill", 2, 256, 1.0), Phase("decode", 2, 2, 64.0))


def test_nothing_generated_is_prefill_only():
    assert parse("1,512,0").phases == (Phase("prefill", 1, 512, 1.0),)


def test_a_mix_is_scaled_to_one_request():
    mix = parse("3*1,128,64+1*2,512,0")
    assert mix.requests == (Request(1, 128, 64, 0.75), Request(2, 512, 0, 0.25))
    assert [phase.count for phase in mix.phases] == [0.75, 48.0, 0.25]


def test_the_head_sees_the_last_position_only():
    prefill = parse("2,128,64").phases[0]
    assert (prefill.rows(BODY), prefill.rows(HEAD)) == (256, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_names_and_spellings(name):
    assert parse(name).requests == PRESETS[name]
    assert str(parse(name)).startswith(f"{name}: ")


def test_an_unknown_name_is_met_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'chat'") as error:
        parse("chatt")
    assert error.value.code == "workload.unknown"


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "1,2",
        "1,2,3,4",
        "0,1,1",
        "1,0,1",
        "1,1,-1",
        "-1*1,1,1",
        "0*1,1,1",
        "1,1,1+",
        "1.5,1,1",
        "x*1,1,1",
        "nan*1,1,1",
        "inf*1,1,1",
    ],
)
def test_what_is_no_workload_is_refused(text):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert error.value.code == "workload.syntax"
    assert error.value.hint


@given(st.text(alphabet="0123456789,.*+-e nif", max_size=20))
def test_no_text_crashes_the_parser(text):
    try:
        workload = parse(text)
    except UsageError:
        return
    assert sum(request.weight for request in workload.requests) == pytest.approx(1.0)
    assert all(request.weight > 0 for request in workload.requests)
