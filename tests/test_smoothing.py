"""AWQ's and SmoothQuant's scales: found where inputs are loud, folded through the whole loop, else left."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import autotune
from autotune.compress import smoothing
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.export import compressed_tensors
from autotune.folding import Site, sites
from autotune.model import load_model, open_model
from autotune.reference_model import ReferenceModel
from autotune.search_space.schemes import scheme
from autotune.tune import tune

W8A8, INT4 = scheme("w8a8-int8"), scheme("w4a16-int4-g64")
LOUD = 32.0  # a power of two, so that the loud model is the other one bit by bit


def make_loud(source, folder):
    """Three outputs of every norm are loud, and the weights that read them small."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    every = torch.ones(64)
    every[[5, 23, 41]] = LOUD
    readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    readers["post_attention_layernorm"] = ("mlp.gate_proj", "mlp.up_proj")
    for name in [name for name in tensors if name.removesuffix(".weight").endswith("layernorm")]:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        tensors[name] *= every
        for reader in readers[norm]:
            tensors[f"{block}.{reader}.weight"] /= every
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoothing")
    tiny.make_model("llama", folder / "quiet", initializer_range=0.15)
    make_loud(folder / "quiet", folder / "loud")
    tiny.write_documents(folder / "data.jsonl", 24, 60)
    return folder


def chosen(folder, mode, schemes=(W8A8, INT4)):
    opened = open_model(str(folder))
    model = load_model(opened)
    documents = tiny.tokens(8, 60)
    places = sites(model, opened.spec.groups, documents[0], opened.spec.tied_embeddings)
    formats = {group.name: list(schemes) for group in opened.spec.groups}
    return smoothing.choose(model, opened.spec.groups, places, formats, documents, mode)


@torch.inference_mode()
def outputs(model):
    return model(torch.arange(12).view(1, -1)).logits


def test_the_loud_model_is_the_same_function(home):
    quiet, loud = (load_model(open_model(str(home / name))) for name in ("quiet", "loud"))
    assert torch.equal(outputs(quiet), outputs(loud))


