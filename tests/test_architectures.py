"""Every supported architecture through the real path, on tiny random weights: open, group, pack, run, save, load.

Latencies are invented (one row for each job the profiler would time), so nothing is timed; everything else is what
`autotune tune` runs. Tolerances: fp32 dense 1e-5, bf16 about one rounding a layer, compressed schemes as near to the
fp32 reference as the reference itself is in the model's own dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autotune
from autotune import checkpoint, decide, finalists, planning, streamed_score, tables
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.kernels.spec import KERNELS
from autotune.model import load_mixed, load_model, open_model
from autotune.models import Models
from autotune.plan import Plan
from autotune.profilers.jobs import needed
from autotune.profilers.memory import packed_weight_bytes
from autotune.profilers.table import LatencyTable
from autotune.reference_model import ReferenceModel
from autotune.result import Result
from autotune.run import RunFolder, silent
from autotune.score import LossTable, score
from autotune.search.problem import Candidate, Evaluation, Front, Genotype
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import parse
from autotune.session import Session
from autotune.streamed_reference import StreamedReference
from autotune.streaming import Streamed
from autotune.switchable import SwitchableModel, switchable
from autotune.targets.detect import detect
from autotune.teacher import Teacher

VOCABULARY = 160
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1}


@dataclass(frozen=True)
class Case:
    """`layer`: the groups of one block as (name, role, member names, bias), in order; `head`: lm_head has a bias."""

    name: str
    config: Callable[[], Any]
    layer: tuple[tuple[str, str, tuple[str, ...], bool], ...]
    blocks: str  # the path of block 0 without its number
    dtype: str = "bf16"
    saved: torch.dtype = torch.bfloat16
    tied: bool = False
    head: bool | None = False  # None: there is no lm_head
    pooler: bool = True  # the checkpoint holds the pooler, where the architecture has one
    stored: tuple[tuple[str, str], ...] = ()  # parts of parameter paths and what the checkpoint calls them
    saved_as: str = ""  # class that writes the checkpoint where it is not the one that is run
    outside: tuple[str, ...] = ()  # groups outside of blocks besides lm_head

    def __str__(self) -> str:
        return self.name

    def tensor(self, path: str) -> str:
        """What the checkpoint calls a parameter."""
        for ours, theirs in self.stored:
            path = path.replace(ours, theirs)
        return path


def _gated(bias: bool = False) -> tuple[tuple[str, str, tuple[str, ...], bool], ...]:
    return (
        ("self_attn.qkv", "qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), bias),
        ("self_attn.o_proj", "o", ("self_attn.o_proj",), False),
        ("mlp.gate_up", "gate_up", ("mlp.gate_proj", "mlp.up_proj"), False),
        ("mlp.down_proj", "down", ("mlp.down_proj",), False),
    )


def _experts(shared: bool) -> tuple[tuple[str, str, tuple[str, ...], bool], ...]:
    """A block with four experts, and perhaps one that all tokens take."""
    pairs = tuple(f"mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_proj", "up_proj"))
    downs = tuple(f"mlp.experts.{number}.down_proj" for number in range(4))
    own = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    return (
        *_gated(shared)[:2],
        ("mlp.experts.gate_up", "experts_gate_up", pairs, False),
        ("mlp.experts.down_proj", "experts_down", downs, False),
        *(
            (
                ("mlp.shared_expert.gate_up", "gate_up", own, False),
                ("mlp.shared_expert.down_proj", "down", ("mlp.shared_expert.down_proj",), False),
            )
            if shared
            else ()
        ),
    )


def _config(name: str, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**values)

    return make


_LLAMA = {**DECODER, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.1,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
_OPT_LAYER = (
    ("self_attn.qkv", "qkv", ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), True),
    ("self_attn.out_proj", "o", ("self_attn.out_proj",), True),
    ("fc1", "up", ("fc1",), True),
    ("fc2", "down", ("fc2",), True),
)
_BERT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1}
_BERT_LAYER = (
    (
        "attention.self.qkv",
        "qkv",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        True,
    ),
    ("attention.output.dense", "o", ("attention.output.dense",), True),
    ("intermediate.dense", "up", ("intermediate.dense",), True),
    ("output.dense", "down", ("output.dense",), True),
)
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": None,
}
_GPT2_LAYER = (
    ("attn.c_attn", "qkv", ("attn.c_attn",), True),
    ("attn.c_proj", "o", ("attn.c_proj",), True),
    ("mlp.c_fc", "up", ("mlp.c_fc",), True),
    ("mlp.c_proj", "down", ("mlp.c_proj",), True),
)
_PHI_LAYER = (
    ("self_attn.qkv", "qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    ("self_attn.dense", "o", ("self_attn.dense",), True),
    ("mlp.fc1", "up", ("mlp.fc1",), True),
    ("mlp.fc2", "down", ("mlp.fc2",), True),
)
_NEOX_LAYER = (
    ("attention.query_key_value", "qkv", ("attention.query_key_value",), True),
    ("attention.dense", "o", ("attention.dense",), True),
    ("mlp.dense_h_to_4h", "up", ("mlp.dense_h_to_4h",), True),
    ("mlp.dense_4h_to_h", "down", ("mlp.dense_4h_to_h",), True),
)

CASES = (
    Case("llama", _config("LlamaConfig", **_LLAMA), _gated(), "model.layers."),
    Case("llama_fp32", _config("LlamaConfig", **_LLAMA), _gated(), "model.layers.", "fp32", torch.float32),
    Case("qwen2", _config("Qwen2Config", **_LLAMA, tie_word_embeddings=True), _gated(True), "model.layers.", tied=True),
    Case(
        "qwen3",
        _config("Qwen3Config", **_LLAMA, head_dim=32, tie_word_embeddings=True),
        _gated(),
        "model.layers.",
        tied=True,
    ),
    Case(
        "qwen2_moe",
        _config("Qwen2MoeConfig", **_LLAMA, **_MOE, moe_intermediate_size=64, shared_expert_intermediate_size=128),
        _experts(shared=True),
        "model.layers.",
        "fp32",
        torch.float32,
    ),
    Case(
        "mixtral",
        _config("MixtralConfig", **_LLAMA, **_MOE, num_local_experts=4),
        _experts(shared=False),
        "model.layers.",
        "fp32",
        torch.float32,
        stored=(
            ("mlp.", "block_sparse_moe."),
            *((f"{ours}.weight", f"{theirs}.weight") for ours, theirs in _MIXTRAL.items()),
        ),
    ),
    Case("mistral", _config("MistralConfig", **_LLAMA, sliding_window=16), _gated(), "model.layers."),
    Case("gemma", _config("GemmaConfig", **_LLAMA, head_dim=64), _gated(), "model.layers.", tied=True),
    Case("opt", _config("OPTConfig", **_OPT), _OPT_LAYER, "model.decoder.layers.", "fp32", torch.float16, tied=True),
    Case(
        "opt_projected",
        _config("OPTConfig", **_OPT, word_embed_proj_dim=32),
        _OPT_LAYER,
        "model.decoder.layers.",
        "fp32",
        torch.float16,
        tied=True,
        outside=("model.decoder.project_out", "model.decoder.project_in"),
    ),
    Case("gpt2", _config("GPT2Config", **_GPT2), _GPT2_LAYER, "transformer.h.", "fp32", torch.float32, tied=True),
    Case(
        "phi",
        _config("PhiConfig", **{**_LLAMA, "num_key_value_heads": 4}),
        _PHI_LAYER,
        "model.layers.",
        head=True,
    ),
    Case(
        "gpt_neox",
        _config("GPTNeoXConfig", **DECODER, bos_token_id=0, eos_token_id=None, tie_word_embeddings=False),
        _NEOX_LAYER,
        "gpt_neox.layers.",
        stored=(("lm_head", "embed_out"),),
    ),
    Case("bert", _config("BertConfig", **_BERT), _BERT_LAYER, "encoder.layer.", "fp32", torch.float32, head=None),
    Case(
        "bert_masked_lm",
        _config("BertConfig", **_BERT),
        _BERT_LAYER,
        "encoder.layer.",
        "fp32",
        torch.float32,
        head=None,
        pooler=False,
        stored=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        saved_as="BertForMaskedLM",
    ),
)


class World:
    """One architecture with everything that a run would have made for it; each part is made on first use."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case = case
        self.source = path / "source"
        _save_random(case, self.source)
        self.opened = open_model(str(self.source))
        texts = path / "texts.jsonl"
        _write_texts(texts)
        config = RunConfig.of(
            model=str(self.source), out=str(path / "run"), data=str(texts), max_loss=0.5, workload="1,8,4"
        )
        folder = RunFolder(path / "run")
        self.session = Session(folder, config, self.opened, detect(), True, parse(config.workload), silent)
        self.space = tables.build_space(self.session)
        self.table = _invented(self.session, self.space)
        self.models = Models(self.session, self.space, self.table)
        self.models.database = tables.compress(self.session, self.space, self.models)
        self.documents = self.session.search_documents

    @property
    def spec(self) -> Any:
        return self.opened.spec

    @property
    def encoder(self) -> bool:
        return self.case.head is None

    def dense(self, dtype: torch.dtype | None = None) -> Any:
        """The unmodified model."""
        return load_model(self.opened, dtype)

    @cached_property
    def runnable(self) -> SwitchableModel:
        """On the real kernels, every scheme packed."""
        assert self.models.runnable is not None
        return self.models.runnable

    @cached_property
    def same_dtype(self) -> ReferenceModel:
        """Reference twins in the model's own dtype."""
        assert self.models.database is not None
        return ReferenceModel(self.dense(), self.spec, self.models.database)

    @cached_property
    def mixed(self) -> Genotype:
        """Every scheme that is legal here in turn, the dense one among them."""
        sizes = [len(self.space.schemes(group.name)) for group in self.spec.groups]
        return tuple(number % size for number, size in enumerate(sizes))

    @cached_property
    def weights_only(self) -> Genotype:
        """The same without schemes that quantize activations: those round what is near a tie either way."""
        options = [self.space.schemes(group.name) for group in self.spec.groups]
        names = [[entry.scheme for entry in entries] for entries in options]
        return tuple(
            own.index("w8a16-int8") if scheme(own[index]).activation else index
            for own, index in zip(names, self.mixed, strict=True)
        )

    @cached_property
    def losses(self) -> LossTable:
        return score(self.models.reference, self.space, self.documents, draws=2)

    @cached_property
    def result(self) -> Result:
        """As far as a run has come when it chooses, with `mixed` its only point."""
        result = Result(self.session, self.space, self.table, database=self.models.database, losses=self.losses)
        result.calibration = tables.Calibration({}, {}, None)
        result.problem = decide.build_problem(self.session, self.space, self.table, self.losses, result.calibration)
        us, size = result.problem.latency_us(self.mixed), result.problem.weight_bytes(self.mixed)
        candidate = Candidate(self.mixed, us, size, 0.1, Evaluation((1.0,), (0.1,), (0.1,)), "mixed")
        result.front = Front((candidate,), (0,), (), 0.0)
        return result

    def configuration(self, genotype: Genotype | None = None) -> dict[str, str]:
        """Group -> scheme; `mixed` unless another one is given."""
        assert self.result.problem is not None
        return decide.configuration(self.result.problem, genotype or self.mixed)

    @cached_property
    def saved(self) -> Path:
        """The folder that `autotune.load` reads."""
        assert self.result.front is not None
        plan = planning.build_plan(self.result, finalists.Point("mixed", self.result.front.candidates[0], True))
        folder = self.session.folder.path / "model"
        self.runnable.select(plan.configuration)
        self.runnable.save(folder, self.opened, plan, self.models.database)
        return folder


