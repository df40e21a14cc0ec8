"""Where things live and how passes are timed: the CUDA branch taken on the CPU, since no card is here."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import MistralConfig, MistralForCausalLM

from autotune import session as session_module
from autotune import verify
from autotune.certify import certify
from autotune.compress import database, rounding
from autotune.config import RunConfig
from autotune.errors import DeviceError
from autotune.kernels import scratch
from autotune.model import load_mixed, load_model, open_model
from autotune.passes import StaticRequest
from autotune.place import CPU, Place, cuda_device, device_of, place_of
from autotune.profilers.cuda_timer import Recording, rehearsed
from autotune.reference_model import ReferenceModel
from autotune.run import RunFolder, silent
from autotune.score import score
from autotune.session import open_session
from autotune.switchable import switchable
from autotune.targets import target
from autotune.teacher import Teacher

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


class Counting:
    """A recording that counts what is recorded, and times by the host's clock."""

    def __init__(self) -> None:
        self.recorded = 0
        plain = rehearsed()

        def record(call):
            self.recorded += 1
            return plain.record(call)

        self.recording = Recording(record, plain.elapsed)


# ---- placement


def test_the_target_decides():
    assert place_of(target.load("x86-generic")) == CPU and CPU.recording is None
    assert device_of(["cpu.w8a8", "torch.cpu.bf16"]) == torch.device("cpu")
    documents = tiny.tokens(2)
    assert all(torch.equal(a, b) for a, b in zip(CPU.put(documents), documents, strict=True))


@NO_CARD
def test_a_device_that_is_not_here_is_an_error():
    with pytest.raises(DeviceError, match=r"device\.missing.*h100"):
        place_of(target.load("h100"))
    with pytest.raises(DeviceError, match=r"device\.missing"):
        device_of(["torch.cpu.bf16", "triton.w4a16"])


