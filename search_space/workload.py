"""What the model will be used for: batch, prompt tokens and generated tokens, or a weighted mix of them.

One request costs one prefill over batch x prompt tokens and `generated` decode steps over `batch` tokens each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotune.errors import UsageError, did_you_mean
from autotune.search_space.groups import LayerGroup


@dataclass(frozen=True)
class Phase:
    """One forward pass of the model. `count`: how often it runs in one (weighted) request."""

    name: str  # "prefill" or "decode"
    batch: int
    tokens: int  # rows every linear layer sees: batch x positions
    count: float

    def rows(self, group: LayerGroup) -> int:
        """Rows this group's kernel is called with; generation computes the last position's logits only. Experts share
        the tokens: of those that get any, each gets the mean number."""
        tokens = self.batch if group.last_token_only else self.tokens
        return tokens if group.experts == 1 else max(1, round(tokens * group.experts_per_token / self.calls(group)))

    def calls(self, group: LayerGroup) -> float:
        """Kernel calls of this group: 1, or how many experts get any token if each token chooses its experts with equal
        probability, independently of the others. Exact for one token; routers that prefer some experts reach fewer."""
        if group.experts == 1:
            return 1.0
        missed = (1 - group.experts_per_token / group.experts) ** self.tokens
        return group.experts * (1 - missed)


@dataclass(frozen=True)
class Request:
    batch: int
    prompt: int
    generated: int
    weight: float = 1.0


@dataclass(frozen=True)
class Workload:
    name: str
    requests: tuple[Request, ...]

    @property
    def phases(self) -> tuple[Phase, ...]:
        phases = []
        for request in self.requests:
            phases.append(Phase("prefill", request.batch, request.batch * request.prompt, request.weight))
            if request.generated:
                phases.append(Phase("decode", request.batch, request.batch, request.weight * request.generated))
        return tuple(phases)

    def __str__(self) -> str:
        parts = [f"{r.weight:g} x ({r.batch},{r.prompt},{r.generated})" for r in self.requests]
        return f"{self.name}: " + " + ".join(parts)


PRESETS = {
    "chat": (Request(1, 128, 64),),
    "decode": (Request(1, 16, 128),),
    "prefill": (Request(1, 512, 0),),
}


def parse(text: str) -> Workload:
    """A preset name, "B,P,G", or a mix "0.7*1,128,64+0.3*1,512,0".

    Raises:
        UsageError: `workload.unknown` or `workload.syntax`.
    """
    if text in PRESETS:
        return Workload(text, PRESETS[text])
    if not any(character.isdigit() for character in text):
        raise UsageError("workload.unknown", f"there is no workload {text!r}.", did_you_mean(text, PRESETS))
    requests = tuple(_request(part) for part in text.split("+"))
    total = sum(request.weight for request in requests)
    scaled = tuple(Request(r.batch, r.prompt, r.generated, r.weight / total) for r in requests)
    return Workload(text, scaled)


def _request(text: str) -> Request:
    weight_text, _, shape = text.rpartition("*")
    try:
        weight = float(weight_text) if weight_text else 1.0
        batch, prompt, generated = (int(number) for number in shape.split(","))
    except ValueError as error:
        hint = "Write batch,prompt,generated, for example 1,128,64, or a mix such as 0.7*1,128,64+0.3*1,512,0."
        raise UsageError("workload.syntax", f"{text!r} is not a workload.", hint) from error
    if not 0 < weight < math.inf or batch < 1 or prompt < 1 or generated < 0:
        hint = "batch and prompt are at least 1, generated at least 0, weights positive."
        raise UsageError("workload.syntax", f"{text!r} is out of range.", hint)
    return Request(batch, prompt, generated, weight)
