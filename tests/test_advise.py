"""`autotune advise`: bounds by hand, what was measured, what cannot be used, and every shipped target."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from autotune import advise as module
from autotune.advise import advise
from autotune.attention_cost import Attention, attention_of
from autotune.errors import InputError
from autotune.export.runtimes import runtimes
from autotune.profilers.table import LatencyTable
from autotune.search_space.schemes import scheme
from autotune.targets import target
from autotune.targets.target import Ceilings, Target

# 100 GB/s, 10 TFLOP/s: a byte takes 1e-5 us, an operation 1e-7 us. One microsecond a launch.
CARD = Target(
    name="card",
    device="cuda",
    model="A Card",
    features=("bf16", "int8", "sparse24", "triton"),
    cores=1,
    memory_bytes=150_000,
    last_cache_bytes=0,
    ceilings=Ceilings(((1, 200.0), (1000, 100.0)), {"fp32": 5.0, "bf16": 10.0, "int8": 20.0}, 1.0),
    compute_capability=8.0,
)
DENSE_BYTES = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64 + 64 * 256)  # qkv, o, gate and up, down, lm_head
ROW_BYTES = 2 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64) + (64 + 256))  # in and out, a row
SCALE_BYTES = 2 * (128 + 64 + 256 + 64 + 256)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """config.json of one layer, 4 heads of 16, 2 key heads; no weights."""
    import transformers

    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    values |= {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    folder = tmp_path_factory.mktemp("advise")
    transformers.LlamaConfig(**values).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "resolve_target", lambda name: (CARD, False))
    return tmp_path / "home"


def by_name(advice, name):
    return next(item for item in advice.schemes if item.name == name)


def test_bounds_are_those_computed_by_hand(config, card):
    advice = advise(str(config), "card", "1,8,4")
    prefill, decode = advice.phases
    assert (decode.name, decode.tokens, decode.context, decode.count) == ("decode", 1, 10, 4)
    weights, cache = (DENSE_BYTES + ROW_BYTES) * 1e-5, 2 * 10 * 2 * 16 * 2 * 1e-5
    assert decode.parts_us == pytest.approx({"weights": weights, "arithmetic": 0.0, "cache": cache, "launches": 5.0})
    assert decode.binds == "launches" and decode.measured_us is None
    # The prompt's eight rows; the last position's logits only; 36 pairs of positions are too little work to bind.
    rows = 7 * (ROW_BYTES - 2 * (64 + 256))
    assert prefill.parts_us["weights"] == pytest.approx(weights + rows * 1e-5)
    eight = by_name(advice, "w8a16-int8")
    less = (DENSE_BYTES / 2 + SCALE_BYTES + ROW_BYTES) * 1e-5
    assert eight.gains["decode"] == pytest.approx((weights + 5 + cache) / (less + 5 + cache))
    assert eight.source == "bound" and eight.kernels == ("triton.w8a16",) and eight.groups == 5
    assert advice.cache_bytes == {12: 12 * 128, 1024: 1024 * 128, 4096: 4096 * 128}
    embedding, norms = 256 * 64 * 2, 3 * 64 * 2
    assert eight.weight_bytes == DENSE_BYTES // 2 + SCALE_BYTES + embedding + norms and eight.fits
    assert advice.dense_bytes == DENSE_BYTES + embedding + norms and advice.dense_fits
    assert not advise(str(config), "card", "1,100,100").dense_fits  # 25,600 bytes of keys and values more


def test_a_long_prompt_is_bound_by_arithmetic_and_many_sequences_by_their_cache(config, card, monkeypatch):
    slow = Ceilings(CARD.ceilings.read_gb_per_s, {"bf16": 0.1, "int8": 0.2}, 1e-3)
    monkeypatch.setattr(module, "resolve_target", lambda name: (Target(**{**vars(CARD), "ceilings": slow}), False))
    advice = advise(str(config), "card", "1,512,0")
    assert advice.phases[0].binds == "arithmetic"
    assert by_name(advice, "w8a8-int8").gains["prefill"] > by_name(advice, "w8a16-int8").gains["prefill"]
    fast = Ceilings(CARD.ceilings.read_gb_per_s, {"bf16": 1000.0}, 1e-3)
    monkeypatch.setattr(module, "resolve_target", lambda name: (Target(**{**vars(CARD), "ceilings": fast}), False))
    assert advise(str(config), "card", "16,1024,64").phases[1].binds == "cache"


def test_what_no_kernel_here_does_gets_an_ideal_one_and_the_reason(config, card):
    advice = advise(str(config), "card", "1,8,4")
    without = by_name(advice, "w4a8-int4-g64")
    assert without.kernels == () and without.source == "ideal kernel" and without.gains["decode"] > 1
    assert "no cuda kernel implements" in without.reason
    assert by_name(advice, "w8a8-fp8").gains is None  # no such rate on this card
    none = by_name(advise(str(config), "card", "1,8,4", schemes=["w4a16-int4-g128"]), "w4a16-int4-g128")
    assert none.groups == 1  # only `down` has 128 inputs


def test_of_a_mixture_only_the_experts_that_get_tokens_are_read(card, tmp_path):
    import transformers

    def parts(chosen):
        values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        values |= {"num_key_value_heads": 2, "vocab_size": 256, "dtype": "bfloat16", "num_local_experts": 4}
        values |= {"num_experts_per_tok": chosen, "architectures": ["MixtralForCausalLM"], "sliding_window": None}
        transformers.MixtralConfig(**values).save_pretrained(tmp_path)
        return advise(str(tmp_path / "config.json"), "card", "1,8,4").phases[1].parts_us

    one, three = parts(1), parts(3)
    expert = 2 * (64 * 256 + 128 * 64) + 2 * ((64 + 256) + (128 + 64))  # gate and up, down; weights and one row
    assert three["weights"] - one["weights"] == pytest.approx(2 * expert * 1e-5)
    assert three["launches"] - one["launches"] == pytest.approx(2 * 2.0)


def test_what_is_not_sure_is_noted(config, card, monkeypatch):
    busy = Ceilings(CARD.ceilings.read_gb_per_s, {"bf16": 1.0}, 0.0, "measured", busy=True)
    monkeypatch.setattr(module, "resolve_target", lambda name: (Target(**{**vars(CARD), "ceilings": busy}), False))
    advice = advise(str(config), "card", "1,8,4")
    assert advice.ceilings == "measured while busy" and advice.phases[0].parts_us["launches"] is None
    notes = " ".join(advice.notes)
    assert "too low" in notes and "launch costs on this target is not known" in notes and "not measured" not in notes


def test_measured_layers_are_used_and_marked(config, card):
    estimated = advise(str(config), "card", "1,8,4")
    opened = module.open_model(str(config), shapes_only=True)
    bounds = module._Bounds(opened.spec, CARD, False, module.workload_module.parse("1,8,4"), "", ())
    rows = []
    for name, kernel, time_us in (("bf16", "cuda.bf16", 4.0), ("w8a16-int8", "triton.w8a16", 1.0)):
        for group in opened.spec.groups:
            for phase, _ in bounds._phases:
                job = bounds._job(group, scheme(name), module.kernel_named(kernel), phase)
                rows.append(job.row((time_us,) * 3, "measured", 1, 20))
    (card / "tables").mkdir(parents=True)
    LatencyTable("card", "f", tuple(rows)).to_csv(card / "tables" / "card.csv")
    advice = advise(str(config), "card", "1,8,4")
    found = by_name(advice, "w8a16-int8")
    cache = advice.phases[1].parts_us["cache"]
    assert found.source == "measured" and found.gains["decode"] == pytest.approx((20 + cache) / (5 + cache))
    assert advice.phases[1].measured_us == 20.0
    assert by_name(advice, "w8a8-int8") == by_name(estimated, "w8a8-int8")


def test_every_shipped_target_and_this_machine(config, monkeypatch, tmp_path):
    for name in target.names():
        advice = advise(str(config), name, "chat")
        assert len(advice.phases) == 2 and all(phase.least_us > 0 for phase in advice.phases)
        assert any(item.gains for item in advice.schemes)
        unknown = target.load(name).device == "mps"
        assert (advice.phases[0].parts_us["launches"] is None) == unknown
        assert not (unknown and any(item.kernels for item in advice.schemes))
        assert json.loads(json.dumps(advice.to_json(), allow_nan=False))["phases"][0]["binds"]
    monkeypatch.setattr(module, "resolve_target", lambda name: (tiny.here(), True))
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    assert "autotune" in by_name(advise(str(config), "auto", "chat"), "w8a8-int8").runtimes


def test_what_cannot_be_used_says_so(config, tmp_path):
    with pytest.raises(InputError, match=r"target\.unknown.*h100"):
        advise(str(config), "h10", "chat")
    with pytest.raises(InputError, match=r"scheme\.unknown"):
        advise(str(config), "h100", "chat", schemes=["w5"])
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "llama", "hidden_size": ')
    with pytest.raises(InputError, match=r"model\.architecture"):
        advise(str(broken), "h100", "chat")
    broken.write_text('{"model_type": "llama", "hidden_size": 63, "num_attention_heads": 4, "architectures": ["X"]}')
    with pytest.raises(InputError, match=r"model\."):
        advise(str(broken), "h100", "chat")
    with pytest.raises(InputError, match=r"model\.missing"):
        advise(str(tmp_path / "gone"), "h100", "chat")


def test_weights_are_not_looked_at(models, tmp_path):
    """A shard that is no safetensors file does not matter."""
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(b"nothing")
    assert advise(str(folder), "h100", "chat").phases


# ---- attention


def pairs(new, context, window, causal):
    """One by one."""
    if not causal:
        return new * context
    return sum(min(position, window or context) for position in range(context - new + 1, context + 1))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_positions(window, causal):
    attention = Attention((window,), 3, 1, 5, causal)
    for context in (1, 2, 7, 8, 20):
        for new in {1, 2, context // 2 + 1, context}:
            if new <= context:
                assert attention.operations(new, context, 2) == 4 * 2 * 3 * 5 * pairs(new, context, window, causal)


def test_windows_bound_the_cache():
    assert Attention((None, 4), 8, 2, 16, True).cache_bytes(10, 3, 2) == 2 * (10 + 4) * 2 * 16 * 2 * 3
    assert Attention((None,), 8, 2, 16, False).cache_bytes(10, 3, 2) == 0


class Config:
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 64

    def __init__(self, **values):
        self.__dict__.update(values)


def test_what_a_config_says_of_attention():
    assert attention_of(Config(), True) == Attention((None, None), 4, 4, 16, True)
    kinds = ["sliding_attention", "full_attention"]
    mixed = attention_of(Config(layer_types=kinds, sliding_window=8, head_dim=32, num_key_value_heads=1), True)
    assert mixed == Attention((8, None), 4, 1, 32, True)
    assert attention_of(Config(sliding_window=8), True).windows == (8, 8)
    assert attention_of(Config(sliding_window=8, use_sliding_window=False), True).windows == (None, None)
    assert "latent" in attention_of(Config(kv_lora_rank=512), True)
    assert "linear_attention" in attention_of(Config(layer_types=["linear_attention"]), True)
    assert "heads" in attention_of(Config(num_attention_heads=None), True)


def test_runtimes_are_those_of_the_exporter():
    h100, here = target.load("h100"), target.load("x86-generic")
    names = [str(item) for item in runtimes(scheme("w4a16-int4-g128"), h100)]
    assert names == ["vLLM", "SGLang", "transformers (dense speed)"]
    assert str(runtimes(scheme("2:4+w8a8-int8"), here)[0]) == "vLLM (zeros unused)"
    assert runtimes(scheme("w8a8-int8"), target.load("arm-generic")) == runtimes(scheme("2:4"), here)[2:]
    assert runtimes(scheme("w4a8-int4-g64"), h100) == ()  # the exporter cannot hold it
