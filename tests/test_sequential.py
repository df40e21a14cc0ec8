"""A configuration compressed again for its own inputs: blocks run one by one, and weights aim at the dense outputs."""

from __future__ import annotations

import pytest
import tiny
import torch

from autotune.compress import database, methods, sequential
from autotune.compress.calibrate import InputStatistics
from autotune.compress.database import WeightDatabase, own_name, scheme_of
from autotune.compress.sequential import Recompression, Settings, target
from autotune.compress.walk import Walk
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.model import load_model, open_model
from autotune.reference_model import ReferenceModel
from autotune.search_space.schemes import scheme
from autotune.switchable import switchable

DOCUMENTS = tiny.tokens(9, 40)
LOSSY = "w4a16-int4-g64"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(opened, folder): a tiny Llama of three blocks whose layers matter, its database as `Made` copies it."""
    home = tmp_path_factory.mktemp("sequential")
    opened = open_model(str(tiny.make_model("llama", home / "model", initializer_range=0.15, num_hidden_layers=3)))
    legal = tiny.space_of(opened.spec, ("w4a8-int4-g64", LOSSY, "2:4"))
    made = database.build(load_model(opened), opened.spec, legal, DOCUMENTS, home / "database")
    return opened, legal, made


class Made:
    """A model on a database of its own, to be compressed again."""

    def __init__(self, world, folder, settings=None, documents=DOCUMENTS):
        self.opened, self.legal, shared = world
        folder.mkdir(exist_ok=True)
        for file in set(shared.entries.values()):
            (folder / file).write_bytes((shared.folder / file).read_bytes())
        self.database = WeightDatabase(folder, dict(shared.entries))
        self.model = ReferenceModel(load_model(self.opened), self.opened.spec, self.database)
        self.groups = self.opened.spec.groups
        self.work = Recompression(self.model, self.database, documents, settings)
        assert self.work.possible()

    def everywhere(self, name):
        return {group.name: name for group in self.groups}

    def error(self, configuration):
        """Mean squared difference of the logits from the dense model's."""
        self.model.select({})
        dense = [self.model.outputs(document) for document in DOCUMENTS]
        self.model.select(configuration)
        apart = [(self.model.outputs(d) - y).square().mean() for d, y in zip(DOCUMENTS, dense, strict=True)]
        return float(sum(apart))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bert", "moe"])
def test_block_by_block_is_the_model_bit_by_bit(models, kind):
    opened = open_model(str(models(kind)))
    walk = Walk(load_model(opened), opened.spec.groups)
    assert walk.faithful(DOCUMENTS[0])
    assert sum(map(len, walk.inside)) + len(walk.outside) == len(opened.spec.groups)


def test_a_model_with_something_between_its_blocks_is_told(models):
    opened = open_model(str(models("llama")))
    model = load_model(opened)
    kept = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: kept.append(output))
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + kept[-1])  # a shortcut over a block
    assert not Walk(model, opened.spec.groups).faithful(DOCUMENTS[0])


def test_the_inputs_shown_are_those_of_the_model(models):
    opened = open_model(str(models("llama")))
    model = load_model(opened)
    walk = Walk(model, opened.spec.groups)
    assert walk.faithful(DOCUMENTS[0])
    expected = {}
    for group in opened.spec.groups:
        module = model.get_submodule(group.members[0].module)
        module.register_forward_pre_hook(lambda _, args, name=group.name: expected.setdefault(name, args[0][0]))
    with torch.no_grad():
        model(DOCUMENTS[0].unsqueeze(0))
    state = walk.enter(DOCUMENTS[0])
    seen = {}
    for number, groups in enumerate((*walk.inside, walk.outside)):
        watch = {g.name: lambda x, name=g.name: seen.setdefault(name, x) for g in groups}
        last = number == len(walk.blocks)
        state = walk.inputs(number, DOCUMENTS[0], state, watch, full=not last)
    assert set(seen) == set(expected)
    assert {name: torch.equal(x, expected[name]) for name, x in seen.items()} == dict.fromkeys(seen, True)
    assert all("forward" not in block.__dict__ for block in walk.blocks)


def moments(x, true):
    return true.t() @ true / len(x), x.t() @ true / len(x)


def test_the_target_makes_up_for_changed_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    mix = torch.randn(16, 16, generator=generator)
    x = torch.randn(4000, 16, generator=generator) @ mix
    true = x * 0.9 + 0.5 * torch.randn(4000, 16, generator=generator)
    found = target(weight, *moments(x, true), 1e-6)
    before, after = ((x @ weight.t() - true @ w.t()).square().mean() for w in (weight, found))
    best = torch.linalg.lstsq(true, x @ weight.t()).solution.t()
    assert after < 0.7 * before
    assert torch.allclose(found, best, atol=2e-3 * float(best.abs().max()))


def test_inputs_that_did_not_change_leave_the_weights():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(target(weight, *moments(x, x), 0.1), weight, atol=1e-5)


def test_many_groups_gain(world, tmp_path):
    made = Made(world, tmp_path / "own")
    chosen = made.everywhere(LOSSY)
    files = made.work.run({"all": chosen})["all"]
    own = sequential.own_entries(made.database, files, chosen)
    assert made.error(own) < 0.8 * made.error(chosen)
    assert set(files) == {group.name for group in made.groups[1:]}  # the first one's inputs are the dense model's
    method, error = made.database.origin(made.groups[3].name, own[made.groups[3].name])
    assert method.endswith(", sequential")
    assert 0 < error < 1


