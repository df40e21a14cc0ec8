"""2:4 masks: two of every four inputs stay, those whose weight times input matters most."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.compress.wanda import mask_24


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_exactly_two_of_four_stay_and_no_pruned_one_scores_higher(seed, rows, fours, weighed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, fours * 4, generator=generator)
    moment = torch.rand(fours * 4, generator=generator) if weighed else None
    mask = mask_24(weight, moment)
    score = weight.abs() * (1 if moment is None else moment.sqrt())
    assert mask.shape == weight.shape
    assert torch.equal(mask.view(rows, fours, 4).sum(-1), torch.full((rows, fours), 2))
    kept = score.where(mask, torch.inf).view(rows, fours, 4).amin(-1)
    pruned = score.where(~mask, -torch.inf).view(rows, fours, 4).amax(-1)
    assert bool((kept >= pruned).all())


def test_ties_and_zeros_still_leave_two():
    assert mask_24(torch.zeros(2, 8), torch.zeros(8)).sum() == 8


def test_the_input_turns_the_choice():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert mask_24(weight, None).tolist() == [[True, True, False, False]]
    assert mask_24(weight, torch.tensor([1e-6, 1e-6, 1.0, 1.0])).tolist() == [[False, False, True, True]]
