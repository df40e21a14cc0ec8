"""What the search is given: the tables joined, and the choices that are not one group's own."""

from __future__ import annotations

from dataclasses import replace

from autotune import decide
from autotune.search.problem import GroupOptions, Option, Problem

OPTIONS = (
    Option("fp32", "a", 100.0, 0.0, 400),
    Option("w8a16-int8", "b", 60.0, 1e-4, 100),
    Option("w4a16-int4-g32", "c", 40.0, 1e-2, 60),
)
PROBLEM = Problem(tuple(GroupOptions(f"{n}", "o", n, OPTIONS) for n in range(3)), 50.0, 1000)


def offering(*names):
    options = (OPTIONS[0], *(replace(OPTIONS[1], scheme=name) for name in names))
    return replace(PROBLEM, groups=tuple(replace(group, options=options) for group in PROBLEM.groups))


def test_a_configuration_names_every_group():
    assert decide.configuration(PROBLEM, (0, 1, 2)) == {"0": "fp32", "1": "w8a16-int8", "2": "w4a16-int4-g32"}


def test_outer_choices_are_offered_where_there_is_something_to_choose():
    assert decide.outer_choices(PROBLEM) == {}
    groups = decide.outer_choices(offering("w8a16-int8", "w4a16-int4-g32", "w4a16-int4-g64"))
    assert set(groups) == {"scale_group"}
    assert ("w4a16-int4-g32", "w8a16-int8") in groups["scale_group"]
    assert len(groups["scale_group"]) == 3
    activations = decide.outer_choices(offering("w8a16-int8", "w8a8-int8"))
    assert activations == {"activations": (("w8a16-int8", "w8a8-int8"), ("w8a16-int8",))}
