"""A model block by block from disk: the same entries, losses and measurements as of the model held whole."""

from __future__ import annotations

import pytest
import tiny
import torch

from autotune import score as whole_score
from autotune import streamed_score
from autotune.blocks import find_blocks
from autotune.compress import database
from autotune.compress.calibrate import input_statistics
from autotune.compress.visits import visits
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.model import load_mixed, load_model, open_model
from autotune.models import Models
from autotune.place import Place
from autotune.reference_model import ReferenceModel
from autotune.run import RunFolder, silent
from autotune.session import open_session
from autotune.streamed_reference import StreamedReference
from autotune.streaming import ENTRY, EXIT, Streamed
from autotune.teacher import Teacher
from autotune.tune import tune

KINDS = ["llama", "gpt2", "bert", "moe"]
MIXED = [*((kind, False) for kind in KINDS), ("llama-bf16", False), ("llama-bf16", True), ("llama-tied", False)]


def streamed(opened, mixed=False):
    return Streamed(opened, torch.bfloat16 if mixed else torch.float32, mixed)


def whole(opened, mixed=False):
    return load_mixed(opened) if mixed else load_model(opened, torch.float32)


def present(stream):
    """Blocks, and None for what is outside of them, that have any weights."""
    numbers = {block: number for number, block in enumerate(stream.blocks)}
    found = set()
    for path, parameter in stream.model.named_parameters():
        if not parameter.is_meta:
            inside = [number for block, number in numbers.items() if path.startswith(_path(stream, block))]
            found.add(inside[0] if inside else None)
    return found


def _path(stream, block):
    return next(f"{path}." for path, module in stream.model.named_modules() if module is block)


@pytest.fixture(scope="module")
def references(rounded):
    """(kind, mixed) -> the same reference model held whole and streamed, and its space."""

    def get(kind, mixed):
        opened, space, made = rounded(kind, mixed)
        return (
            ReferenceModel(whole(opened, mixed), opened.spec, made),
            StreamedReference(streamed(opened, mixed), opened.spec, made),
            space,
        )

    return get


def configured(space, name):
    return {entry.group: name for entry in space.usable() if entry.scheme == name}


@pytest.fixture(scope="module")
def rounded(models, tmp_path_factory):
    """(kind, mixed) -> opened model, space, database by the quickest method of the model held whole."""
    made = {}

    def get(kind, mixed=False):
        if (kind, mixed) not in made:
            opened, folder = open_model(str(models(kind))), tmp_path_factory.mktemp("whole")
            space = tiny.space_of(opened.spec)
            built = database.build(whole(opened, mixed), opened.spec, space, tiny.tokens(4), folder, "wanda")
            made[kind, mixed] = opened, space, built
        return made[kind, mixed]

    return get