def _save_random(case: Case, folder: Path) -> None:
    """A checkpoint with random weights, biases and gains included: zeros and ones would hide what is left out."""
    import transformers

    torch.manual_seed(len(case.name))
    config = case.config()
    if case.saved_as:
        model = getattr(transformers, case.saved_as)(config)
    else:
        model = (transformers.AutoModel if case.head is None else transformers.AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(case.saved).save_pretrained(folder)
    if case.stored:
        file = folder / "model.safetensors"
        save_file({case.tensor(name): tensor for name, tensor in load_file(file).items()}, file)


def _write_texts(path: Path) -> None:
    texts = [" ".join(str((number * 7919 + k * k) % 101) for k in range(14 + number)) for number in range(9)]
    splits = ("calibration", "search", "certification")
    rows = [json.dumps({"text": text, "split": splits[number % 3]}) for number, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n")


def _invented(session: Session, space: SearchSpace, preferred: str = "") -> LatencyTable:
    """One row for every job; times follow the scheme's bytes, and a preferred kernel is the fastest of its scheme."""
    rows = []
    for job in needed(session.spec, space, session.target, session.workload, KERNELS, "runs"):
        packed = packed_weight_bytes(job.scheme, job.shape, job.dtype)
        us = packed / 1e3 * (0.5 if job.kernel.name == preferred else 1.0)
        rows.append(job.row((us, us * 0.99, us * 1.01), "measured", packed, 20))
    return LatencyTable(session.target.name, "invented", tuple(rows))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param.name))


