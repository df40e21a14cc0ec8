"""What KL says of dNLL: a loss bound that is sharper than the candidate's own dNLL, and no surer than the data.

dNLL (what the budget limits) divided by KL is about one; KL is known 5 to 10 times more exactly from the same tokens. A
candidate's own ratio is noisy, so it is judged as

    its ratio = pooled ratio of everything measured + its own difference from the pool

The pool's error comes from documents, which all candidates share: their errors are alike, so many candidates make the
pool little surer than one. For the same reason a candidate's difference from the pool is known better than its ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from autotune.search.problem import Evaluation

CONFIDENCE = 0.8  # of the bound used while searching; certification has its own, stricter one
FLOOR = 0.4  # no ratio is taken to be lower, whatever was measured
LEAST_SPREAD = 0.15  # of the ratio between configurations; seen between uniform schemes and mixes of them
REGIME = 10.0  # times the loss limit: configurations that lose more are broken, and say nothing of those that are not


@dataclass(frozen=True)
class LossRatio:
    """dNLL over KL of configurations. `mean` +- `error`: of all together; `spread`: of one configuration around that.

    `measured` is the pool's ratio on these documents and `noise` (documents,) its error, a summand per document (the
    root of the sum of squares is the standard error; empty: none): what a candidate's own ratio is compared with.
    """

    mean: float
    error: float
    spread: float
    measured: float
    noise: tuple[float, ...]


PRIOR = LossRatio(1.0, 0.0, 0.25, 1.0, ())  # seen between 0.5 and 1.2


def loss_ratio(evaluations: Iterable[Evaluation], limit_nats: float) -> LossRatio:
    """The ratio pooled over evaluations of the same documents, each weighted by its precision; `PRIOR` without any.

    Shrunk towards one from below, as far as the data do not outweigh the prior; above one it is taken as it is: a low
    ratio found by chance costs a failed certification, a high one some speed.
    """
    near = [item for item in evaluations if 0 < item.kl_nats <= REGIME * limit_nats]
    if not near or len(near[0].tokens) < 2:
        return PRIOR
    own = np.array([item.dnll_nats / item.kl_nats for item in near])
    noise = np.stack([_noise(item) for item in near])  # (candidates, documents)
    prior = PRIOR.spread**2
    precision = 1.0 / (prior + (noise**2).sum(axis=1))
    share = precision / precision.sum()
    measured, together = float((share * own).sum()), (share[:, None] * noise).sum(axis=0)
    weight = prior / (prior + float((together**2).sum()))
    # What the ratios differ by, beyond the error of their differences; the precise ones tell.
    beyond = (own - measured) ** 2 - ((noise - together) ** 2).sum(axis=1)
    variance = float((precision**2 * beyond).sum() / (precision**2).sum())
    return LossRatio(
        mean=max(measured, 1.0 + weight * (measured - 1.0)),
        error=math.sqrt(prior * (1.0 - weight)),
        spread=math.sqrt(max(LEAST_SPREAD**2, variance)),
        measured=measured,
        noise=tuple(together.tolist()),
    )


def dnll_upper_nats(evaluation: Evaluation, ratio: LossRatio = PRIOR, confidence: float = CONFIDENCE) -> float:
    """One-sided upper bound of the dNLL per token: of the population that the documents are drawn from, at this KL.

    With `PRIOR` it rests on this evaluation and dNLL ~ N(KL, (0.25 KL)^2) alone.

    Args:
        ratio: of evaluations of the same documents; it says nothing of one that ended after a part of them.
    """
    kl = evaluation.kl_nats
    if kl <= 0:
        return 0.0
    if len(ratio.noise) not in (0, len(evaluation.tokens)):
        ratio = PRIOR
    noise = _noise(evaluation) - (np.array(ratio.noise) if ratio.noise else 0.0)
    weight = ratio.spread**2 / (ratio.spread**2 + float((noise**2).sum()))
    centre = max(FLOOR, ratio.mean + weight * (evaluation.dnll_nats / kl - ratio.measured))
    deviation = math.sqrt(ratio.error**2 + (1.0 - weight) * ratio.spread**2)
    return kl * (centre + float(ndtri(confidence)) * deviation)


def _noise(evaluation: Evaluation) -> NDArray[np.float64]:
    """Error of dNLL / KL by document (ratio estimator); one document alone has none that could be known."""
    tokens = np.array(evaluation.tokens, float)  # (documents,)
    documents = len(tokens)
    if documents < 2:
        return np.array([math.inf])
    residual = np.array(evaluation.dnll) - evaluation.dnll_nats * tokens
    return np.asarray(residual * math.sqrt(documents / (documents - 1)) / sum(evaluation.kl))
