"""Experts as linear layers: the same model, named as its checkpoint names it, each with the tokens it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import autotune
from autotune import routing
from autotune.compress.calibrate import input_statistics
from autotune.compress.database import stacked_weight
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.experts import SplitExperts, routers, split_experts
from autotune.kernels import bank
from autotune.kernels.spec import KERNELS
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.profilers.memory import model_bytes, weight_bytes
from autotune.profilers.table import shape_of
from autotune.result import Result
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.search_space.workload import parse
from autotune.tune import tune

EXPERTS, TAKEN = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("moe", tmp_path_factory.mktemp("moe"))


def plain(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("rows", [1, 2, 40])
@torch.inference_mode()
def test_split_experts_compute_what_transformers_does(folder: Path, rows: int) -> None:
    ids = torch.stack(tiny.tokens(rows, length=1 if rows == 1 else 5))
    whole, split = plain(folder), load_model(open_model(str(folder)))
    assert sum(isinstance(module, SplitExperts) for module in split.modules()) == 2
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        whole.set_experts_implementation(implementation)
        torch.testing.assert_close(split(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-6)


def test_splitting_copies_nothing_and_happens_once(folder: Path) -> None:
    model = plain(folder)
    before = model.model.layers[0].mlp.experts.gate_up_proj.data_ptr()
    split_experts(model)
    experts = model.model.layers[0].mlp.experts
    assert experts[0].gate_proj.weight.data_ptr() == before
    split_experts(model)
    assert model.model.layers[0].mlp.experts is experts


def test_the_router_is_kept_with_its_reason(folder: Path) -> None:
    spec = open_model(str(folder)).spec
    kept = {tensor.tensor: tensor.reason for tensor in spec.kept}
    assert kept["model.layers.0.mlp.gate.weight"].startswith("router")
    assert routers(plain(folder)) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}


def test_one_decision_for_a_layers_experts(folder: Path) -> None:
    spec = open_model(str(folder)).spec
    group = spec.group("model.layers.1.mlp.experts.gate_up")
    assert (group.experts, group.experts_per_token, group.layer) == (EXPERTS, TAKEN, 1)
    assert [part.name for part in group.parts] == [f"{group.name}[{number}]" for number in range(EXPERTS)]
    assert [member for part in group.parts for member in part.members] == list(group.members)
    assert group.weights == 2 * group.weights_per_token == EXPERTS * group.parts[0].weights
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("original", [True, False])
def test_both_ways_of_storing_experts_are_read(tmp_path: Path, original: bool) -> None:
    source = plain(tiny.make_model("moe", tmp_path / "a"))
    source.save_pretrained(tmp_path / "b", save_original_format=original)
    opened = open_model(str(tmp_path / "b"))
    tensors = [member.tensor for member in opened.spec.group("model.layers.0.mlp.experts.gate_up").members]
    stored = "model.layers.0.mlp.experts."
    assert tensors[3] == (f"{stored}1.up_proj.weight" if original else f"{stored}gate_up_proj[1, 128:]")
    assert len(set(tensors)) == 2 * EXPERTS
    found = stacked_weight(load_model(opened), opened.spec.group("model.layers.0.mlp.experts.gate_up"))
    assert torch.equal(found, source.model.layers[0].mlp.experts.gate_up_proj.flatten(0, 1))


def test_experts_of_another_form_stay_dense_with_the_reason(tmp_path: Path) -> None:
    values = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "num_local_experts": 4}
    values |= {"eos_token_id": None, "pad_token_id": None}
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**values)).save_pretrained(tmp_path)
    spec = open_model(str(tmp_path), "fp32").spec
    assert not any(group.experts > 1 for group in spec.groups)
    reasons = {tensor.tensor.rpartition(".")[2]: tensor.reason for tensor in spec.kept}
    assert "GptOssExperts" in reasons["gate_up_proj"] and "not split" in reasons["gate_up_proj"]
    assert all(tensor.reason.startswith("router") for tensor in spec.kept if ".router." in tensor.tensor)


def group_of(experts: int, taken: int, out: int = 96) -> LayerGroup:
    members = tuple(Linear(f"e.{n}.weight", f"e.{n}", out, 64, False) for n in range(experts))
    return LayerGroup("e", "experts_up", 0, members, experts=experts, experts_per_token=taken)


def test_rows_and_calls_follow_from_uniform_routing() -> None:
    prefill, decode = parse("1,64,4").phases
    group = group_of(8, 2)
    assert (decode.calls(group), decode.rows(group)) == (2.0, 1)
    assert prefill.calls(group) == pytest.approx(8.0, abs=1e-6) and prefill.rows(group) == 16
    few = parse("2,1,1").phases[1]  # two tokens, two of eight experts each: 3.5 different ones on average
    assert few.calls(group) == pytest.approx(3.5) and few.rows(group) == 1
    drawn = [len({*torch.randperm(8)[:2].tolist(), *torch.randperm(8)[:2].tolist()}) for _ in range(4000)]
    assert few.calls(group) == pytest.approx(sum(drawn) / len(drawn), abs=0.05)


def test_time_and_bytes_count_every_expert(folder: Path) -> None:
    opened = open_model(str(folder))
    spec, workload = opened.spec, parse("1,8,4")
    space = tiny.space_of(spec)
    table = tiny.fake_profile(spec, space, tiny.here(), workload)
    group = spec.group("model.layers.0.mlp.experts.down_proj")
    assert shape_of(group) == ((64,), 128, False)
    choice = table.best(group, "w8a16-int8", workload)
    rows = [next(r for r in table.of(group, "w8a16-int8", p) if r.kernel == choice.kernel) for p in workload.phases]
    assert choice.phases_us == tuple(p.calls(group) * r.median_us for p, r in zip(workload.phases, rows, strict=True))
    assert choice.latency_us == pytest.approx(choice.phases_us[0] + 4 * choice.phases_us[1])
    assert choice.packed_bytes == EXPERTS * rows[0].packed_bytes
    assert weight_bytes(scheme("fp32"), group, "fp32") == 4 * group.weights
    dense = {group.name: "fp32" for group in spec.groups}
    assert model_bytes(spec, dense) == sum(p.numel() * 4 for p in load_model(opened).parameters())


def test_scales_that_experts_would_share_are_illegal() -> None:
    target = tiny.here()

    def reason(name: str, out: int) -> str:
        found = legality(scheme(name), group_of(4, 2, out), "fp32", target, KERNELS, True, for_memory=True)
        return "" if found.usable else found.reason

    assert "shared by all experts" in reason("w8a8-fp8-tensor", 128)
    assert "shared by all experts" in reason("w4a16-nvfp4", 128)
    assert "not a multiple of the 128" in reason("w8a8-fp8-128x128", 96)
    assert not reason("w4a16-int4-g64", 96)


@pytest.mark.parametrize("hessians", [True, False])
def test_an_expert_is_calibrated_on_its_own_tokens(folder: Path, hessians: bool) -> None:
    opened = open_model(str(folder))
    model, documents = load_model(opened), tiny.tokens(40)
    group = opened.spec.group("model.layers.0.mlp.experts.gate_up")
    seen: dict[int, list[torch.Tensor]] = {number: [] for number in range(EXPERTS)}
    layer = model.get_submodule("model.layers.0.mlp")
    with torch.inference_mode():
        hook = layer.experts.register_forward_pre_hook(
            lambda _, args: [seen[e].append(args[0][(args[1] == e).any(1)]) for e in range(EXPERTS)] and None
        )
        for document in documents:
            model(document[None])
        hook.remove()
    found = input_statistics(model, [group], documents, hessians)
    for number, part in enumerate(group.parts):
        fitted = [x for place, x in enumerate(seen[number], 1) if place % 4 or not hessians]
        expected = torch.cat(fitted).square().mean(0)
        assert not found[part.name].note
        torch.testing.assert_close(found[part.name].moment, expected)


def test_an_expert_that_is_not_reached_is_shown_every_token(folder: Path) -> None:
    opened = open_model(str(folder))
    model, documents = load_model(opened), tiny.tokens(40)
    layer = model.get_submodule("model.layers.0.mlp")
    send_away(layer, number=3)
    group = opened.spec.group("model.layers.0.mlp.experts.down_proj")
    found = input_statistics(model, [group], documents)
    notes = [found[part.name].note for part in group.parts]
    assert [bool(note) for note in notes] == [False, False, False, True]
    assert "sent it 0 of" in notes[3] and found[group.parts[3].name].tokens == 0
    inputs: list[torch.Tensor] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        for place, document in enumerate(documents, 1):
            if place % 4:
                model(document[None])
        hook.remove()
        expert, x = layer.experts[3], torch.cat(inputs)
        hidden = expert.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
    torch.testing.assert_close(found[group.parts[3].name].hessian, hidden.T @ hidden / len(hidden))
    assert layer.experts.shown == ()


def send_away(layer: torch.nn.Module, number: int) -> None:
    """Let the router never choose an expert."""
    gate = layer.gate
    forward = type(gate).forward

    def without(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _, _ = forward(gate, x)
        logits[:, number] = -1e9
        top, chosen = logits.softmax(-1).topk(gate.top_k, -1)
        return logits, top / top.sum(-1, keepdim=True), chosen

    gate.forward = without


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The whole loop on a model one of whose experts is never taken, latencies from arithmetic."""
    path = tmp_path_factory.mktemp("run")
    source = tiny.make_model("moe", path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 0.3  # what every token has in common, and expert 3 is sent away by
    tensors["model.layers.0.mlp.gate.weight"][:, 0] = torch.tensor([0.0, 0.0, 0.0, -1e3])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    data = tiny.write_documents(path / "texts.jsonl", count=64)
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(RunConfig.of(**tiny.settings(source, path / "run", data, trials=6, calibration_tokens=800)))


def test_the_whole_loop_runs_and_says_what_calibration_missed(finished: Result) -> None:
    assert finished.plan is not None
    compressed = {group for group, name in finished.plan.configuration.items() if name != "fp32"}
    assert "model.layers.0.mlp.experts.gate_up" in compressed
    entries = {group.name: group for group in finished.plan.groups}
    layer, other = (entries[f"model.layers.{n}.mlp.experts.gate_up"] for n in (0, 1))
    assert (layer.experts, layer.experts_per_token, layer.experts_hardly_reached) == (EXPERTS, TAKEN, 1)
    assert other.experts_hardly_reached == 0
    told = [entry.module for entry in finished.plan.tensors if "the router sent it" in entry.reason]
    told = [module for module in told if "layers.0." in module and "gate_proj" in module]
    assert {module.split(".")[5] for module in told} == {"3"}
    report = json.loads((finished.session.folder.path / "report.json").read_text())
    assert any("1 of 8 experts" in warning for warning in report["warnings"])
    assert any("equal probability" in warning for warning in report["warnings"])
    rows = {row["name"]: row["experts"] for row in report["groups"]}
    assert rows["model.layers.0.mlp.experts.gate_up"] == {"count": EXPERTS, "per_token": TAKEN, "hardly_reached": 1}
    assert rows["model.layers.0.self_attn.qkv"] is None


@torch.inference_mode()
def test_the_saved_model_loads_and_applies(finished: Result) -> None:
    folder = finished.session.folder.path
    ids = tiny.tokens(1)[0][None]
    loaded = autotune.load(folder)
    applied = autotune.apply(plain(folder.parent / "model"), folder)
    assert torch.equal(loaded(ids).logits, applied(ids).logits)
    assert not torch.equal(loaded(ids).logits, plain(folder.parent / "model")(ids).logits)
    made = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert made.shape[1] == ids.shape[1] + 4


@torch.inference_mode()
def test_a_loaded_model_routes_a_token_as_on_a_card(finished: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished.session.folder.path
    ids = tiny.tokens(1)[0][None, :7]
    expected = autotune.load(folder)(ids).logits
    monkeypatch.setattr(bank, "wanted", lambda spec, experts: experts > 1)
    ways: list[int] = []
    by_all = routing.by_all
    monkeypatch.setattr(routing, "by_all", lambda *given: ways.append(len(given[1])) or by_all(*given))
    found = autotune.load(folder)(ids).logits
    assert ways == [7, 7]  # both layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_such_a_plan_is_not_exported_yet(finished: Result, tmp_path: Path) -> None:
    from autotune.export.compressed_tensors import write

    with pytest.raises(InputError, match="experts cannot be exported") as raised:
        write(finished.session.folder.path, tmp_path / "out")
    assert raised.value.code == "export.unsupported"


def test_a_plan_whose_experts_do_not_share_its_tensors_is_refused(finished: Result) -> None:
    assert finished.plan is not None
    groups = tuple(g.model_copy(update={"experts": 3}) if g.experts > 1 else g for g in finished.plan.groups)
    broken = finished.plan.model_copy(update={"groups": groups})
    with pytest.raises(InputError, match="not those of 3 experts"):
        Plan.from_json({"plan": broken.model_dump(mode="json"), "sha256": broken.digest()}, "here")


def test_the_demonstration_mixture_is_described_by_its_headers() -> None:
    spec = open_model(str(Path(__file__).parents[1] / "examples" / "demo_moe")).spec
    mixed = [group for group in spec.groups if group.experts > 1]
    assert len(mixed) == 6 and {(group.experts, group.experts_per_token) for group in mixed} == {(8, 2)}
    assert (spec.dtype, spec.dense_bytes) == ("bf16", 2 * 5_841_024)
