"""The weight database: canonical codes of every entry, built once, found again, exact through storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from autotune.compress import database, methods
from autotune.compress.calibrate import input_statistics
from autotune.compress.database import WeightDatabase, pack, stacked_bias, stacked_weight, unpack
from autotune.errors import InputError
from autotune.kernels.reference import dequantize
from autotune.model import load_model
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.schemes import MORE, SCHEMES, scheme, survivors

COMPRESSED = [item.name for item in (*SCHEMES, *MORE) if not item.is_dense]


def weight_of(rows=16, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", COMPRESSED)
def test_storage_is_exact(name):
    made = tiny.rounded(weight_of(), torch.rand(256), scheme(name))
    back = unpack(scheme(name), 256, pack(made), None)
    assert torch.equal(dequantize(back), dequantize(made))
    assert back.scheme == name
    if made.codes is not None:
        assert torch.equal(back.codes.float(), made.codes.float())
        assert torch.equal(back.scales, made.scales)


@pytest.mark.parametrize("name", COMPRESSED)
def test_storage_takes_the_bits_the_scheme_says(name):
    stored = sum(tensor.nbytes for tensor in pack(tiny.rounded(weight_of(), None, scheme(name))).values())
    assert stored == scheme(name).stored_bytes(16, 256)


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        ("w8a16-int8", 16 * 256 + 16 * 2),
        ("w8a8-fp8-tensor", 16 * 256 + 2),
        ("w8a8-fp8-128x128", 16 * 256 + 2 * 2),  # 16 rows are one block of 128, 256 inputs are two
        ("w4a16-int4-g128", 16 * 128 + 16 * 2 * 2),
        ("w4a16-int4-g128-asym", 16 * 128 + 16 * 2 * 2 + 16),  # two zero points of four bits a row
        ("w3a16-int3-g64", 16 * 96 + 16 * 4 * 2),
        ("w2a16-int2-g32-asym", 16 * 64 + 16 * 8 * 2 + 16 * 2),
        ("w4a16-nf4-g64", 16 * 128 + 16 * 4 * 2),
        ("w4a16-mxfp4", 16 * 128 + 16 * 8),
        ("w4a16-nvfp4", 16 * 128 + 16 * 16 + 4),
        ("2:4", 16 * 128 * 2 + 16 * 32),
        ("4:8+w8a16-int8", 16 * 128 + 16 * 32 + 16 * 2),
        ("50%+w4a16-int4-g128", 16 * 64 + 16 * 32 + 16 * 2 * 2),
    ],
)
def test_bytes_counted_by_hand(name, bytes_):
    assert scheme(name).stored_bytes(16, 256) == bytes_


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_error_is_that_of_the_bits(name):
    weight = weight_of()
    error = float((dequantize(tiny.rounded(weight, None, scheme(name))) - weight).norm() / weight.norm())
    limit = {2: 0.5, 3: 0.25, 4: 0.13, 8: 0.04, 16: 0.002}[scheme(name).weight.bits]
    assert 0 < error < (limit if scheme(name).sparsity == "dense" else 0.5)


@pytest.mark.parametrize("name", [name for name in COMPRESSED if scheme(name).sparsity != "dense"])
def test_sparse_schemes_keep_what_their_pattern_says(name):
    item = scheme(name)
    values = dequantize(tiny.rounded(weight_of(), torch.rand(256), item))
    kept = (values.view(16, -1, item.block or 256) != 0).sum(-1)
    assert int(kept.max()) <= survivors(item.sparsity, item.block or 256)


def test_every_usable_entry_is_in_the_database(databases):
    _, space, made = databases("llama")
    assert set(made.entries) == {(e.group, e.scheme) for e in space.usable() if e.scheme != space.dense}
    assert made.bytes == sum(path.stat().st_size for path in made.folder.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_entry_is_the_stacked_group_under_its_scheme(databases, name):
    opened, space, made = databases(name)
    model = load_model(opened)
    statistics = input_statistics(model, opened.spec.groups, tiny.tokens(4))
    for group in opened.spec.groups:
        weight = stacked_weight(model, group)
        items = [scheme(entry.scheme) for entry in space.schemes(group.name) if entry.scheme != space.dense]
        for item, expected in zip(items, methods.compress("auto", weight, statistics[group.name], items), strict=True):
            found = dequantize(made.load(group, item.name))
            assert torch.equal(found, dequantize(expected.weight))
            method, error = made.origin(group.name, item.name)
            assert method == expected.method
            power = statistics[group.name].output_power
            assert error == power(found - weight) / power(weight)


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

    rows = 300 if scheme(name).weight.rows == 128 else 16
    group = LayerGroup("g", "up", 0, (Linear("t", "m", rows, 256, False),))
    save_file(pack(tiny.rounded(weight_of(rows), None, scheme(name))), tmp_path / "entry")
    made = WeightDatabase(tmp_path, {("g", name): "entry"})
    for part in (slice(4, 9), slice(rows // 2, rows)):
        assert torch.equal(dequantize(made.load(group, name, rows=part)), dequantize(made.load(group, name))[part])


def test_what_is_there_is_not_made_again(databases, monkeypatch):
    opened, space, made = databases("llama")
    model = load_model(opened)

    def refuse(*_):
        raise AssertionError("compressed again")

    monkeypatch.setattr(methods, "compress", refuse)
    again = database.build(model, opened.spec, space, tiny.tokens(4), made.folder)
    assert again.entries == made.entries


def test_names_depend_on_what_the_codes_depend_on(databases, tmp_path, monkeypatch):
    opened, space, made = databases("llama")
    model, spec = load_model(opened), opened.spec
    one = replace(space, entries=tuple(entry for entry in space.entries if entry.scheme == "w8a16-int8"))

    def names(spec=spec, count=4, method="auto"):
        return set(database.build(model, spec, one, tiny.tokens(count), tmp_path, method).entries.values())

    same = names()
    assert same <= set(made.entries.values())
    assert not names(spec=replace(spec, model_hash="other")) & same
    assert not names(count=5) & same
    assert not names(method="wanda") & same
    monkeypatch.setattr(database, "METHOD", "other/1")
    assert not names() & same


def test_schemes_that_differ_in_their_activations_alone_share_a_file(databases):
    made = databases("llama")[2]
    stored = {key: (key[0], scheme(key[1]).sparsity, scheme(key[1]).weight) for key in made.entries}
    assert len(set(stored.values())) == len(set(made.entries.values())) < len(made.entries)
    for key, other in ((a, b) for a in stored for b in stored):
        assert (stored[key] == stored[other]) is (made.entries[key] == made.entries[other])


def test_an_interrupted_build_goes_on_where_it_stopped(databases, tmp_path):
    opened, space, made = databases("llama")
    model = load_model(opened)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        database.build(model, opened.spec, space, tiny.tokens(4), tmp_path, progress=stop)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    begun = {group.name for group in opened.spec.groups[:2]}
    assert set(first) == {name for (group, _), name in made.entries.items() if group in begun}
    assert database.build(model, opened.spec, space, tiny.tokens(4), tmp_path).entries == made.entries
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


def seen_by(module, model, documents):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for document in documents:
            model(document.unsqueeze(0))
    handle.remove()
    return torch.cat(seen)


def test_statistics_are_moments_of_what_the_group_reads(databases):
    opened, _, _ = databases("llama")
    model, documents = load_model(opened), tiny.tokens(5, 10)
    head = opened.spec.group("lm_head")
    fit = seen_by(model.lm_head, model, [*documents[:3], documents[4]])
    check = seen_by(model.lm_head, model, documents[3:4])
    found = input_statistics(model, opened.spec.groups, documents)
    assert set(found) == {group.name for group in opened.spec.groups}
    assert torch.allclose(found[head.name].hessian, fit.T @ fit / len(fit), rtol=1e-4, atol=1e-6)
    assert torch.allclose(found[head.name].check, check.T @ check / len(check), rtol=1e-4, atol=1e-6)
    assert torch.equal(found[head.name].moment, found[head.name].hessian.diagonal())
    assert not model.lm_head._forward_pre_hooks


def test_without_hessians_all_documents_make_the_moment(databases):
    opened, _, _ = databases("llama")
    model, documents = load_model(opened), tiny.tokens(3, 10)
    seen = seen_by(model.lm_head, model, documents)
    found = input_statistics(model, opened.spec.groups, documents, hessians=False)["lm_head"]
    assert torch.allclose(found.moment, seen.square().mean(0), rtol=1e-5)
    assert found.fit is None
    assert found.output_power(torch.ones(2, 2)) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_are_enough(databases, count):
    opened, _, _ = databases("llama")
    found = input_statistics(load_model(opened), opened.spec.groups, tiny.tokens(count))["lm_head"]
    assert bool(found.hessian.diagonal().gt(0).all())
    assert bool(found.check.diagonal().gt(0).all())


def test_groups_are_taken_in_waves_that_fit(databases, tmp_path, monkeypatch):
    opened, space, made = databases("llama")
    monkeypatch.setattr(database, "_STATISTICS_BYTES", 8 * 64**2 * 2)
    waves = list(database._waves(opened.spec.groups))
    assert [group for wave in waves for group in wave] == list(opened.spec.groups)
    assert all(len(wave) <= 2 for wave in waves)
    again = database.build(load_model(opened), opened.spec, space, tiny.tokens(4), tmp_path)
    assert again.entries == made.entries
    for name in set(made.entries.values()):
        assert (tmp_path / name).read_bytes() == (made.folder / name).read_bytes()