def test_loud_inputs_are_found_and_quiet_ones_left(home):
    found = chosen(home / "loud", "auto")
    groups = {choice.fold.site.group for choice in found}
    wanted = {f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.qkv", "mlp.gate_up")}
    assert wanted <= groups
    for choice in found:
        assert choice.left < smoothing.MARGIN and choice.worst < smoothing.WORSE
    for choice in found:
        if choice.fold.site.group in wanted:
            exponents = torch.tensor(choice.fold.exponents)
            others = torch.ones(64, dtype=torch.bool)
            others[[5, 23, 41]] = False
            assert exponents[~others].min() > exponents[others].float().mean() + 1
    assert not wanted & {choice.fold.site.group for choice in chosen(home / "quiet", "auto")}


def test_the_modes(home):
    awq, smooth = chosen(home / "loud", "awq"), chosen(home / "loud", "smoothquant")
    assert awq and all(choice.kind.startswith("AWQ ") for choice in awq)
    assert all(choice.left < 1 for choice in awq)
    assert smooth and all(choice.kind == "SmoothQuant 0.5" for choice in smooth)
    with pytest.raises(InputError, match="no smoothing 'awk'") as error:
        smoothing.check("awk")
    assert "awq" in error.value.hint


def test_nothing_to_round_nothing_to_scale(home):
    assert chosen(home / "loud", "awq", (scheme("2:4"), scheme("fp32"))) == []


def test_smoothquants_scale():
    """s = sqrt(max|x| / max|w|), centred, to the nearest power of two."""
    place = Site("g", "n", ("g",))
    inputs = smoothing._Inputs(torch.ones(4), torch.tensor([1.0, 4.0, 64.0, 1.0]), torch.ones(4), torch.ones(2, 4))
    weight = torch.tensor([[1.0, -1.0, 1.0, 4.0], [0.5, 0.5, -0.5, 1.0]])
    ((_, scale),) = smoothing._candidates(weight, inputs, place, "smoothquant")
    assert torch.allclose(scale, torch.tensor([1.0, 2.0, 8.0, 0.5]))
    assert smoothing._exponents(scale) == (-1, 0, 2, -2)


def test_an_input_that_is_never_used_is_scaled_like_the_quietest():
    assert smoothing._floored(torch.tensor([0.0, 2.0, 0.5])).tolist() == [0.5, 2.0, 0.5]
    assert smoothing._floored(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_one_format_of_a_kind_is_judged_by():
    names = ("w4a16-int4-g32", "w4a16-int4-g128", "w4a8-int4-g64", "w8a8-int8", "2:4", "2:4+w8a8-int8")
    found = smoothing._formats([scheme(name) for name in names])
    assert [item.name for item in found] == ["w4a16-int4-g128", "w4a8-int4-g64", "w8a8-int8"]


# The whole loop.


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        yield


def config_of(home, out, **changes):
    values = {"max_loss": 0.5, "trials": 2, "calibration_tokens": 600, "finalists": 1}
    values |= {"schemes": ("w8a8-int8", "w4a16-int4-g64")}
    return RunConfig.of(**tiny.settings(home / "loud", out, home / "data.jsonl", **(values | changes)))


@pytest.fixture(scope="module")
def finished(home):
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(config_of(home, home / "run"))


def uniform_kl(result, name):
    """On the search documents, of one scheme everywhere."""
    problem = result.problem
    reference = ReferenceModel(result.session.reference(), result.session.spec, result.database)
    from autotune.teacher import Teacher

    groups = {group.name: name for group in problem.groups if (group.name, name) in result.database.entries}
    return Teacher(reference, result.session.search_documents, (1.0,)).measure(groups).kl_nats


def test_losses_fall_by_a_large_factor(finished, home, tmp_path):
    off = tune(config_of(home, tmp_path / "off", smoothing="off", trials=0), until="score")
    assert off.smoothed == () and off.session.opened.folds == ()
    on = tune(config_of(home, home / "run"), until="search")
    off.problem = on.problem
    for name in ("w8a8-int8", "w4a16-int4-g64"):
        assert uniform_kl(on, name) < 0.5 * uniform_kl(off, name)


def test_plan_and_report_say_what_was_folded(finished):
    rows = finished.report["smoothing"]["groups"]
    assert {row["group"] for row in rows} == {site.group for site in finished.plan.smoothing.sites}
    assert finished.report["smoothing"]["mode"] == "auto"
    assert all(row["left"] < smoothing.MARGIN for row in rows)


def test_saved_applied_and_exported_models_are_the_certified_one(finished, home, tmp_path):
    loaded = autotune.load(home / "run")
    applied = autotune.apply(load_model(open_model(str(home / "loud"))), home / "run")
    assert torch.equal(outputs(loaded), outputs(applied))
    reference = ReferenceModel(
        finished.session.reference(),
        finished.session.spec,
        finished.chosen.weights(finished.database, finished.plan.configuration),
    )
    reference.select(finished.plan.configuration)
    expected = reference.outputs(torch.arange(12))
    assert (outputs(loaded)[0] - expected).norm() < 0.02 * expected.norm()
    compressed_tensors.write(home / "run", tmp_path / "out")
    read = compressed_tensors.read(tmp_path / "out")
    inputs = {module: weight for module, weight in read.items() if module.endswith("gate_proj")}
    folded = load_model(finished.session.opened)
    plain = load_model(open_model(str(home / "loud")))
    for module, weight in inputs.items():
        near, far = ((weight.float() - m.get_submodule(module).weight).norm() for m in (folded, plain))
        assert near < 0.3 * far


def test_a_refused_model_is_left_as_it_was(finished, home):
    model = load_model(open_model(str(home / "quiet")))
    model.model.layers[0].self_attn.q_proj.weight.data.normal_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        autotune.apply(model, home / "run")
    assert error.value.code == "plan.model_mismatch"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_run_that_goes_on_finds_its_scales(finished, home, tmp_path, monkeypatch):
    out = shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.setattr(smoothing, "choose", lambda *_: pytest.fail("looked again"))
    again = tune(config_of(home, out))
    assert again.plan == finished.plan
    assert again.session.opened.folds == finished.session.opened.folds


def test_the_other_scales_make_another_database(finished, home, tmp_path):
    out = shutil.copytree(home / "run", tmp_path / "run")
    other = tune(config_of(home, out, smoothing="off"), until="score")
    assert not set(other.database.entries.values()) & set(finished.database.entries.values())


def test_an_exponent_that_was_edited_is_refused(finished, home, tmp_path):
    out = shutil.copytree(home / "run", tmp_path / "run")
    plan = finished.plan.model_copy(
        update={"smoothing": finished.plan.smoothing.model_copy(update={"exponents": "0" * 64})}
    )
    plan.save(out / "plan.json")
    plan.save(out / "model" / "plan.json")
    with pytest.raises(InputError) as error:
        autotune.apply(load_model(open_model(str(home / "loud"))), out)
    assert error.value.code == "apply.weights"