def _relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.float() - truth.float()).norm() / truth.float().norm())


@torch.inference_mode()
def _outputs(model: Any, document: torch.Tensor) -> torch.Tensor:
    """Of a plain transformers model."""
    output = model(document.unsqueeze(0))
    return (output.logits if "logits" in output else output.last_hidden_state)[0]


def test_groups_are_those_that_engines_fuse(world: World) -> None:
    case, spec = world.case, world.spec
    assert (spec.dtype, spec.tied_embeddings, spec.task) == (
        case.dtype,
        case.tied,
        "encoder" if world.encoder else "causal-lm",
    )
    expected = {}
    for layer in range(2):
        prefix = f"{case.blocks}{layer}."
        for name, role, members, bias in case.layer:
            expected[prefix + name] = (role, layer, {prefix + member for member in members}, bias, False)
    for name in case.outside:
        expected[name] = (name.rpartition(".")[2], None, {name}, False, False)
    if case.head is not None:
        expected["lm_head"] = ("lm_head", None, {"lm_head"}, case.head, True)
    found = {
        group.name: (group.role, group.layer, {m.module for m in group.members}, group.bias, group.last_token_only)
        for group in spec.groups
    }
    assert found == expected


def test_every_parameter_is_in_a_group_or_kept_with_a_reason(world: World) -> None:
    spec, stored = world.spec, checkpoint.read(world.source).tensors
    grouped = [member.tensor for group in spec.groups for member in group.members]
    kept = {tensor.tensor: tensor.reason for tensor in spec.kept}
    parameters = {name: p for name, p in world.dense().named_parameters() if world.case.pooler or "pooler" not in name}
    for name, parameter in parameters.items():
        tensor = world.case.tensor(f"bert.{name}" if world.case.saved_as else name)
        assert tensor in stored
        assert parameter.ndim < 2 or tensor in grouped or kept[tensor], name
    assert len(grouped) == len(set(grouped))
    shared = {member.tensor for group in spec.groups if group.role == "lm_head" for member in group.members}
    assert set(grouped) & set(kept) == (shared if spec.tied_embeddings else set())
    assert set(grouped) | set(kept) <= set(stored)
    assert all(kept.values())
    assert spec.dense_bytes == sum(p.numel() for p in parameters.values()) * (2 if spec.dtype == "bf16" else 4)


