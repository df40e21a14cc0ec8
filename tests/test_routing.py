"""Tokens to experts without the host: the same numbers as with it, in what a graph could hold; no card is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from autotune import routing, session, verify
from autotune.config import RunConfig
from autotune.experts import Expert, SplitExperts
from autotune.kernels import bank
from autotune.kernels.linear import ZEROS, FusedGroup, alternatives, install
from autotune.kernels.reference import random_weight
from autotune.kernels.spec import KERNELS, Packed, kernel, load
from autotune.model import load_model, open_model
from autotune.passes import StaticRequest
from autotune.place import Place
from autotune.profilers.cuda_timer import Recording, rehearsed
from autotune.run import RunFolder, silent
from autotune.search_space.space import build
from autotune.search_space.workload import parse
from autotune.switchable import switchable

HIDDEN, INNER, EXPERTS, TAKEN = 64, 32, 8, 2
KINDS = {"bf16": "torch.cpu.bf16", "w8a16-int8": "torch.cpu.w8a16", "w8a8-int8": "cpu.w8a8"}


@pytest.fixture(autouse=True)
def _banked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device."""
    monkeypatch.setattr(bank, "wanted", lambda spec, experts: experts > 1)


def layer_of(name: str) -> SplitExperts:
    """Experts of a layer on one kernel, random weights."""
    generator = torch.Generator().manual_seed(1)
    empty = torch.empty(2 * INNER, HIDDEN, dtype=torch.bfloat16), torch.empty(HIDDEN, INNER, dtype=torch.bfloat16)
    experts = SplitExperts(Expert(*empty, nn.SiLU()) for _ in range(EXPERTS))
    for names, sizes, inputs in (
        (("gate_proj", "up_proj"), (INNER, INNER), HIDDEN),
        (("down_proj",), (HIDDEN,), INNER),
    ):
        outputs, spec = sum(sizes), kernel(KINDS[name])
        weight = random_weight(name, EXPERTS * outputs, inputs, torch.bfloat16, False, generator)
        parts = (weight.part(slice(n * outputs, (n + 1) * outputs)) for n in range(EXPERTS))
        packs = (load(spec).pack(part, torch.bfloat16) for part in parts)
        for number, choice in enumerate(alternatives(spec, name, packs, EXPERTS)):
            group = FusedGroup(inputs, sizes)
            group.add(name, choice)
            install(experts, [f"{number}.{name}" for name in names], group)
    return experts


def tokens_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, chosen, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
    top = torch.rand(count, EXPERTS, generator=generator).topk(TAKEN)
    return hidden, top.indices, top.values.to(torch.bfloat16)


def by_host(experts: SplitExperts, *arguments: torch.Tensor) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "takes", lambda experts, tokens: False)
        found: torch.Tensor = experts(*arguments)
        return found


