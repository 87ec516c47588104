"""What a request teaches once its prefill is over: what work costs, and how good prediction and choice were.

Knows no instances and no queue: both were noted when the request was placed.
"""

from __future__ import annotations

from memserve.router.observability.metrics import RouterMetrics
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.cost_model.model import CostModel, Observation, Work
from memserve.scheduling.cost_model.online import OnlineCostModel
from memserve.scheduling.request_cost import prefill_parts

MAX_CANDIDATES = 64
"""Of more than this, nobody reckons what the others would have taken."""
ERROR_WEIGHT = 0.02
"""What the newest prediction error weighs in the mean."""


def work_of(placed: Assignment, cached_tokens: int | None) -> Work | None:
    """What its prefill computed; None if it does not say what it had of the prompt."""
    prompt = placed.prompt
    if prompt.unknown is not None or len(prompt.chains) != 1 or cached_tokens is None:
        return None
    if not 0 <= cached_tokens < prompt.num_tokens:
        return None
    return Work.of(prompt.num_tokens, cached_tokens)


def update_costs(
    placed: Assignment, seconds: float, cached_tokens: int | None, costs: OnlineCostModel
) -> None:
    """From a prefill that had its instance to itself all the time, if it says what it had of the prompt."""
    if cached_tokens is None or work_of(placed, cached_tokens) is None or seconds <= 0:
        return
    prompt = placed.prompt
    situation = placed.decision.situation
    num_loaded = cached_tokens - situation.cached_tokens(placed.decision.chosen.near_blocks)
    if num_loaded >= situation.page_tokens:
        load_s = seconds - costs.model.exec_s(prompt.num_tokens, cached_tokens)
        costs.loaded(num_loaded, load_s, total_s=seconds)
    else:
        costs.prefilled(Observation(prompt.num_tokens, cached_tokens, seconds))


class PredictionError:
    """Event loop thread only."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._error = 0.0
        self._num_reckoned = 0

    def reckon(self, placed: Assignment, seconds: float, costs: CostModel) -> None:
        """The prefill took so long, from its dispatch; others would have taken what `costs`, as believed
        now, says of the queues of then."""
        if seconds <= 0:
            return
        predicted_s = placed.decision.chosen.queued_s + placed.work_s
        self._num_reckoned += 1
        error = abs(predicted_s - seconds) / seconds
        self._error += max(ERROR_WEIGHT, 1 / self._num_reckoned) * (error - self._error)
        self._metrics.prefill_seconds_error.set(self._error)
        situation = placed.decision.situation
        if len(situation.prefills) > MAX_CANDIDATES:
            return
        others = [it for it in situation.prefills if it.instance_id != placed.decision.prefill]
        parts = prefill_parts(situation, others, costs)
        best_s = min((queue_s + load_s + exec_s for queue_s, load_s, exec_s, _, _ in parts), default=seconds)
        self._metrics.regret_seconds.observe(max(0.0, seconds - best_s))
