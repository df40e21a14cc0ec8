"""The weight database: canonical codes of every entry, built once, found again, exact through storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from autotune.compress import database, wanda
from autotune.compress.calibrate import input_moments
from autotune.compress.database import WeightDatabase, compress, pack, stacked_bias, stacked_weight, unpack
from autotune.errors import InputError
from autotune.kernels.reference import dequantize
from autotune.model import load_model
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.schemes import SCHEMES, scheme

COMPRESSED = [item.name for item in SCHEMES if not item.is_dense]


def weight_of(rows=16, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", COMPRESSED)
def test_storage_is_exact(name):
    made = compress(weight_of(), torch.rand(256), scheme(name))
    back = unpack(scheme(name), 256, pack(made), None)
    assert torch.equal(dequantize(back), dequantize(made))
    assert back.scheme == name
    if made.codes is not None:
        assert torch.equal(back.codes.float(), made.codes.float())
        assert torch.equal(back.scales, made.scales)


@pytest.mark.parametrize("name", COMPRESSED)
def test_storage_takes_the_bits_the_scheme_says(name):
    stored = sum(tensor.nbytes for tensor in pack(compress(weight_of(), None, scheme(name))).values())
    per_row = 2 * 16 if scheme(name).weight.group_size is None and scheme(name).weight.bits < 16 else 0
    assert stored == scheme(name).bits_per_weight * 16 * 256 / 8 + per_row


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_error_is_that_of_the_bits(name):
    weight = weight_of()
    error = float((dequantize(compress(weight, None, scheme(name))) - weight).norm() / weight.norm())
    limit = {4: 0.13, 8: 0.04, 16: 0.002}[scheme(name).weight.bits]
    assert 0 < error < (0.5 if scheme(name).sparsity == "2:4" else limit)


@pytest.mark.parametrize("name", [name for name in COMPRESSED if name.startswith("2:4")])
def test_sparse_schemes_have_two_zeros_in_every_four(name):
    values = dequantize(compress(weight_of(), torch.rand(256), scheme(name)))
    assert int((values.view(16, -1, 4) != 0).sum(-1).max()) <= 2


def test_every_usable_entry_is_in_the_database(databases):
    _, space, made = databases("llama")
    assert set(made.entries) == {(e.group, e.scheme) for e in space.usable() if e.scheme != space.dense}
    assert made.bytes == sum(path.stat().st_size for path in made.folder.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_entry_is_the_stacked_group_under_its_scheme(databases, name):
    opened, space, made = databases(name)
    model = load_model(opened)
    moments = input_moments(model, opened.spec, tiny.tokens(4))
    for entry in space.usable():
        if entry.scheme == space.dense:
            continue
        group = opened.spec.group(entry.group)
        expected = compress(stacked_weight(model, group), moments[group.name], scheme(entry.scheme))
        assert torch.equal(dequantize(made.load(group, entry.scheme)), dequantize(expected))


def test_rows_of_an_entry_are_rows_of_the_whole(databases):
    opened, space, made = databases("gpt2")
    for entry in space.usable():
        if entry.scheme == space.dense:
            continue
        group = opened.spec.group(entry.group)
        bias = torch.arange(float(group.out_features))
        rows = slice(5, group.out_features - 3)
        whole, part = made.load(group, entry.scheme, bias), made.load(group, entry.scheme, bias, rows)
        assert torch.equal(dequantize(part), dequantize(whole)[rows])
        assert torch.equal(part.bias, bias[rows])


@pytest.mark.parametrize("name", COMPRESSED)
def test_rows_of_every_scheme(name, tmp_path):
    from safetensors.torch import save_file

    group = LayerGroup("g", "up", 0, (Linear("t", "m", 16, 256, False),))
    save_file(pack(compress(weight_of(), None, scheme(name))), tmp_path / "entry")
    made = WeightDatabase(tmp_path, {("g", name): "entry"})
    whole, part = made.load(group, name), made.load(group, name, rows=slice(4, 9))
    assert torch.equal(dequantize(part), dequantize(whole)[4:9])


def test_what_is_there_is_not_made_again(databases, monkeypatch):
    opened, space, made = databases("llama")
    model = load_model(opened)
    moments = input_moments(model, opened.spec, tiny.tokens(4))

    def refuse(*_):
        raise AssertionError("compressed again")

    monkeypatch.setattr(database, "compress", refuse)
    again = database.build(model, opened.spec, space, moments, made.folder)
    assert again.entries == made.entries


def test_names_depend_on_what_the_codes_depend_on(databases, tmp_path, monkeypatch):
    opened, space, made = databases("llama")
    model, spec = load_model(opened), opened.spec
    one = replace(space, entries=tuple(entry for entry in space.entries if entry.scheme == "w8a16-int8"))
    moments = input_moments(model, spec, tiny.tokens(4))

    def names(spec=spec, moments=moments):
        return set(database.build(model, spec, one, moments, tmp_path).entries.values())

    same = names()
    assert same <= set(made.entries.values())
    assert not names(spec=replace(spec, model_hash="other")) & same
    assert not names(moments={name: value * 2 for name, value in moments.items()}) & same
    monkeypatch.setattr(database, "METHOD", "other/1")
    assert not names() & same


def test_schemes_that_differ_in_their_activations_alone_share_a_file(databases):
    made = databases("llama")[2]
    stored = {key: (key[0], scheme(key[1]).sparsity, scheme(key[1]).weight) for key in made.entries}
    assert len(set(stored.values())) == len(set(made.entries.values())) < len(made.entries)
    for key, other in ((a, b) for a in stored for b in stored):
        assert (stored[key] == stored[other]) is (made.entries[key] == made.entries[other])


def test_a_mask_that_is_known_changes_nothing():
    moment = torch.rand(256, generator=torch.Generator().manual_seed(1))
    item, weight = scheme("2:4+w8a8-int8"), weight_of()
    expected = compress(weight, moment, item)
    found = compress(weight, moment, item, wanda.mask_24(weight, moment))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_an_interrupted_build_goes_on_where_it_stopped(databases, tmp_path):
    opened, space, made = databases("llama")
    model = load_model(opened)
    moments = input_moments(model, opened.spec, tiny.tokens(4))

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        database.build(model, opened.spec, space, moments, tmp_path, stop)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert 2 <= len(first) <= 5  # schemes may share a file
    assert database.build(model, opened.spec, space, moments, tmp_path).entries == made.entries
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in first} == first


def test_an_entry_that_was_not_made_is_an_error(databases):
    opened, _, made = databases("llama")
    with pytest.raises(InputError, match="2:4") as error:
        made.load(opened.spec.groups[0], "2:4")
    assert error.value.code == "database.missing"


def test_rows_are_stacked_in_member_order_and_transposed_storage_is_undone(databases):
    for name in ("llama", "gpt2"):
        opened, _, _ = databases(name)
        model, group = load_model(opened), opened.spec.groups[0]
        x = torch.randn(3, group.in_features)
        modules = [model.get_submodule(member.module) for member in group.members]
        expected = torch.cat([module(x) for module in modules], -1)
        bias = stacked_bias(model, group, torch.float32)
        y = x @ stacked_weight(model, group).T + (0 if bias is None else bias)
        assert torch.allclose(y, expected, atol=1e-6)
        assert (bias is None) == (name == "llama")


def test_members_without_a_bias_get_zeros(databases):
    opened, _, _ = databases("llama")
    model, group = load_model(opened), opened.spec.groups[0]
    module = model.get_submodule(group.members[1].module)
    module.bias = torch.nn.Parameter(torch.ones(group.members[1].out_features))
    members = (group.members[0], replace(group.members[1], bias=True), group.members[2])
    bias = stacked_bias(model, replace(group, members=members), torch.float32)
    assert bias.tolist() == [0.0] * 64 + [1.0] * 32 + [0.0] * 32


def test_moments_are_mean_squares_of_what_the_group_reads(databases):
    opened, _, _ = databases("llama")
    model, documents = load_model(opened), tiny.tokens(3, 10)
    moments = input_moments(model, opened.spec, documents)
    seen = []
    head = opened.spec.group("lm_head")
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for document in documents:
            model(document.unsqueeze(0))
    handle.remove()
    assert torch.allclose(moments[head.name], torch.cat(seen).square().mean(0), rtol=1e-5)
    assert set(moments) == {group.name for group in opened.spec.groups}
    assert not model.lm_head._forward_pre_hooks
