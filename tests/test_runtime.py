"""Compressed models: applied, saved and loaded to identical outputs; what does not fit is refused before a change."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import autotune
from autotune import runtime
from autotune.errors import DeviceError, InputError
from autotune.model import load_model
from autotune.plan import GroupEntry, Limits, ModelRef, Plan, Prediction, Provenance, SchemeSpec, TensorEntry
from autotune.switchable import switchable

IDS = torch.arange(12).view(1, 12)


def plan_of(opened, table, configuration, **model_changes):
    """A plan that says `configuration`; its numbers are made up."""
    spec = opened.spec
    chosen = {group.name: configuration.get(group.name, spec.dtype) for group in spec.groups}
    model = {"name": spec.name, "architecture": spec.architecture, "task": spec.task, "dtype": spec.dtype}
    model |= {"sha256": spec.model_hash, "tied_embeddings": spec.tied_embeddings}
    groups, tensors = [], []
    for group in spec.groups:
        kernel = table.best(group, chosen[group.name], tiny.WORKLOAD).kernel
        groups.append(
            GroupEntry(
                name=group.name,
                role=group.role,
                layer=group.layer,
                kernel=kernel,
                predicted_latency_us=1.0,
                latency_status="measured",
                predicted_loss_nats=None,
                weight_bytes=1,
            )
        )
        for member in group.members:
            entry = {"tensor": member.tensor, "module": member.module, "group": group.name, "reason": "test"}
            shape = (member.out_features, member.in_features)
            name = chosen[group.name]
            tensors.append(TensorEntry(shape=shape, scheme=None if name == spec.dtype else name, **entry))
    prediction = {"latency_us": 1.0, "dense_latency_us": 2.0, "loss_nats": None, "search_kl_nats": None}
    hashes = {"latency_table": "", "loss_table": None, "documents": None, "kernels": {}, "packages": {}}
    return Plan(
        generator="test",
        model=ModelRef(**(model | model_changes)),
        target="here",
        runtime="test",
        workload="test",
        budget=Limits(max_loss=None, max_memory_bytes=None, min_speedup=None),
        schemes={name: SchemeSpec.of(name) for name in sorted(set(chosen.values()))},
        groups=tuple(groups),
        tensors=tuple(tensors),
        kept=(),
        prediction=Prediction(weight_bytes=1, dense_weight_bytes=1, **prediction),
        provenance=Provenance(seed=0, trials=0, **hashes),
    )


class Saved:
    """A model under a mixed plan: switched in memory, and saved to a folder."""

    def __init__(self, databases, name, folder, everything=False):
        self.opened, self.space, self.database = databases(name)
        self.table = tiny.fake_profile(self.opened.spec, self.space, tiny.here(), tiny.WORKLOAD)
        self.configuration = {}
        for number, group in enumerate(self.opened.spec.groups):
            names = [entry.scheme for entry in self.space.schemes(group.name)]
            pick = names[1:][number % len(names[1:])] if everything or number % 3 else names[0]
            self.configuration[group.name] = pick
        self.plan = plan_of(self.opened, self.table, self.configuration)
        self.live = switchable(self.opened, self.space, self.table, tiny.WORKLOAD, self.database, 2**25)
        self.folder = folder / name
        self.live.save(self.folder, self.opened, self.plan, self.database)

    def expected(self):
        self.live.select(self.configuration)
        return outputs(self.live.model)


@torch.inference_mode()
def outputs(model):
    output = model(IDS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.fixture(scope="module")
def saved(databases, tmp_path_factory):
    made = {}

    def get(name, everything=False):
        if (name, everything) not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[name, everything] = Saved(databases, name, folder, everything)
        return made[name, everything]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """The saved tiny Llama, to be damaged."""
    return shutil.copytree(saved("llama").folder, tmp_path / "model")


def refusal(call) -> InputError:
    with pytest.raises(InputError) as error:
        call()
    return error.value


NAMES = ["llama", "llama-tied", "llama-bf16", "gpt2", "bert"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_gives_the_outputs_that_were_verified(saved, name, everything):
    """`everything`: every group compressed, a tied head included."""
    made = saved(name, everything)
    loaded = autotune.load(made.folder)
    assert torch.equal(outputs(loaded), made.expected())
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


@pytest.mark.parametrize("name", NAMES)
def test_apply_gives_the_same_outputs(saved, name):
    made = saved(name)
    model = load_model(made.opened)
    assert autotune.apply(model, made.plan, made.folder) is model
    assert torch.equal(outputs(model), made.expected())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_loaded_model_generates(saved, name):
    made = saved(name)
    loaded = autotune.load(made.folder)
    text = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    made.live.select(made.configuration)
    assert text[0, 12:].tolist() == made.live.continue_prompt(IDS[0], 5).tolist()


def test_the_outputs_are_not_the_dense_ones(saved):
    """Else the tests above would say nothing."""
    made = saved("llama")
    assert not torch.equal(outputs(load_model(made.opened)), made.expected())


def test_a_tied_dense_head_is_not_stored_twice(saved, tmp_path):
    made = saved("llama-tied")
    made.live.save(tmp_path / "dense", made.opened, plan_of(made.opened, made.table, {}), made.database)
    stored = load_file(tmp_path / "dense" / runtime.WEIGHTS)
    assert not [name for name in stored if name.startswith("lm_head")]
    assert torch.allclose(outputs(autotune.load(tmp_path / "dense")), outputs(load_model(made.opened)), atol=1e-5)
    assert "lm_head::values" in load_file(made.folder / runtime.WEIGHTS)  # compressed, it is its own


def test_compression_is_seen_in_the_file(saved, models):
    made = saved("llama", everything=True)
    size = (made.folder / runtime.WEIGHTS).stat().st_size
    assert size < 0.6 * (models("llama") / "model.safetensors").stat().st_size


def test_a_run_folder_is_found_by_its_parts(saved, tmp_path):
    made = saved("llama")
    shutil.copytree(made.folder, tmp_path / "model")
    made.plan.save(tmp_path / "plan.json")
    assert torch.equal(outputs(autotune.load(tmp_path)), made.expected())
    assert torch.equal(outputs(autotune.apply(load_model(made.opened), tmp_path)), made.expected())


def test_another_checkpoint_of_the_same_shape_is_refused_and_left_as_it_was(saved, tmp_path):
    made = saved("llama")
    other = tiny.make_model("llama", tmp_path / "other", seed=1)
    model = load_model(autotune.model.open_model(str(other)))
    before = outputs(model)
    error = refusal(lambda: autotune.apply(model, made.plan, made.folder))
    assert error.code == "plan.model_mismatch"
    assert torch.equal(outputs(model), before)


def test_one_changed_layer_is_noticed_before_any_is_replaced(saved):
    made = saved("llama")
    model = load_model(made.opened)
    model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    before = outputs(model)
    error = refusal(lambda: autotune.apply(model, made.plan, made.folder))
    assert error.code == "plan.model_mismatch"
    assert "layers.1.mlp.down_proj" in error.message
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_another_architecture_is_refused_by_the_first_layer_that_differs(saved, name):
    made = saved("llama")
    error = refusal(lambda: autotune.apply(load_model(saved(name).opened), made.plan, made.folder))
    assert error.code == "plan.model_mismatch"
    assert "q_proj" in error.message


def test_another_dtype_is_refused_with_what_to_do(saved):
    made = saved("llama")
    error = refusal(lambda: autotune.apply(load_model(made.opened, torch.bfloat16), made.plan, made.folder))
    assert error.code == "plan.model_mismatch"
    assert "float32" in error.hint


def test_another_plans_weights_are_refused(saved):
    made = saved("llama")
    other = plan_of(made.opened, made.table, {})
    assert refusal(lambda: autotune.apply(load_model(made.opened), other, made.folder)).code == "apply.weights"
    assert refusal(lambda: autotune.apply(load_model(made.opened), other)).code == "apply.weights"


def test_a_folder_with_another_plan_put_beside_its_weights_is_refused(saved, copy):
    """A plan that says int4 never ships bf16."""
    made = saved("llama")
    plan_of(made.opened, made.table, {}).save(copy / "plan.json")
    assert refusal(lambda: autotune.load(copy)).code == "apply.weights"


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(copy, size):
    path = copy / runtime.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    error = refusal(lambda: autotune.load(copy))
    assert error.code == "apply.weights"
    assert str(path) in error.message


@pytest.mark.parametrize("prefix", ["lm_head::", "model.norm"])
def test_missing_weights_are_named(saved, copy, prefix):
    tensors = load_file(copy / runtime.WEIGHTS)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    save_file(tensors, copy / runtime.WEIGHTS, {"plan": saved("llama").plan.digest()})
    error = refusal(lambda: autotune.load(copy))
    assert error.code == "apply.weights"
    assert prefix.removesuffix("::") in error.message


def test_an_edited_plan_is_refused(copy):
    file = json.loads((copy / "plan.json").read_text())
    file["plan"]["target"] = "elsewhere"
    (copy / "plan.json").write_text(json.dumps(file))
    assert refusal(lambda: autotune.load(copy)).code == "plan.edited"


def test_an_empty_folder_is_refused(tmp_path):
    assert refusal(lambda: autotune.load(tmp_path)).code == "plan.missing"


def test_code_of_the_model_folder_is_not_copied(saved, tmp_path, models):
    made = saved("llama")
    source = shutil.copytree(models("llama"), tmp_path / "source")
    (source / "tokenization_own.py").write_text("raise SystemExit")
    (source / "tokenizer_config.json").write_text("{}")
    runtime.save(tmp_path / "out", source, made.plan, made.live.model, {}, set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "plan.json",
        runtime.WEIGHTS,
    }


def test_without_room_nothing_is_left_and_the_old_model_stays(saved, tmp_path):
    """A real short write: the kernel refuses to let the file grow past a limit."""
    made = saved("llama")
    old = shutil.copytree(made.folder, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            made.live.save(old, made.opened, made.plan, made.database)
        except DeviceError as error:
            os._exit(7 if error.code.startswith("store.") and str(old) in error.message else 1)
        except BaseException:
            os._exit(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
