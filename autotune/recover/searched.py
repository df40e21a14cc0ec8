"""Recovery as a choice of the search: which configuration is the fastest if it is trained afterwards.

Whether to train is one choice for the whole plan, not one a group: training takes all compressed groups at once, and
what is trained is as fast as what is not. So the search runs once more with the losses that training promises
(`prices`), at the one-shot losses that the first one measured, of which training promises to leave a share. The top few
of those that are clearly faster than the run's plan and promised to be within the budget are then trained briefly, the
same steps each from the same text and seed, run end to end by turns, and measured: from here on their own losses count,
and only the share that the rest of the budget promises is still a promise. What they were left with corrects the
promises for all; where none of them fits, the search runs once more at the corrected prices. The fastest that fits is
trained in full.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from autotune import verify
from autotune.decide import build_problem, configuration, promised_share, run_search
from autotune.errors import InfeasibleError
from autotune.finalists import front_ratio, search_budget, spread
from autotune.kernels.kv_formats import GROUP
from autotune.models import Models
from autotune.plan import Plan
from autotune.recover import training
from autotune.recover.candidates import genotype_of
from autotune.recover.gains import EARLIER, SHORT, SIZES, Factor, Probing, factors
from autotune.recover.job import Job, Options, budget
from autotune.recover.outcome import Correction, Outcome, Tried, correction
from autotune.recover.prices import TABLE, prices, promise
from autotune.recover.texts import Sequences
from autotune.result import Result
from autotune.run import Reporter
from autotune.score import LossTable
from autotune.search.codec import decode_evaluation, encode_evaluation
from autotune.search.front import fits, pareto_candidates
from autotune.search.problem import Candidate, Evaluation, Front, Problem
from autotune.search.ratio import LossRatio, dnll_upper_nats
from autotune.search_space.space import SearchSpace
from autotune.store import digest, write_text
from autotune.tables import calibrate_latency, prune_losses
from autotune.verify import EndToEnd

FASTER = 1.05  # than the run's plan, as predicted, to be worth the training
TRIED = 3  # candidates trained briefly
_SECONDS = 20.0  # of running the candidates end to end


def price(training: float, kinds: int) -> float:
    """All of it, where training the chosen one in full is `training` (minutes or tokens), with so many kinds of scheme
    to measure. Besides training it takes a search and a run end to end, which need minutes whatever the budget; where
    none of the first candidates fits, once more, and their short trainings (`again`)."""
    return training * (1 + SHORT * (TRIED + (len(SIZES) + EARLIER) * kinds))


def again(training: float) -> float:
    """What a second round of candidates adds."""
    return training * SHORT * TRIED


@dataclass(frozen=True)
class _Round:
    """A search with training's prices: `name` of its stages, factors, steps in full and of a short training, and what
    an earlier round tried."""

    name: str
    factors: tuple[Factor, ...]
    steps: int
    short: int
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class _Found:
    tried: tuple[Tried, ...]
    best: Tried | None
    ratio: LossRatio
    plan_us: float
    noisy: str


class SearchedRecovery:
    """The choice, from a finished run to the configuration that is trained."""

    def __init__(
        self,
        result: Result,
        sequences: Sequences,
        options: Options,
        device: torch.device,
        report: Reporter,
        should_stop: Callable[[], bool],
    ) -> None:
        """`result`: with every scheme that has weights, also those that the run's search did not see: so latencies are
        calibrated once more."""
        assert result.losses is not None and result.database is not None
        self.session, self.losses, self.database = result.session, result.losses, result.database
        self.sequences, self.options, self.device = sequences, options, device
        self.report, self.should_stop = report, should_stop
        self.run = result.session.folder.path
        self.folder = self.run / "recovered"
        models = self._models(result)
        calibration = calibrate_latency(self.session, result.space, result.table, models, "recovered_calibration")
        self.result = replace(result, calibration=calibration)
        self.problem = self._problem(result.space, self.losses)
        self.result.problem = self.problem
        self.probing = Probing(self.result, sequences, options.recipe, device)
        self.reference = self._plan()
        self.known = "the plan" if self.reference else "the dense model"
        self.reference_us = self.problem.latency_us(genotype_of(self.problem, self.reference))

    def choose(self) -> Outcome:
        """Raises InfeasibleError `recover.no_candidate` where nothing is promised to be faster and within the budget;
        KeyboardInterrupt where a stop was asked for: what was measured is kept."""
        if not self.probing.probes:
            raise self._nothing("no scheme here loses enough to be worth training")
        key = digest([[probe.chosen for probe in self.probing.probes], self.session.spec.model_hash])
        steps = budget(self.options, self.sequences, self.folder, key, self._fitting)
        short = max(1, round(steps * SHORT))
        measured = factors(self.probing.measure(short, self._progress("gains")))
        found = self._round(_Round("", measured, steps, short, ()))
        if found.best is None:  # what these were left with says what others will be
            corrected = self._correction(found.tried, measured, short).of(measured)
            found = self._round(_Round("_again", corrected, steps, short, found.tried))
        ratio = self._correction(found.tried, measured, short)
        write_text(self.run / TABLE, prices(self.losses, ratio.of(measured), steps).to_csv())
        if found.best is None:
            raise self._missed(found)
        return Outcome(steps, short, measured, ratio, found.tried, found.best, found.plan_us, found.noisy)

    def _correction(self, tried: Sequence[Tried], made: Sequence[Factor], steps: int) -> Correction:
        promised = [promise(i.one_shot.kl_nats, i.job.chosen, self.losses, made, steps).nats for i in tried]
        return correction([item.short.kl_nats for item in tried], promised)

    def _round(self, asked: _Round) -> _Found:
        """Search at these prices, then try what was not tried before."""
        column = prices(self.losses, asked.factors, asked.steps)
        write_text(self.run / TABLE, column.to_csv())
        space = prune_losses(self.session, self.result.space, self.result.table, column.losses)
        one_shot, promised = (self._problem(space, table) for table in (self.losses, column.losses))
        models = self._models(self.result)
        front = run_search(self.session, one_shot, models, self.should_stop, promised, f"recovered_front{asked.name}")
        models.done_with_losses()
        self._go_on()
        ratio = front_ratio(front, self.session.search_limit)
        picked = self._pick(front, ratio, promised, asked.tried)
        jobs = [item.job for item in asked.tried]
        jobs += [self._job(len(jobs) + n, configuration(promised, item.genotype)) for n, item in enumerate(picked)]
        end_to_end = self._run(jobs, f"recovered_endtoend{asked.name}")
        tried = [replace(i, latency_us=_measured_us(end_to_end, i.job.name, i.latency_us)) for i in asked.tried]
        for job, item in zip(jobs[len(tried) :], picked, strict=True):
            before = item.evaluation.scaled(1 / promised_share(one_shot, promised, item.genotype))
            soon, late = (
                promise(before.kl_nats, job.chosen, self.losses, asked.factors, count)
                for count in (asked.short, asked.steps)
            )
            trained = self._trained(job, asked.short)
            latency_us = _measured_us(end_to_end, job.name, item.latency_us)
            tried.append(Tried(job, item, before, soon, late, trained, asked.steps, asked.short, latency_us))
        plan_us = _measured_us(end_to_end, "plan", self.reference_us)
        noisy = end_to_end.noisy if end_to_end is not None else ""
        return _Found(tuple(tried), self._best(tried, ratio, plan_us), ratio, plan_us, noisy)

    def _problem(self, space: SearchSpace, losses: LossTable) -> Problem:
        """With the KV cache as the model is run: recovery leaves it so."""
        result, calibration = self.result, self.result.calibration
        assert calibration is not None
        problem = build_problem(self.session, space, result.table, losses, calibration, result.cache)
        groups = [replace(g, options=g.options[:1]) if g.name == GROUP else g for g in problem.groups]
        return replace(problem, groups=tuple(groups), settled=())

    def _plan(self) -> dict[str, str]:
        """What candidates must be faster than: the run's plan, or the dense model."""
        file = self.run / "plan.json"
        chosen = Plan.load(file).configuration if file.is_file() else {}
        return {group: name for group, name in chosen.items() if group != GROUP}

    def _job(self, number: int, chosen: dict[str, str]) -> Job:
        chosen.pop(GROUP, None)
        return Job(self.result, f"candidate {number + 1}", chosen, self.database, self.sequences)

    def _fitting(self, minutes: float) -> int:
        """Steps that fit into minutes, of the kind of scheme with most groups."""
        distillation = self.probing.distillation(self.probing.probes[0])
        try:
            return training.steps_for_minutes(distillation, minutes)
        finally:
            distillation.student.release()

    def _progress(self, stage: str) -> Callable[[int, int, str], None]:
        def step(done: int, total: int, note: str) -> None:
            self._go_on()
            self.report(stage, done, total, note)

        return step

    def _go_on(self) -> None:
        if self.should_stop():
            raise KeyboardInterrupt

    def _models(self, result: Result) -> Models:
        models = Models(self.session, result.space, result.table)
        models.database = self.database
        return models

    def _pick(self, front: Front, ratio: LossRatio, promised: Problem, tried: Sequence[Tried]) -> list[Candidate]:
        """The fastest few within the budget, were promises kept, but for those tried before.

        Raises InfeasibleError `recover.no_candidate` where there is none and none was tried.
        """
        limits = search_budget(self.session, promised)
        feasible = [item for item in front.candidates if fits(item, limits, ratio)]
        faster = [item for item in feasible if item.latency_us * FASTER <= self.reference_us]
        known = [item.job.chosen for item in tried]
        new = [item for item in faster if self._job(0, configuration(promised, item.genotype)).chosen not in known]
        if not new and not tried:
            best = min(feasible, key=lambda item: item.latency_us, default=None)
            there = f"the fastest promised within the budget takes {best.latency_us / 1e3:.2f} ms" if best else ""
            there = there or "none is promised within the budget"
            raise self._nothing(f"{there}, and {self.known} {self.reference_us / 1e3:.2f} ms")
        return spread(pareto_candidates(new), TRIED)

    def _nothing(self, why: str) -> InfeasibleError:
        wanted = f"{FASTER - 1:.0%} faster than {self.known} and within the budget"
        end_to_end = None if self.result.calibration is None else self.result.calibration.end_to_end
        noisy = f" Its times were {end_to_end.noisy}." if end_to_end is not None and end_to_end.noisy else ""
        hint = f"Give more --minutes or more --data, or recover a --point; the run is as it was.{noisy}"
        return InfeasibleError("recover.no_candidate", f"training promises nothing {wanted}: {why}.", hint)

    def _run(self, jobs: Sequence[Job], stage: str) -> EndToEnd | None:
        """Candidates and plan end to end, interleaved, before anything is trained; None where nothing can be run."""
        named: dict[str, dict[str, str]] = {"dense": {}, "plan": self.reference} | {
            job.name: job.chosen for job in jobs
        }
        wanted = {pair for chosen in named.values() for pair in chosen.items()}
        space = self.result.space
        others = {(e.group, e.scheme) for e in space.usable() if e.scheme != space.dense} - wanted
        models = self._models(replace(self.result, space=space.without(dict.fromkeys(others, "not tried"))))
        if not models.runs:
            return None

        def compute() -> EndToEnd:
            assert models.runnable is not None
            progress = self.session.progress("verify")
            return verify.measure(models.runnable, named, self.session.workload, _SECONDS, progress)

        kernels = [[[option.scheme, option.kernel] for option in group.options] for group in self.problem.groups]
        inputs = [verify.FORMAT, list(map(list, named.items())), kernels, str(self.session.workload)]
        return self.session.folder.json_stage(stage, inputs, compute, EndToEnd.to_json, EndToEnd.from_json)

    def _trained(self, job: Job, steps: int) -> Evaluation:
        """Its loss after the short training."""
        recipe = replace(self.options.recipe, steps=steps)
        config, memo = self.session.config, self.session.folder.memo()
        inputs = [job.key, str(self.device)]
        documents = [self.session.documents.digest, config.search_tokens, config.search_length]
        key = digest([*inputs, repr(recipe), torch.get_num_threads(), documents])
        try:
            value = memo.get(key)
            if value is None:
                distillation = job.distillation(recipe, self.device, self.probing.bench.dense)
                folder, report = self.folder / "checkpoint-short", partial(self.report, "short")
                try:
                    training.train(distillation, folder, inputs, report, self.should_stop, mark_every=steps)
                    self._go_on()
                    value = encode_evaluation(self.probing.bench.loss(distillation.student))
                finally:
                    distillation.student.release()
                memo.put(key, value)
                shutil.rmtree(folder, ignore_errors=True)
            return decode_evaluation(value)
        finally:
            memo.close()

    def _best(self, tried: Sequence[Tried], ratio: LossRatio, plan_us: float) -> Tried | None:
        """The fastest of those that are still faster than the plan and still expected within the budget."""
        standing = [item for item in tried if item.latency_us < plan_us and self._over(item, ratio) <= 1]
        return min(standing, key=lambda item: item.latency_us, default=None)

    def _over(self, item: Tried, ratio: LossRatio) -> float:
        return dnll_upper_nats(item.expected, ratio) / self.session.search_limit

    def _missed(self, found: _Found) -> InfeasibleError:
        times = [(item, self._over(item, found.ratio)) for item in found.tried]
        said = [f"{i.job.name} {i.latency_us / 1e3:.2f} ms, {over:.1f} times the budget" for i, over in times]
        plan = f"{self.known} takes {found.plan_us / 1e3:.2f} ms"
        return self._nothing(f"by a short training the end is expected at {'; '.join(said)}; {plan}")


def _measured_us(end_to_end: EndToEnd | None, name: str, predicted_us: float) -> float:
    return predicted_us if end_to_end is None else end_to_end.of(name).latency_ms.median * 1e3
