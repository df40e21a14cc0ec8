"""The plan file: canonical, complete, self-checking; another model's or an edited one is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import autotune.plan
from autotune.errors import InputError
from autotune.plan import Plan, SchemeSpec
from autotune.search_space.schemes import MORE, SCHEMES, scheme
from autotune.store import canonical_json, digest

SCHEMA = Path(autotune.plan.__file__).with_name("plan.schema.json")


def value(**changes) -> dict:
    """A plan of one fused group and one that is kept."""
    groups = [
        {"name": "l.0.qkv", "role": "qkv", "layer": 0, "kernel": "torch.cpu.w8a16", "predicted_loss_nats": 1e-5},
        {"name": "l.0.o", "role": "o", "layer": 0, "kernel": "torch.cpu.fp32", "predicted_loss_nats": 0.0},
    ]
    groups = [g | {"predicted_latency_us": 1.5, "latency_status": "measured", "weight_bytes": 10} for g in groups]
    tensors = [
        {"tensor": f"l.0.{name}.weight", "module": f"l.0.{name}", "shape": [8, 16], "reason": "because"}
        for name in ("q", "k", "o")
    ]
    chosen = [("l.0.qkv", "w8a16-int8"), ("l.0.qkv", "w8a16-int8"), ("l.0.o", None)]
    for tensor, (group, name) in zip(tensors, chosen, strict=True):
        tensor |= {"group": group, "scheme": name}
    model = {"name": "m", "architecture": "A", "task": "causal-lm", "dtype": "fp32", "sha256": "a" * 64}
    prediction = {"latency_us": 1.0, "dense_latency_us": 2.0, "loss_nats": 1e-5, "search_kl_nats": None}
    provenance = {"latency_table": "t", "loss_table": None, "documents": None, "kernels": {}, "packages": {}}
    made = {
        "schema_version": 1,
        "generator": "autotune",
        "model": model | {"tied_embeddings": False},
        "target": "t",
        "runtime": "r",
        "workload": "w",
        "budget": {"max_loss": 0.01, "max_memory_bytes": None, "min_speedup": None},
        "schemes": {"w8a16-int8": SchemeSpec.of("w8a16-int8").model_dump()},
        "groups": groups,
        "tensors": tensors,
        "kept": [{"tensor": "norm", "shape": [16], "reason": "vector"}],
        "kv_cache": None,
        "prediction": prediction | {"weight_bytes": 5, "dense_weight_bytes": 10},
        "provenance": provenance | {"seed": 0, "trials": 3},
    }
    return made | changes


PLAN = Plan.model_validate(value())


@pytest.fixture
def path(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def refusal(text: str) -> InputError:
    with pytest.raises(InputError) as error:
        Plan.loads(text)
    return error.value


def sealed(made: dict) -> str:
    """A file whose own sha256 is right."""
    return json.dumps({"plan": made, "sha256": digest(made)})


def test_the_committed_schema_is_this_models():
    """After a change on purpose: write `Plan.model_json_schema()` to the file, and raise the version."""
    assert json.loads(SCHEMA.read_text()) == Plan.model_json_schema()


def test_a_plan_satisfies_its_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(PLAN.model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(PLAN.model_dump(mode="json") | {"extra": 1}, schema)


def test_the_round_trip_is_exact_to_the_byte(path):
    first = path.read_bytes()
    loaded = Plan.load(path)
    assert loaded == PLAN
    loaded.save(path)
    assert path.read_bytes() == first


def test_the_file_is_canonical(path):
    text = path.read_text()
    assert text == canonical_json(json.loads(text)) + "\n"


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(path, data):
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = path.with_name("changed.json")
    changed.write_bytes(bytes(whole))
    try:
        assert Plan.load(changed) == PLAN  # white space, or 1e-05 spelt 1E-05
    except InputError as error:
        assert error.code.startswith("plan.")


@pytest.mark.parametrize("change", [{"target": "other"}, {"kept": []}, {"runtime": ""}])
def test_an_edit_is_noticed(path, change):
    file = json.loads(path.read_text())
    file["plan"] |= change
    error = refusal(json.dumps(file))
    assert error.code == "plan.edited"
    assert "plan choose" in error.hint


@pytest.mark.parametrize(
    "text", ["{}", "[]", "5", '"plan"', '{"plan": {}, "sha256": "", "more": 1}', '{"plan": [], "sha256": ""}']
)
def test_another_json_file_is_no_plan(text):
    assert refusal(text).code == "plan.schema"


def test_a_newer_schema_is_refused_with_both_versions():
    error = refusal(sealed(value(schema_version=99)))
    assert error.code == "plan.version"
    assert "99" in error.message
    assert error.hint


def test_an_unknown_key_is_named_with_its_nearest():
    error = refusal(sealed(value(targget="x")))
    assert error.code == "plan.schema"
    assert "targget" in error.message
    assert error.hint == "Did you mean 'target'?"


@pytest.mark.parametrize("key", ["model", "tensors", "provenance", "prediction"])
def test_a_missing_key_is_named(key):
    made = value()
    del made[key]
    error = refusal(sealed(made))
    assert error.code == "plan.schema"
    assert key in error.message


def test_a_tensor_of_an_unlisted_scheme_or_group_or_a_half_group_is_refused():
    for index, change in ((0, {"scheme": "2:4"}), (0, {"group": "gone"}), (0, {"scheme": None})):
        made = value()
        made["tensors"][index] |= change
        error = refusal(sealed(made))
        assert error.code == "plan.schema"
        assert "l.0.q" in error.message


@pytest.mark.parametrize("text", ['{"plan": 1, "plan": 2}', "[" * 10**6, "{", "\x00"])
def test_hostile_text_is_refused(text):
    assert refusal(text).code == "plan.syntax"


def test_a_pickle_is_refused_and_not_opened(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / "plan.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError) as error:
        Plan.load(tmp_path / "plan.json")
    assert error.value.code == "plan.syntax"
    assert not marker.exists()


def test_a_huge_file_is_refused(tmp_path):
    with open(tmp_path / "plan.json", "wb") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(InputError) as error:
        Plan.load(tmp_path / "plan.json")
    assert error.value.code == "plan.too_large"


SHAPES = {f"l.0.{name}.weight": (8, 16) for name in "qko"}


def test_its_own_model_is_accepted():
    PLAN.check_model("a" * 64, SHAPES)


@pytest.mark.parametrize(
    ("sha256", "shapes", "says"),
    [
        ("b" * 64, SHAPES, "the weights differ"),
        ("b" * 64, SHAPES | {"l.0.k.weight": (8, 32)}, "l.0.k.weight is (8, 32)"),
        ("b" * 64, {}, "l.0.q.weight is absent"),
        (None, SHAPES, "without weights"),
    ],
)
def test_another_model_is_refused_with_both_hashes_and_the_first_difference(sha256, shapes, says):
    with pytest.raises(InputError) as error:
        PLAN.check_model(sha256, shapes)
    assert error.value.code == "plan.model_mismatch"
    assert says in error.value.message
    assert "aaaaaaaaaaaa" in error.value.message


def test_a_plan_made_without_weights_fits_no_weights():
    made = Plan.model_validate(value(model=value()["model"] | {"sha256": None}))
    for sha256 in ("b" * 64, None):
        with pytest.raises(InputError):
            made.check_model(sha256, SHAPES)


def test_what_it_decides():
    assert PLAN.configuration == {"l.0.qkv": "w8a16-int8", "l.0.o": "fp32"}
    assert PLAN.kernels == {"l.0.qkv": "torch.cpu.w8a16", "l.0.o": "torch.cpu.fp32"}
    assert not PLAN.estimated
    assert Plan.model_validate(value(groups=[g | {"latency_status": "estimated"} for g in value()["groups"]])).estimated


def test_it_is_frozen():
    with pytest.raises(ValidationError):
        PLAN.target = "other"


@pytest.mark.parametrize("item", (*SCHEMES, *MORE), ids=lambda item: item.name)
def test_a_scheme_entry_says_all_of_the_scheme(item):
    entry = SchemeSpec.of(item.name)
    assert entry.bits_per_weight == scheme(item.name).bits_per_weight
    others = [other for other in (*SCHEMES, *MORE) if other is not item]
    assert all(SchemeSpec.of(other.name) != entry for other in others)


def test_schemes_known_from_the_start_are_written_as_they_were():
    """Plans made before there were zero points, shared rows or other scales keep their digest."""
    written = SchemeSpec.of("2:4+w4a8-int4-g64").model_dump(mode="json")
    known = {"sparsity", "weight_kind", "weight_bits", "weight_group_size", "activation_kind", "activation_bits"}
    assert set(written) == known | {"bits_per_weight"}
    assert SchemeSpec.of("w4a16-nvfp4").model_dump()["weight_scale"] == "e4m3"
    for item in (*SCHEMES, *MORE):
        assert SchemeSpec.model_validate(SchemeSpec.of(item.name).model_dump()) == SchemeSpec.of(item.name)
