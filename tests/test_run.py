"""Stages of a run folder: done once for equal inputs, done again for others, never vouched for when half-written."""

from __future__ import annotations

import pytest

from autotune.errors import InputError
from autotune.run import RunFolder


class Stage:
    def __init__(self, folder):
        self.folder = RunFolder(folder)
        self.made = 0

    def __call__(self, inputs, result=None, complete=True):
        def compute():
            self.made += 1
            return inputs if result is None else result

        return self.folder.json_stage("stage", inputs, compute, lambda v: v, lambda v: v, lambda _: complete)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_equal_inputs_do_nothing_again(stage, tmp_path):
    assert stage({"a": 1}) == stage({"a": 1}) == Stage(tmp_path)({"a": 1}) == {"a": 1}
    assert stage.made == 1


def test_other_inputs_are_computed(stage):
    assert [stage(1), stage(2), stage(1)] == [1, 2, 1]
    assert stage.made == 3


def test_a_result_cut_short_is_kept_but_computed_again(stage, tmp_path):
    stage(1, complete=False)
    assert (tmp_path / "stage.json").is_file()
    stage(1)
    stage(1)
    assert stage.made == 2


def test_a_failure_leaves_no_record(stage, tmp_path):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage.folder.stage("stage", 1, fail, lambda _: None, lambda: None)
    assert stage.folder.records() == {}
    assert list(tmp_path.iterdir()) == []


def test_killed_between_artifact_and_record_the_old_inputs_do_not_get_the_new_artifact(stage, monkeypatch):
    stage("first")

    def die(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        record = RunFolder.record
        patch.setattr(RunFolder, "record", lambda self, name, key, s: record(self, name, key, s) if s == 0 else die())
        with pytest.raises(SystemExit):
            stage("second")
    assert stage("first") == "first"


def test_it_knows_how_long_stages_took(stage):
    stage(1)
    assert stage.folder.seconds().keys() == {"stage"}


def test_a_damaged_record_is_one_message(stage, tmp_path):
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(InputError) as error:
        stage(1)
    assert error.value.code == "run.syntax"