def test_dense_kernels_give_the_unmodified_outputs(world: World) -> None:
    """Every dense kernel of this machine, in the place of the model's own layers."""
    session = world.session
    dense_only = world.space.without(
        {
            (entry.group, entry.scheme): "not tested here"
            for entry in world.space.entries
            if entry.scheme != world.spec.dtype
        }
    )
    kernels = {name for entry in dense_only.usable() for name in entry.legality.kernels}
    assert kernels
    truth = [_outputs(world.dense(), document) for document in world.documents]
    for kernel in kernels:
        table = _invented(session, dense_only, kernel)
        assert {table.best(group, world.spec.dtype, session.workload).kernel for group in world.spec.groups} == {kernel}
        model = switchable(world.opened, dense_only, table, session.workload, None, 0)
        for document, expected in zip(world.documents, truth, strict=True):
            error = _relative(model.outputs(document), expected)
            assert error <= (1e-5 if world.spec.dtype == "fp32" else 1e-2), (kernel, error)


@pytest.mark.parametrize("kind", ["mixed", "weights_only"])
def test_a_configuration_computes_what_the_reference_does(world: World, kind: str) -> None:
    """Close to the reference in fp32, and far closer than the schemes themselves are to the dense model."""
    chosen = world.configuration(getattr(world, kind))
    assert len(set(chosen.values()) - {world.spec.dtype}) >= 3
    # A last bit decides how an int8 activation is rounded, and one step of it is this much in a model so small.
    exact = 1e-5 if kind == "weights_only" else 1e-2
    world.runnable.select(chosen)
    for document in world.documents:
        world.models.reference.select({})
        dense = world.models.reference.outputs(document)
        world.models.reference.select(chosen)
        world.same_dtype.select(chosen)
        truth = world.models.reference.outputs(document)
        floor = _relative(world.same_dtype.outputs(document), truth)
        error, effect = _relative(world.runnable.outputs(document), truth), _relative(truth, dense)
        print(f"{world.case}: kernels {error:.1e}, reference in {world.spec.dtype} {floor:.1e}, schemes {effect:.1e}")
        assert error <= max(1.5 * floor, exact)
        assert error <= 0.5 * effect