def test_fp32_on_a_card_is_fp32():
    """Also where the environment asks torch for TF32."""
    torch.set_float32_matmul_precision("high")
    try:
        assert cuda_device() == torch.device("cuda:0")
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_left_is_that_of_the_device(monkeypatch):
    """What is free on a card, and what torch holds of it in reserve."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert Place(torch.device("cuda:0")).available_bytes == 1200
    assert CPU.available_bytes > 1200


def test_pieces_are_of_a_cache_on_a_cpu_and_large_elsewhere():
    weight = torch.zeros(2**10, 2**10)
    assert len(rounding._parts(weight, 1)) == 4
    assert len(rounding._parts(weight.to("meta"), 1)) == 1


@pytest.fixture(scope="module")
def world(models, tmp_path_factory):
    """A llama in fp32, its space and its weights compressed as two schemes."""
    opened = open_model(str(models("llama")))
    space = tiny.space_of(opened.spec, ["w8a8-int8", "w4a8-int4-g32", "2:4"])
    made = database.build(load_model(opened), opened.spec, space, tiny.tokens(4), tmp_path_factory.mktemp("place"))
    return opened, space, made


@pytest.mark.parametrize("load", [load_mixed, lambda opened: load_model(opened, torch.float32)])
def test_nothing_is_made_on_the_default_device(world, tmp_path, load, monkeypatch):
    """Tensors whose device is not stated would be on `meta` here, and could not meet those of the model."""
    opened, space, _ = world
    dense, documents = load(opened), tiny.tokens(6)
    read = database.WeightDatabase.load

    def to_the_cpu(*arguments, **named):  # files are read there
        with torch.device("cpu"):
            return read(*arguments, **named)

    monkeypatch.setattr(database.WeightDatabase, "load", to_the_cpu)
    with torch.device("meta"):
        made = database.build(dense, opened.spec, space, documents, tmp_path)
        model = ReferenceModel(dense, opened.spec, made)
        assert model.device == torch.device("cpu")
        table = score(model, space, documents, draws=2)
        teacher = Teacher(model, documents, (0.5, 1.0))
        configuration = {group.name: "w8a8-int8" for group in opened.spec.groups}
        loss = teacher.measure(configuration)
        certificates = certify(model, [configuration], documents, 1.0, "documents")
        perplexity = teacher.perplexity()
    assert all(0 <= row.loss_nats < 10 for row in table.rows) and 0 < loss.kl_nats < 1
    assert certificates[0].loss.tokens > 0 and 10 < perplexity < 1e5


@pytest.mark.parametrize("name", ["signround", "wanda", "magnitude", "hwpq"])
def test_every_method_stays_on_the_device(world, tmp_path, name):
    opened, space, _ = world
    dense, documents = load_model(opened, torch.float32), tiny.tokens(3)
    with torch.device("meta"):
        made = database.build(dense, opened.spec, space, documents, tmp_path, name)
    assert made.entries


def test_a_session_puts_its_documents_where_the_target_is(models, tmp_path, monkeypatch):
    asked = []

    class Watched(Place):
        def put(self, documents):
            asked.append(len(documents))
            return super().put(documents)

    monkeypatch.setattr(session_module, "place_of", lambda item: Watched(torch.device("cpu"), rehearsed()))
    data = tiny.write_documents(tmp_path / "data.jsonl", 16, 40)
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        config = RunConfig.of(**tiny.settings(models("llama"), tmp_path / "run", data))
        session = open_session(RunFolder(tmp_path / "run"), config, silent)
        assert session.place.recording is not None
        taken = [session.calibration_documents, session.score_documents, session.search_documents]
        assert asked == [len(documents) for documents in taken]
    assert session_module.Session(**{**vars_of(session), "local": False}).place == CPU


def vars_of(session):
    names = ("folder", "config", "opened", "target", "local", "workload", "report")
    return {name: getattr(session, name) for name in names}


# ---- passes over a static cache


def grown(model, request):
    """The same two passes over a cache that grows, as `generate` runs them."""
    first = model(request.ids, use_cache=True, logits_to_keep=1)
    second = model(request.next_ids, past_key_values=first.past_key_values, use_cache=True, logits_to_keep=1)
    return first.logits, second.logits


def mistral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256, "sliding_window": 32}
    return MistralForCausalLM(MistralConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_decode_over_a_static_cache_is_that_over_a_growing_one(models, kind, batch):
    model = mistral() if kind == "mistral" else load_model(open_model(str(models(kind))))
    request = StaticRequest(model, batch, 9, 20, torch.device("cpu"))
    expected = grown(model, request)
    for _ in range(3):  # every replay does the same
        torch.testing.assert_close(request.prefill(), expected[0], atol=1e-4, rtol=1e-4)
        for _ in range(3):
            torch.testing.assert_close(request.decode(), expected[1], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_encoder_has_a_prompt_only(models):
    model = load_model(open_model(str(models("bert"))))
    request = StaticRequest(model, 2, 7, 7, torch.device("cpu"))
    assert request.cache is None and tuple(request.prefill().shape) == (2, 7, 64)


def test_what_cannot_use_a_static_cache_says_so():
    model = mistral()
    model._can_compile_fullgraph = False
    with pytest.raises(DeviceError, match=r"device\.static_cache.*MistralForCausalLM"):
        StaticRequest(model, 1, 4, 8, torch.device("cpu"))


# ---- timing by replays


def test_configurations_are_recorded_once_and_timed_by_replays(world):
    opened, space, made = world
    table = tiny.fake_profile(opened.spec, space, tiny.here(), tiny.WORKLOAD)
    counting = Counting()
    place = Place(torch.device("cpu"), counting.recording)
    model = switchable(opened, space, table, tiny.WORKLOAD, made, 2**25, place=place)
    dense = {group.name: "fp32" for group in opened.spec.groups}
    configurations = {"dense": dense, "w8a8": dict.fromkeys(dense, "w8a8-int8")}
    result = verify.measure(model, configurations, tiny.WORKLOAD, seconds=0.1)
    assert counting.recorded == 4  # two configurations, prefill and decode
    for run in result.runs:
        assert run.prefill_ms.median > 0 and run.decode_ms.median > 0
    assert len(result.runs[0].rounds_ms) >= verify.MIN_ROUNDS
    model.select(dense)
    model.time_request(1, 8, 4)
    assert counting.recorded == 4


def test_outgrown_buffers_stay_where_graphs_write_to_them(monkeypatch):
    held = {}
    monkeypatch.setattr(scratch, "_buffers", lambda: held)

    class Card(str):
        type = "cuda"

    monkeypatch.setattr(scratch.torch, "empty", lambda size, **_: torch.zeros(size))
    small = scratch.scratch(4, torch.float32, Card("card"), "slot")
    large = scratch.scratch(8, torch.float32, Card("card"), "slot")
    assert scratch.scratch(3, torch.float32, Card("card"), "slot").data_ptr() == large.data_ptr()
    assert small.data_ptr() in {buffer.data_ptr() for buffer in held.values()}


# ---- on a card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_whole_loop_on_a_card(tmp_path):
    """Measured, not faked: search, certificate, saved model and its reload are on the device."""
    import autotune
    from autotune.tune import tune

    changes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    folder = tiny.make_model("llama", tmp_path / "model", torch.bfloat16, **changes)
    data = tiny.write_documents(tmp_path / "data.jsonl", 16, 40)
    values = tiny.settings(folder, tmp_path / "run", data, trials=4, schemes=("w8a8-int8", "w4a16-int4-g128"))
    result = tune(RunConfig.of(**values))
    assert result.session.place.device.type == "cuda" and result.end_to_end.of("dense").decode_ms.median > 0
    model = autotune.load(tmp_path / "run")
    assert next(model.parameters()).device.type == "cuda"
    ids = torch.arange(8, device="cuda").unsqueeze(0)
    assert torch.isfinite(model(ids).logits).all()