class NoHost(TorchDispatchMode):
    """Refuses what needs a number on the host, or has a size that only data tells."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "item")
        if any(word in str(function) for word in waits):
            raise AssertionError(f"{function} goes through the host")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_both_ways_give_what_the_host_gives(name: str, count: int) -> None:
    experts, arguments = layer_of(name), tokens_of(count)
    expected = by_host(experts, *arguments)
    assert expected.abs().max() > 0.1
    with NoHost():
        chosen, everyone = routing.by_choice(experts, *arguments), routing.by_all(experts, *arguments)
        assert torch.equal(experts(*arguments), chosen if 3 * count * TAKEN < EXPERTS else everyone)
    if count == 1:
        assert torch.equal(chosen, expected)
    for found in (chosen, everyone):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@torch.inference_mode()
def test_the_host_is_asked_otherwise() -> None:
    with NoHost(), pytest.raises(AssertionError, match="goes through the host"):
        layer_of("bf16")(*tokens_of(routing.MOST_TOKENS + 1))


@pytest.mark.parametrize("way", [routing.by_choice, routing.by_all])
@pytest.mark.parametrize("name", ["bf16", "w8a16-int8"])
def test_what_is_recorded_for_one_token_is_right_for_another(way: Any, name: str) -> None:
    """Recorded operators, replayed for tokens that other experts take."""
    experts = layer_of(name)
    first, second = tokens_of(1), tokens_of(1, seed=4)
    assert not set(first[1].flatten().tolist()) & set(second[1].flatten().tolist())
    with torch.no_grad():
        recorded = make_fx(lambda *arguments: way(experts, *arguments))(*first)
        expected = by_host(experts, *second)
        torch.testing.assert_close(recorded(*second), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("names", [("down_proj",), ("gate_proj",), ("gate_proj", "down_proj")])
@torch.inference_mode()
def test_groups_that_answer_zeros_need_no_host_either(names: tuple[str, ...]) -> None:
    experts, arguments = layer_of("bf16"), tokens_of(1)
    for expert in experts:
        for name in names:
            getattr(expert, name).group.select(ZEROS)
    with NoHost():
        found = experts(*arguments), routing.by_all(experts, *arguments)
    assert all(y.shape == arguments[0].shape and not y.any() for y in found)


@torch.inference_mode()
def test_an_expert_that_overflows_counts_only_where_tokens_were_sent_to_it() -> None:
    experts = layer_of("bf16")
    hidden, chosen, weights = tokens_of(3)
    chosen = torch.tensor([[0, 1], [2, 1], [0, 2]])
    expected = by_host(experts, hidden, chosen, weights)
    choice = experts[5].down_proj.group.choice  # type: ignore[union-attr]
    choice.packed.data[0].fill_(float("inf"))  # type: ignore[union-attr]
    found = routing.by_all(experts, hidden, chosen, weights)
    assert torch.isfinite(found).all() and not torch.isfinite(by_host(experts, hidden, chosen + 3, weights)).all()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


# ---- the bank


def test_a_row_holds_tensors_as_they_were_packed() -> None:
    """Transposed, of eight bits, absent: of all that CUDA kernels pack."""
    spec = next(spec for spec in KERNELS if spec.name == "cuda.fp8")

    def packed(number: int) -> Packed:
        columns = torch.full((24, 7), float(number)).to(torch.float8_e4m3fn).t()
        return Packed(7, 24, torch.bfloat16, 0, (columns, torch.arange(7.0) + number, None))

    made = bank.bank(spec, "w8a8-fp8", (packed(number) for number in range(3)), 3)
    for number in range(3):
        own, expected = made.expert(number), packed(number).data
        assert own.data[2] is None and (own.out_features, own.in_features) == (7, 24)
        for found, tensor in zip(own.data[:2], expected[:2], strict=True):
            assert (found.stride(), found.dtype) == (tensor.stride(), tensor.dtype)
            assert torch.equal(found.float(), tensor.float())
            assert (found.data_ptr() - made.rows.data_ptr()) % 256 == 0
    assert own.bytes == made.rows[0].nbytes == 512


def test_experts_are_rows_and_no_second_copy() -> None:
    experts = layer_of("w8a16-int8")
    choices = [expert.down_proj.group.choice for expert in experts]  # type: ignore[union-attr]
    assert len({id(choice.bank) for choice in choices}) == 1  # type: ignore[union-attr]
    rows = choices[0].bank.rows  # type: ignore[union-attr]
    for number, choice in enumerate(choices):
        assert choice.packed.data[0].data_ptr() == rows[number].data_ptr()  # type: ignore[union-attr]


# ---- the loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("moe", tmp_path_factory.mktemp("moe"))


@torch.inference_mode()
def test_decode_steps_are_recorded_and_long_prompts_are_not(folder: Path) -> None:
    opened, counted, plain = open_model(str(folder)), [], rehearsed()
    workload = parse("1,80,4")
    usable = [spec for spec in KERNELS if spec.name in ("torch.cpu.fp32", "torch.cpu.w8a16")]
    space = build(opened.spec, tiny.here(), usable, True, ["w8a16-int8"])
    table = tiny.fake_profile(opened.spec, space, tiny.here(), workload)
    place = Place(
        torch.device("cpu"), Recording(lambda call: counted.append(call) or plain.record(call), plain.elapsed)
    )
    model = switchable(opened, space, table, workload, None, 2**25, place=place)
    dense = {group.name: "fp32" for group in opened.spec.groups}
    chosen = {entry.group: entry.scheme for entry in space.usable() if entry.scheme != "fp32"}
    assert any("experts" in group for group in chosen)
    configurations = {"dense": dense, "w8a16": {**dense, **chosen}, "zeros": dict.fromkeys(dense, ZEROS)}
    result = verify.measure(model, configurations, workload, seconds=0.1)
    assert len(counted) == 3  # a decode step each
    assert all(run.prefill_ms.median > 0 and run.decode_ms.median > 0 for run in result.runs)
    model.select(dense)
    request = StaticRequest(model.model, 1, 9, 16, torch.device("cpu"))
    same = StaticRequest(load_model(opened), 1, 9, 16, torch.device("cpu"))
    with NoHost():
        found = request.prefill(), request.decode()
    for ours, expected in zip(found, (same.prefill(), same.decode()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_mixture_is_opened_for_a_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = replace(tiny.here(), device="cuda")
    monkeypatch.setattr(session, "resolve_target", lambda name: (card, True))
    config = RunConfig.of(**tiny.settings(folder, tmp_path, tmp_path / "texts.jsonl"))
    opened = session.open_session(RunFolder(tmp_path), config, silent)
    assert opened.local and any(group.experts > 1 for group in opened.spec.groups)