def test_switching_back_to_dense_leaves_no_trace(world: World) -> None:
    document = world.documents[0]
    world.runnable.select({})
    before = world.runnable.outputs(document)
    world.runnable.select(world.configuration())
    world.runnable.outputs(document)
    world.runnable.select({})
    assert torch.equal(world.runnable.outputs(document), before)


def test_generation_runs_on_the_kernels_and_follows_the_reference(world: World) -> None:
    """Greedy tokens equal the reference's as long as its margin exceeds twice the largest difference of logits."""
    if world.encoder:
        pytest.skip("an encoder does not generate")
    prompt, count = world.documents[0][:8], 12
    world.runnable.select(world.configuration())
    world.models.reference.select(world.configuration())
    made = world.runnable.continue_prompt(prompt, count)
    assert len(made) == count
    text = torch.cat([prompt, made])
    rows = slice(len(prompt) - 1, -1)  # the logits that chose each new token
    truth = world.models.reference.outputs(text)[rows]
    largest = float((world.runnable.outputs(text)[rows].float() - truth).abs().max())
    best = truth.topk(2, -1)
    sure = best.values[:, 0] - best.values[:, 1] > 2 * largest
    print(f"{world.case}: {int(sure.sum())} of {count} tokens have the margin to be compared")
    assert int(sure.sum()) >= count // 3
    assert torch.equal(made[sure], best.indices[sure, 0])


def test_a_saved_model_loads_to_identical_outputs(world: World) -> None:
    world.runnable.select(world.configuration())
    expected = [world.runnable.outputs(document) for document in world.documents]
    loaded = autotune.load(world.saved)
    for document, y in zip(world.documents, expected, strict=True):
        assert torch.equal(_outputs(loaded, document), y)
    if not world.encoder:
        prompt = world.documents[0][:8]
        with torch.inference_mode():
            made = loaded.generate(
                prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=6, do_sample=False
            )
        assert torch.equal(made[0, 8:], world.runnable.continue_prompt(prompt, 6))


def test_apply_on_a_fresh_model_gives_identical_outputs(world: World) -> None:
    world.runnable.select(world.configuration())
    expected = [world.runnable.outputs(document) for document in world.documents]
    plan = Plan.load(world.saved / "plan.json")
    applied = autotune.apply(world.dense(), plan, weights=world.saved)
    for document, y in zip(world.documents, expected, strict=True):
        assert torch.equal(_outputs(applied, document), y)