@pytest.mark.parametrize("name", [LOSSY, "w4a8-int4-g64"])
def test_weights_are_made_for_the_inputs_that_come(world, tmp_path, name):
    """Of the second group compressed, worked out by hand, without a target of its own."""
    made = Made(world, tmp_path / "own", Settings(towards=None))
    first, second = made.groups[1], made.groups[4]  # o of the first block, q/k/v of the second
    chosen = made.everywhere("fp32") | {first.name: name, second.name: name}
    files = made.work.run({"two": chosen})["two"]
    assert set(files) == {second.name}
    made.model.select({first.name: name})
    item = scheme(name)
    seen = []
    layer = made.model.layers[second.name][0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for document in DOCUMENTS:
        made.model.outputs(document)
    if item.activation is not None:
        seen = [quantize_activations(x, item.activation) for x in seen]
    aside = [place for place in range(len(seen)) if place % 4 == 3]
    fit, check = (torch.cat([x for n, x in enumerate(seen) if (n in aside) is which]) for which in (False, True))
    hessian = fit.t() @ fit / len(fit)
    inputs = InputStatistics(hessian.diagonal(), hessian, check.t() @ check / len(check), len(check))
    expected = methods.compress("auto", made.model.dense_weight(second), inputs, [item])[0]
    found = dequantize(made.database.load(second, own_name(name, files[second.name])))
    wanted = dequantize(expected.weight)
    assert (found != wanted).float().mean() < 0.01  # sums in another order may tip a weight
    assert (found != dequantize(made.database.load(second, name))).float().mean() > 0.02


def test_configurations_share_what_they_agree_on(world, tmp_path):
    made = Made(world, tmp_path / "own")
    one = made.everywhere(LOSSY)
    two = one | {made.groups[-2].name: "2:4"}  # the last block's down; the head comes after it
    files = made.work.run({"one": one, "two": two})
    same = {g.name for g in made.groups[1:-2]}
    assert {name: files["one"][name] for name in same} == {name: files["two"][name] for name in same}
    assert all(files["one"][g.name] != files["two"][g.name] for g in made.groups[-2:])
    alone = Made(world, tmp_path / "alone")
    again = alone.work.run({"two": two})["two"]
    assert again == files["two"]
    for file in again.values():  # what else was compressed in the same pass changes nothing
        assert (alone.database.folder / file).read_bytes() == (made.database.folder / file).read_bytes()


def test_what_was_made_is_not_made_again(world, tmp_path, monkeypatch):
    made = Made(world, tmp_path / "own")
    chosen = {"all": made.everywhere(LOSSY)}
    files = made.work.run(chosen)["all"]
    content = {name: (made.database.folder / name).read_bytes() for name in files.values()}
    lost = files[made.groups[6].name]
    (made.database.folder / lost).unlink()
    calls, real = [], methods.compress
    monkeypatch.setattr(methods, "compress", lambda *args: calls.append(args) or real(*args))
    again = Made(world, tmp_path / "other")
    for name, data in content.items():
        if name != lost:
            (again.database.folder / name).write_bytes(data)
    assert again.work.run(chosen)["all"] == files
    assert len(calls) == 1
    assert (again.database.folder / lost).read_bytes() == content[lost]


def test_dense_groups_stay_and_a_dense_configuration_has_no_files(world, tmp_path):
    made = Made(world, tmp_path / "own")
    mixed = made.everywhere("fp32") | {made.groups[2].name: LOSSY, made.groups[7].name: "2:4"}
    files = made.work.run({"dense": made.everywhere("fp32"), "mixed": mixed})
    assert files["dense"] == {}
    assert set(files["mixed"]) == {made.groups[7].name}


def test_experts_keep_the_weights_of_the_database(databases, tmp_path):
    opened, legal, shared = databases("moe")
    made = Made((opened, legal, shared), tmp_path / "own", documents=tiny.tokens(4))
    chosen = made.everywhere("w8a16-int8")
    files = made.work.run({"all": chosen})["all"]
    assert set(files) == {group.name for group in opened.spec.groups[1:] if group.experts == 1}


def test_own_weights_run_on_the_kernels(world, tmp_path):
    """Packed when the model is made and packed later are the same, and what the reference computes."""
    made = Made(world, tmp_path / "own")
    table = tiny.fake_profile(made.opened.spec, made.legal, tiny.here(), tiny.WORKLOAD)
    before = WeightDatabase(made.database.folder, dict(made.database.entries))
    late = switchable(made.opened, made.legal, table, tiny.WORKLOAD, before, 2**25)
    chosen = made.everywhere(LOSSY)
    own = sequential.own_entries(made.database, made.work.run({"all": chosen})["all"], chosen)
    early = switchable(made.opened, made.legal, table, tiny.WORKLOAD, made.database, 2**25)
    late.add_own(made.database)
    late.add_own(made.database)  # what is there already is not packed again
    outputs = []
    for model in (made.model, early, late):
        model.select(own)
        outputs.append(model.outputs(DOCUMENTS[0]))
    assert torch.equal(outputs[1], outputs[2])
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()
    late.select(chosen)
    assert not torch.equal(late.outputs(DOCUMENTS[0]), outputs[2])


def test_names_of_own_entries():
    assert own_name("2:4+w8a8-int8", "0123456789abcdef.safetensors") == "2:4+w8a8-int8@0123456789ab"
    assert scheme_of("2:4+w8a8-int8@0123456789ab") == scheme_of("2:4+w8a8-int8") == "2:4+w8a8-int8"
