"""Training after compression: gradients, masks, codes, the curve, resuming; on tiny models."""

from __future__ import annotations

import pytest
import tiny
import torch

from autotune.compress.database import stacked_weight
from autotune.errors import InputError
from autotune.kernels import storage
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.model import load_model, open_model
from autotune.recover import checkpoints, texts, training
from autotune.recover.distill import Distillation, Recipe
from autotune.recover.losses import distance, divergence
from autotune.recover.quantizer import Master
from autotune.recover.student import StraightThrough, Student
from autotune.recover.texts import Sequences
from autotune.search_space.schemes import MORE, SCHEMES, scheme

COMPRESSED = [item.name for item in (*SCHEMES, *MORE) if not item.is_dense]
FALLS_TO = 0.85  # of the loss before, in 24 steps of the tiny models
SPARSE = [name for name in COMPRESSED if scheme(name).sparsity != "dense"]


def master_of(name, seed=0, out=16, inputs=256):
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1
    return Master(tiny.rounded(weight, None, scheme(name)))


def quantized(master):
    return master.quantized(torch.empty_like(master.weight))


@pytest.mark.parametrize("name", COMPRESSED)
def test_codes_are_what_the_trained_weights_round_to(name):
    """Before training, after it, and after scales followed."""
    master = master_of(name)
    start = quantized(master)
    assert torch.equal(dequantize(master.codes()), start)
    noise = torch.randn(master.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    master.weight += noise if master.keep is None else noise * master.keep
    for _ in range(2):
        codes = master.codes()
        assert torch.equal(dequantize(codes), quantized(master))
        stored = storage.unpack(scheme(name), 256, storage.pack(codes))
        assert torch.equal(dequantize(stored), quantized(master))
        master.follow()
    assert not torch.equal(start, quantized(master))


@pytest.mark.parametrize("name", [name for name in COMPRESSED if scheme(name).weight.bits < 16])
def test_scales_follow_the_weights(name):
    master = master_of(name)
    before = quantized(master)
    master.follow()
    assert torch.equal(quantized(master), before)  # nothing has grown
    master.weight *= 2
    master.follow()
    assert torch.equal(quantized(master), 2 * before)


@pytest.mark.parametrize("name", COMPRESSED)
def test_masters_start_where_compression_ended(name):
    weight = tiny.rounded(torch.randn(16, 256, generator=torch.Generator().manual_seed(2)), None, scheme(name))
    assert torch.equal(quantized(Master(weight)), dequantize(weight))


def test_the_gradient_passes_rounding_unchanged():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    number = scheme("w8a8-int8").activation
    y = StraightThrough.apply(x, number, torch.float32)
    assert torch.equal(y, quantize_activations(x.detach(), number))
    weight = torch.arange(24.0).view(3, 8)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_the_divergence_and_its_gradient_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 300, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 5, 300, generator=generator, dtype=torch.float64)
    wanted, found = teacher.log_softmax(-1), logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((wanted.exp() * (wanted - found)).sum() / 10, logits)
    loss = divergence(logits, teacher)
    by_hand = (wanted.exp() * (wanted - found)).sum().detach() / 10
    assert float(loss.detach()) == pytest.approx(float(by_hand), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_at_a_temperature_the_gradient_is_as_large():
    """Logits are divided by T, so their gradient is, twice: T squared makes up for it."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 4, 50, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(1, 4, 50, generator=generator, dtype=torch.float64)
    expected = 0.0
    for t in (1.0, 2.0):
        wanted, found = (teacher / t).log_softmax(-1), (logits / t).log_softmax(-1)
        expected = expected + (wanted.exp() * (wanted - found)).sum() * t * t / 2 / 4
    loss = divergence(logits, teacher, (1.0, 2.0))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (by_hand,) = torch.autograd.grad(expected, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, by_hand, atol=1e-7)


def test_end_to_end_hidden_states_pull_too(distillation, monkeypatch):
    """With logits that say nothing the gradient of the first layer is that of the hidden states alone."""
    monkeypatch.setattr("autotune.recover.distill.divergence", lambda outputs, wanted, _: outputs.sum() * 0)
    item = distillation(block_share=0.0, steps=4)
    before = item.student.groups["model.layers.0.mlp.down_proj"].master.weight.clone()
    item.step()
    assert not torch.equal(item.student.groups["model.layers.0.mlp.down_proj"].master.weight, before)


def test_the_distance_is_relative():
    teacher = torch.ones(2, 4)
    assert float(distance(teacher * 1.5, teacher)) == pytest.approx(0.25)


def sequences_of(count=24, length=32, seed=0):
    ids = torch.stack(tiny.tokens(count, length, seed))
    return Sequences("made up", str(seed), ids[4:], ids[:4])


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """kind -> a model whose layers have something to say: compressing them costs whole nats."""
    folder = tmp_path_factory.mktemp("loud")

    def get(name):
        if not (folder / name).exists():
            dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
            changes = {"tie_word_embeddings": True} if name == "llama-tied" else {}
            tiny.make_model(name.partition("-")[0], folder / name, dtype, initializer_range=0.2, **changes)
        return open_model(str(folder / name))

    return get


@pytest.fixture
def distillation(loud):
    """(kind, scheme, recipe changes) -> a distillation of the tiny model under that scheme everywhere."""

    def make(kind="llama", name="2:4+w8a8-int8", **changes):
        opened = loud(kind)
        model = load_model(opened)
        masters = {
            g.name: Master(tiny.rounded(stacked_weight(model, g), None, scheme(name))) for g in opened.spec.groups
        }
        recipe = Recipe(**({"steps": 12, "batch_tokens": 256, "rate": 0.03} | changes))
        return Distillation(Student(model, opened.spec, masters), sequences_of(), recipe)

    return make


def run(distillation, folder, **options):
    return training.train(distillation, folder, "test", lambda *_: None, **options)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-bf16", "gpt2", "bert"])
def test_the_loss_falls(distillation, tmp_path, kind):
    item = distillation(kind, steps=24)
    trained = run(item, tmp_path / "checkpoint")
    assert trained.best.check_nats < FALLS_TO * trained.marks[0].check_nats
    assert item.check() == pytest.approx(trained.best.check_nats, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "rate", "left"), [("w4a16-int4-g32", 0.005, 1.0), ("2:4", 0.03, 0.9), ("2:4+w4a8-int4-g64", 0.03, 0.9)]
)
def test_the_loss_falls_under_other_schemes(distillation, tmp_path, name, rate, left):
    trained = run(distillation(name=name, steps=16, rate=rate), tmp_path / "checkpoint")
    assert trained.best.check_nats < left * trained.marks[0].check_nats


def test_a_broken_teacher_teaches_nothing(distillation):
    """What pulls the loss down is the dense model: with its logits turned round the loss does not fall as it must."""
    item = distillation("gpt2", steps=24)
    outputs = item.student.outputs

    def broken(ids):
        logits = outputs(ids)
        return logits if torch.is_grad_enabled() else -logits

    before = item.check()
    item.student.outputs = broken
    for _ in range(24):
        item.step()
    item.student.outputs = outputs
    assert item.check() > FALLS_TO * before


@pytest.mark.parametrize("name", SPARSE)
def test_zeros_stay_zeros_bit_for_bit(distillation, name):
    if scheme(name).weight.group_size == 128:
        pytest.skip("the tiny model has 64 inputs")
    item = distillation(name=name, steps=4)
    masks = {key: group.master.weight == 0 for key, group in item.student.groups.items()}
    before = {key: group.master.weight.clone() for key, group in item.student.groups.items()}
    keeps = {key: group.master.keep.clone() for key, group in item.student.groups.items()}
    for _ in range(4):
        item.step()
    for key, group in item.student.groups.items():
        assert bool(masks[key].any())
        pruned = ~keeps[key]
        for values in (group.master.weight, dequantize(group.master.codes())):
            bits = values[pruned].view(torch.int32)
            assert torch.equal(bits, torch.zeros_like(bits))
        assert not torch.equal(group.master.weight, before[key])


def test_what_is_not_compressed_is_not_trained(distillation):
    item = distillation(steps=2)
    before = {name: value.clone() for name, value in item.student.model.named_parameters()}
    for _ in range(2):
        item.step()
    assert all(torch.equal(value, before[name]) for name, value in item.student.model.named_parameters())


def test_the_teacher_stays_the_dense_model(distillation, loud):
    item = distillation(steps=3)
    for _ in range(3):
        item.step()
    ids = torch.stack(tiny.tokens(2, 16, 5))
    with item.student.teaching():
        found = item.student.outputs(ids)
    with torch.no_grad():
        assert torch.allclose(found, load_model(loud("llama"))(ids).logits, atol=1e-4)


def test_every_block_learns_from_its_own_error(distillation):
    """Block by block the loss of the first block depends on nothing after it."""
    item = distillation(block_share=1.0, steps=4)
    first = item.student.groups["model.layers.0.mlp.down_proj"]
    other = distillation(block_share=1.0, steps=4)
    with torch.no_grad():
        other.student.groups["model.layers.1.mlp.down_proj"].master.weight.zero_()
        other.student.refresh()
    item.step(), other.step()
    same = other.student.groups["model.layers.0.mlp.down_proj"].master.weight
    assert torch.equal(first.master.weight, same)


def test_a_killed_run_resumes_to_the_same_bytes(distillation, tmp_path, monkeypatch):
    whole = distillation()
    run(whole, tmp_path / "whole")
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)  # after every step

    class Killed(Exception):
        pass

    def kill(done, *_):
        if done in (1, 5, 9):
            killed.add(done)
            raise Killed

    killed = set()
    for _ in range(3):
        with pytest.raises(Killed):
            training.train(distillation(), tmp_path / "killed", "test", kill)
    assert killed == {1, 5, 9}
    resumed = distillation()
    trained = run(resumed, tmp_path / "killed")
    assert [mark.steps for mark in trained.marks] == list(range(13))
    for name, group in whole.student.groups.items():
        one, two = group.master.codes(), resumed.student.groups[name].master.codes()
        assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


def test_a_checkpoint_of_other_inputs_is_not_used(distillation, tmp_path):
    run(distillation(steps=2), tmp_path)
    assert checkpoints.load(tmp_path, "another key") is None
    assert run(distillation(steps=2, seed=1), tmp_path).marks[0].steps == 0
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert checkpoints.load(tmp_path, "another key") is None
    assert run(distillation(steps=2), tmp_path).marks[0].steps == 0


def test_an_early_end_keeps_the_best_so_far(distillation, tmp_path):
    item = distillation(steps=1000, rate=0.003)
    steps = iter(range(100))
    trained = run(item, tmp_path / "checkpoint", should_stop=lambda: next(steps) >= 8)
    assert trained.stopped and trained.marks[-1].steps == 8
    assert trained.best.check_nats == min(mark.check_nats for mark in trained.marks)
    assert item.check() == pytest.approx(trained.best.check_nats, rel=1e-4)


def test_harm_is_not_kept(distillation, tmp_path):
    item = distillation(steps=4, rate=10.0)
    before = {name: group.master.weight.clone() for name, group in item.student.groups.items()}
    trained = run(item, tmp_path / "checkpoint")
    assert trained.best.steps == 0
    assert all(torch.equal(group.master.weight, before[name]) for name, group in item.student.groups.items())


def test_minutes_become_steps_and_leave_no_trace(distillation):
    item = distillation()
    before = {name: value.clone() for name, value in item.tensors().items()}
    steps = training.steps_for_minutes(item, 0.01)
    assert steps >= 1 and training.steps_for_minutes(item, 1.0) > steps
    assert item.done == 0 and item.recipe.steps == 12
    assert all(torch.equal(value, before[name]) for name, value in item.tensors().items())


def test_batches_go_through_everything_once_an_epoch():
    sequences = sequences_of()
    seen = torch.cat([sequences.batch(5 * step, 5, seed=3) for step in range(4)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, sequences.train.tolist()))
    again = sequences.batch(20, 20, seed=3)
    assert sorted(map(tuple, again.tolist())) == sorted(map(tuple, seen.tolist()))
    assert not torch.equal(again, seen)
    assert torch.equal(sequences.batch(7, 9, seed=3), torch.cat([seen, again])[7:16])


def test_documents_that_share_text_with_held_out_ones_are_left_out():
    documents = tiny.tokens(60, 400)
    held_out = tiny.tokens(3, 300, seed=9)
    documents[7] = torch.cat([documents[7][:100], held_out[1][50 : 50 + texts.SHARED], documents[7][:50]])
    documents[8] = torch.cat([documents[8][:100], held_out[1][50 : 49 + texts.SHARED], documents[8][:50]])  # one short
    documents[9] = held_out[2]
    found = texts.from_documents("data", documents, held_out, 64, seed=0)
    assert found.left_out == 2
    rows = torch.cat([found.train, found.check]).flatten()
    kept = torch.cat([rows, torch.zeros(64, dtype=torch.long)]).unfold(0, 20, 1)
    assert not bool((kept == held_out[2][100:120]).all(1).any())
    assert bool((kept == documents[20][100:120]).all(1).any())


def test_too_little_text_is_refused():
    with pytest.raises(InputError) as error:
        texts.from_documents("data", tiny.tokens(4, 100), tiny.tokens(2, 100, seed=1), 64, seed=0)
    assert error.value.code == "recover.too_few"