def test_losses_are_estimated_and_measured(world: World) -> None:
    """The estimate of each scheme on all groups at once against the measured loss: right to a factor of four."""
    teacher = Teacher(world.models.reference, world.documents, (0.5, 1.0))
    dense = teacher.measure({})
    assert dense.kl_nats == pytest.approx(0.0, abs=1e-9)
    if world.encoder:
        squares = sum(float(_outputs(world.dense(), d).double().square().sum()) for d in world.documents)
        assert sum(dense.tokens) == pytest.approx(squares, rel=1e-4)
        assert dense.kl == dense.dnll
    rows = {(row.group, row.scheme): row for row in world.losses.rows}
    compressed = [entry for entry in world.space.usable() if entry.scheme != world.spec.dtype]
    assert set(rows) == {(entry.group, entry.scheme) for entry in compressed}
    assert all(row.low_nats <= row.loss_nats <= row.high_nats and row.loss_nats > 0 for row in rows.values())
    for name in {entry.scheme for entry in compressed}:
        chosen = {entry.group: name for entry in compressed if entry.scheme == name}
        measured = teacher.measure(chosen).kl_nats
        estimated = sum(rows[group, name].loss_nats for group in chosen)
        print(f"{world.case}: {name} estimated {estimated:.2e}, measured {measured:.2e}")
        # A token that a small change sends to another expert is no derivative, and costs this much here.
        switched = 0.01 if any(group.experts > 1 for group in world.spec.groups) else 0.0
        assert estimated / 4 <= measured <= 4 * estimated + switched


def test_as_a_large_model_it_is_measured_in_bf16_products(world: World) -> None:
    """Exactly computed it is the fp32 reference, else near it; scores agree to a factor of two."""
    if world.spec.dtype == "fp32":
        pytest.skip("it is measured in fp32, whatever its size")
    wide = world.models.reference
    narrow = ReferenceModel(load_mixed(world.opened), world.spec, wide.database)
    wide.select({})
    for document in world.documents:
        expected = wide.outputs(document)
        assert _relative(narrow.outputs(document), expected) < 0.05
        scaled = "Gemma" in world.spec.architecture  # it rounds its embeddings' factor to their dtype
        with narrow.exact():
            assert _relative(narrow.outputs(document), expected) < (1e-2 if scaled else 1e-4)
    found = score(narrow, world.space, world.documents, draws=2)
    ratios = [found.of(row.group, row.scheme) / row.loss_nats for row in world.losses.rows]
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2


def test_a_forward_pass_that_needs_a_mask_is_traced(tmp_path: Path) -> None:
    config = _config("DebertaV2Config", **_BERT)()
    _save(config, "AutoModel", tmp_path)
    assert len(open_model(str(tmp_path)).spec.groups) == 12


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("T5Config", {"d_model": 64, "d_ff": 128, "num_layers": 1, "d_kv": 16, "num_heads": 4}, "could not be traced"),
    ],
)
def test_what_cannot_be_described_is_refused_in_words(
    name: str, values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = _config(name, **{**values, "vocab_size": VOCABULARY})()
    _save(config, "AutoModel" if name == "T5Config" else "AutoModelForCausalLM", tmp_path)
    with pytest.raises(InputError, match=words) as raised:
        open_model(str(tmp_path))
    assert raised.value.code == "model.architecture"


def _save(config: Any, auto: str, folder: Path) -> None:
    import transformers

    getattr(transformers, auto).from_config(config).to(torch.bfloat16).save_pretrained(folder)


def test_block_by_block_from_disk_it_is_the_same_model(world: World) -> None:
    assert world.models.database is not None
    reference = world.models.reference
    stream = Streamed(world.opened, torch.float32)
    streamed = StreamedReference(stream, world.spec, world.models.database)
    for configuration in ({}, world.configuration()):
        for model in (reference, streamed):
            model.select(configuration)
        for document in world.documents[:2]:
            assert torch.equal(streamed.outputs(document), reference.outputs(document))
    assert streamed_score.score(streamed, world.space, world.documents, draws=2) == world.losses
