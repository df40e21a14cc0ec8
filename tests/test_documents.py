"""Whole documents, dealt to splits once and for all; never one document in two splits."""

from __future__ import annotations

import json
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune import documents
from autotune.documents import MAX_DOCUMENT_TOKENS, SPLITS, read, take
from autotune.errors import InputError


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def texts(split):
    """Byte tokens back to text."""
    return [bytes(item.tolist()).decode() for item in split]


def many(count=60):
    return [{"text": f"document number {number}"} for number in range(count)]


def refusal(path) -> InputError:
    with pytest.raises(InputError) as error:
        read(path, None, 256)
    return error.value


def test_stated_splits_are_kept(tmp_path):
    rows = [{"text": f"{split} {n}", "split": split} for split in SPLITS for n in range(2)]
    found = read(write(tmp_path, rows), None, 256)
    for split in SPLITS:
        assert texts(getattr(found, split)) == [f"{split} 0", f"{split} 1"]


def test_without_stated_splits_the_text_decides(tmp_path):
    found = read(write(tmp_path, many()), None, 256)
    shuffled = read(write(tmp_path, many()[::-1], "other.jsonl"), None, 256)
    for split in SPLITS:
        assert sorted(texts(getattr(found, split))) == sorted(texts(getattr(shuffled, split)))
    assert 15 <= len(found.certification) <= 45
    assert sum(len(getattr(found, split)) for split in SPLITS) == 60


def test_equal_texts_are_in_one_split_only(tmp_path):
    rows = [{"text": f"{split} {n}", "split": split} for split in SPLITS for n in range(2)]
    copies = [{"text": "the same", "split": split} for split in SPLITS]
    found = read(write(tmp_path, [*copies, *rows, copies[2]]), None, 256)
    assert [texts(getattr(found, split)).count("the same") for split in SPLITS] == [1, 0, 0]


def test_a_document_is_cut_at_the_limits(tmp_path):
    rows = [{"text": f"{n}" + "x" * 3000, "split": split} for split in SPLITS for n in (1, 2)]
    rows = [row | {"text": row["split"] + row["text"]} for row in rows]
    path = write(tmp_path, rows)
    assert {len(item) for item in read(path, None, 256).search} == {MAX_DOCUMENT_TOKENS}
    assert {len(item) for item in read(path, None, 256, longest=64).search} == {64}


def test_bytes_stand_in_for_tokens_and_are_said_to(tmp_path):
    found = read(write(tmp_path, many()), None, 100)
    assert "bytes" in found.tokens
    assert max(int(item.max()) for item in found.search) < 100


def test_a_tokenizer_is_used_and_named(tmp_path):
    class Words:
        def __call__(self, text, add_special_tokens, truncation, max_length):
            return {"input_ids": [len(word) for word in text.split()][:max_length]}

    found = read(write(tmp_path, many()), Words(), 256)
    assert found.tokens == "Words"
    assert set(found.search[0].tolist()) <= {1, 2, 6, 8}


def test_a_text_file_is_cut_at_its_separators(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n---\n".join(f"text {n}" for n in range(60)))
    found = read(path, None, 256)
    together = [text for split in SPLITS for text in texts(getattr(found, split))]
    assert sorted(together) == sorted(f"text {n}" for n in range(60))


def test_a_text_file_without_separators_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "data.txt"
    paragraphs = [string.ascii_letters * 20 + str(n) for n in range(120)]
    path.write_text("\n\n".join(paragraphs))
    pieces = documents._pieces(path.read_text())
    assert "".join(pieces).split() == paragraphs
    assert all(4000 <= len(piece) <= 6000 for piece in pieces[:-1])


def test_a_folder_is_one_document_a_file(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"file {number}")
    found = read(tmp_path, None, 256)
    assert sum(len(getattr(found, split)) for split in SPLITS) == 60


def test_line_separators_inside_a_text_do_not_end_it(tmp_path):
    """U+2028, U+0085 and the like are legal in JSON strings; `str.splitlines` would cut there."""
    rows = [{"text": f"{split} {n} \u2028 \u0085 \u2029 end", "split": split} for split in SPLITS for n in range(2)]
    found = read(write(tmp_path, rows), None, 256)
    assert texts(found.search)[0] == "search 0 \u2028 \u0085 \u2029 end"


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "5", '"text"', "{}", '{"text": 5}', '{"text": "a", "split": "train"}', "[" * 100_000, '{"txt": "a"}'],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line)
    error = refusal(path)
    assert error.code == "data.syntax"
    assert "line 3" in error.message
    assert error.hint


def test_what_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "a.txt", tmp_path):
        error = refusal(path)
        assert error.code == "data.syntax"
        assert "a.txt" in error.message


def test_an_absent_file_is_refused(tmp_path):
    assert refusal(tmp_path / "gone.jsonl").code == "data.missing"


@pytest.mark.parametrize("rows", [[], many(2), [{"text": t} for t in "abcdefghijklmnopqrstuvwxyz"], [{"text": ""}] * 9])
def test_too_few_documents_is_an_error_not_a_weak_claim(tmp_path, rows):
    """Documents of one token do not count: nothing in them is predicted."""
    error = refusal(write(tmp_path, rows))
    assert error.code == "data.too_few"
    assert "12" in error.hint


def test_the_digest_is_of_the_text_and_its_split(tmp_path):
    first = read(write(tmp_path, many(), "a.jsonl"), None, 256)
    assert read(write(tmp_path, many(), "b.jsonl"), None, 256).digest == first.digest
    assert read(write(tmp_path, many(61), "c.jsonl"), None, 256).digest != first.digest


def test_the_bundled_text_is_there_and_says_that_it_is_not_the_users():
    found = read(None, None, 256)
    assert "not your task" in found.name
    assert len(found.certification) >= 150  # what certification wants
    sets = [{tuple(item.tolist()) for item in getattr(found, split)} for split in SPLITS]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 400), st.integers(2, 30))
def test_take_stops_once_it_has_enough(lengths, wanted, length):
    made = [torch.zeros(n) for n in lengths]
    taken = take(made, wanted, length)
    sizes = [len(item) for item in taken]
    assert sizes == [min(n, length) for n in lengths[: len(sizes)]]
    assert len(sizes) == len(lengths) or sum(sizes) >= wanted
    assert sum(sizes[:-1]) < wanted