@pytest.mark.parametrize(("kind", "mixed"), MIXED)
def test_entries_are_the_same_bytes(rounded, tmp_path, kind, mixed):
    opened, space, made = rounded(kind, mixed)
    found = database.build(streamed(opened, mixed), opened.spec, space, tiny.tokens(4), tmp_path, "wanda")
    assert found.entries == made.entries
    for name in set(made.entries.values()):
        assert (found.folder / name).read_bytes() == (made.folder / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_the_same_bits(models, kind):
    opened = open_model(str(models(kind)))
    documents = tiny.tokens(5)
    expected = input_statistics(whole(opened), opened.spec.groups, documents)
    seen = set()
    for visit in visits(streamed(opened), opened.spec, documents):
        if not visit.groups:  # an encoder has no head
            continue
        for name, statistics in input_statistics(visit.model, visit.groups, visit.documents, run=visit.run).items():
            seen.add(name)
            assert torch.equal(statistics.hessian, expected[name].hessian)
            assert torch.equal(statistics.check, expected[name].check)
            assert (statistics.tokens, statistics.note) == (expected[name].tokens, expected[name].note)
    assert seen == set(expected)


@pytest.mark.parametrize(("kind", "mixed"), MIXED)
def test_losses_are_the_same_numbers(references, kind, mixed):
    model, stream, space = references(kind, mixed)
    documents, steps = tiny.tokens(4), []
    table = streamed_score.score(stream, space, documents, 2, 3, lambda done, total: steps.append(done / total))
    assert table == whole_score.score(model, space, documents, 2, 3)
    assert steps == sorted(steps)
    assert steps[-1] == 1


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_batches_change_no_loss_but_its_rounding(references, monkeypatch, kind):
    model, stream, space = references(kind, False)
    expected = whole_score.score(model, space, tiny.tokens(4))
    monkeypatch.setattr(streamed_score, "_STATE_BYTES", 1)
    monkeypatch.setattr(streamed_score, "BATCH_BYTES", 1)
    found = streamed_score.score(stream, space, tiny.tokens(4))
    assert [row.loss_nats for row in found.rows] == pytest.approx([row.loss_nats for row in expected.rows], rel=1e-4)


@pytest.mark.parametrize(("kind", "mixed"), MIXED)
def test_measurements_are_the_same_numbers(references, kind, mixed):
    model, stream, space = references(kind, mixed)
    teachers = [Teacher(item, tiny.tokens(4), (0.5, 1.0)) for item in (model, stream)]
    plans = [configured(space, "w8a8-int8"), configured(space, "w8a16-int8"), {}]
    plans.append({name: item for name, item in plans[0].items() if name.endswith("o_proj")})
    for plan in plans:
        for look in (0, 1):
            expected, found = (teacher.measure(plan, look) for teacher in teachers)
            assert found == expected
    assert teachers[0].perplexity() == teachers[1].perplexity()
    if mixed:
        assert teachers[0].floor() == teachers[1].floor() > 0


def test_a_configuration_reads_every_block_once_for_all_documents(references, monkeypatch):
    _, stream, space = references("llama", False)
    loads, loaded = [], Streamed.loaded
    monkeypatch.setattr(Streamed, "loaded", lambda self, part: loads.append(part) or loaded(self, part))
    teacher = Teacher(stream, tiny.tokens(4), (0.5, 1.0))
    teacher.measure(configured(space, "w8a16-int8"))
    assert loads == [ENTRY, 0, 1, EXIT]  # the dense model and the other together
    teacher.measure(configured(space, "w8a8-int8"))
    assert loads[4:] == [ENTRY, 0, 1, EXIT]
    with torch.inference_mode():
        head = {"lm_head": "w8a8-int8"}
        stream.select(head)
        stream.outputs(tiny.tokens(4)[0])
    assert loads[8:] == []  # only what comes after the blocks differs from the dense model


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_at_a_time_is_in_memory(models, kind):
    stream = streamed(open_model(str(models(kind))))
    assert present(stream) == set()
    for part in (ENTRY, *stream.parts):
        with stream.loaded(part):
            assert present(stream) == {part if part >= 0 else None}
        assert present(stream) == set()
    with pytest.raises(RuntimeError), stream.loaded(0):
        raise RuntimeError
    assert present(stream) == set()


def test_the_head_is_not_read_where_documents_enter(opened_llama):
    stream = streamed(opened_llama)
    with stream.loaded(ENTRY):
        assert stream.model.lm_head.weight.is_meta
        assert not stream.model.model.embed_tokens.weight.is_meta


def test_embeddings_are_looked_up_as_they_are_stored(models):
    """A bf16 checkpoint computed in fp32: no fp32 copy of the whole table is made."""
    opened = open_model(str(models("llama-bf16")))
    stream = streamed(opened)
    with stream.loaded(ENTRY), torch.no_grad():
        assert stream.model.model.embed_tokens.weight.dtype == torch.bfloat16
        state = stream.enter(tiny.tokens(1)[0]).state
    assert torch.equal(state[0], whole(opened).model.embed_tokens(tiny.tokens(1)[0]))


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_sharded_checkpoints(rounded, models, tmp_path, kind):
    import transformers

    opened, space, made = rounded(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(models(kind), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    sharded = open_model(str(tmp_path / "model"))
    assert len(sharded.checkpoint.shards) > 2
    folder = tmp_path / "database"  # entries are named by the model's hash, which shards are part of: here the other's
    found = database.build(streamed(sharded), opened.spec, space, tiny.tokens(4), folder, "wanda")
    assert found.entries == made.entries
    for group in opened.spec.groups:  # where a matrix lies in its file moves the last bits of what calibration sees
        codes, expected = (item.load(group, "w4a16-int4-g32").codes for item in (found, made))
        assert float((codes == expected).float().mean()) > 0.999


def test_a_killed_build_goes_on_where_it_stopped(rounded, tmp_path):
    opened, space, made = rounded("llama")

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 5:
            raise Killed

    def build(progress):
        documents = tiny.tokens(4)
        return database.build(streamed(opened), opened.spec, space, documents, tmp_path, "wanda", progress)

    with pytest.raises(Killed):
        build(kill)
    there = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert 0 < len(there) < len(set(made.entries.values()))
    counted = []
    build(lambda *at: counted.append(at))
    assert counted[-1] == (len(opened.spec.groups) - 5,) * 2
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in there} == there
    assert all((tmp_path / name).read_bytes() == (made.folder / name).read_bytes() for name in made.entries.values())


def test_weights_that_are_not_finite_are_named(checkpoint_copy):
    from safetensors.torch import load_file, save_file

    file = checkpoint_copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    stream = streamed(open_model(str(checkpoint_copy)))
    with stream.loaded(0):
        pass
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj") as caught, stream.loaded(1):
        pass
    assert caught.value.code == "model.nonfinite"


def test_blocks_that_are_not_called_once_each_are_refused(tmp_path):
    """ALBERT's layers are one, called again and again."""
    import transformers

    config = transformers.AlbertConfig(
        hidden_size=64, embedding_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    with pytest.raises(InputError, match="block by block") as caught:
        find_blocks(opened)
    assert caught.value.code == "model.streaming"


def session_of(model, out, data, report=silent, **changes):
    values = tiny.settings(model, out, data, **changes)
    return open_session(RunFolder(out), RunConfig.of(**values), report)


@pytest.mark.parametrize(
    ("asked", "memory", "expected"),
    [(None, 2**40, False), (None, 2**20, True), (False, 2**20, False), (True, 2**40, True)],
)
def test_it_is_chosen_by_memory_unless_asked_for(models, tmp_path, monkeypatch, asked, memory, expected):
    with tiny.faked(monkeypatch):
        monkeypatch.setattr(Place, "memory_bytes", memory)
        session = session_of(models("llama"), tmp_path / "run", tmp_path / "unused", streaming=asked)
        assert session.streams is expected
        assert isinstance(Models(session, None, None).dense, Streamed) is expected


def test_a_model_that_cannot_be_streamed_is_held_whole_unless_asked(models, tmp_path, monkeypatch):
    def refuse(opened):
        raise InputError("model.streaming", "because.")

    said = []
    with tiny.faked(monkeypatch):
        monkeypatch.setattr("autotune.session.find_blocks", refuse)
        monkeypatch.setattr(Place, "memory_bytes", 2**20)
        session = session_of(models("llama"), tmp_path, tmp_path / "x", lambda *what: said.append(what))
        assert not session.streams
        assert "because." in said[-1][-1]
        with pytest.raises(InputError, match="because"):
            _ = session_of(models("llama"), tmp_path, tmp_path / "x", streaming=True).streams


@pytest.mark.slow
def test_the_loop_decides_the_same_streamed(models, tmp_path, monkeypatch):
    folder = tiny.make_model("llama", tmp_path / "model", num_hidden_layers=1)
    data = tiny.write_documents(tmp_path / "data.jsonl", 16, 40)
    with tiny.faked(monkeypatch):
        runs = {}
        for streaming in (False, True):
            out = tmp_path / str(streaming)
            # Finalists are compressed again only where the model is held whole.
            settings = tiny.settings(folder, out, data, trials=2, streaming=streaming, recompress=False)
            runs[streaming] = tune(RunConfig.of(**settings))
        assert runs[True].plan.digest() == runs[False].plan.digest()
        assert runs[True].losses == runs[False].losses
        assert (tmp_path / "True" / "model").is_dir()  # it fits memory after all, so it was run


def test_a_model_larger_than_memory_gets_a_plan_that_was_not_run(models, tmp_path, monkeypatch):
    folder = tiny.make_model("llama", tmp_path / "model", num_hidden_layers=1)
    data = tiny.write_documents(tmp_path / "data.jsonl", 16, 40)
    with tiny.faked(monkeypatch):
        monkeypatch.setattr(Place, "memory_bytes", 2**12)
        result = tune(RunConfig.of(**tiny.settings(folder, tmp_path / "run", data, trials=2)))
    assert result.end_to_end is None
    assert set(result.plan.configuration) == {group.name for group in result.session.spec.groups}
    assert not (tmp_path / "run" / "model").exists()
    assert any("larger than memory" in warning for warning in result.report["warnings"])
    assert "did not run" in result.report["plan"]["statement"]
