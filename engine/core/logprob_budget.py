"""Limits on the log probabilities in a server's responses, checked at admission.

A request of a few kilobytes can ask for hundreds of megabytes of them. The unit is one log
probability, of a sampled token or of an alternative. It takes about 8 bytes in the engine (see
`LogprobTable`) and 50 to 100 in a JSON response, which is sent in chunks.
"""

from __future__ import annotations

from ...scheduler.errors import QueueFull
from ...scheduler.params import SamplingParams
from ..errors import InputError

MAX_REQUEST_LOGPROBS = 1 << 21  # per request, over all of its prompts and answers
MAX_TOTAL_LOGPROBS = 1 << 28  # over all requests whose responses are not yet sent


class LogprobBudget:
    """Log probabilities reserved by all running requests. For use in one event loop."""

    def __init__(
        self, max_request: int = MAX_REQUEST_LOGPROBS, max_total: int = MAX_TOTAL_LOGPROBS
    ) -> None:
        self.max_request, self.max_total = max_request, max_total
        self.num_reserved = 0

    def call(self, params: SamplingParams, max_model_len: int) -> LogprobCharge:
        """Return an empty charge for a request. Close it once the response is sent."""
        return LogprobCharge(self, params, max_model_len)


class LogprobCharge:
    """Reservation of one request. A context manager."""

    def __init__(self, budget: LogprobBudget, params: SamplingParams, max_model_len: int) -> None:
        self._budget, self._params, self._max_model_len = budget, params, max_model_len
        self._num_prompt_tokens = self._num_output_tokens = 0  # over all prompts so far
        self._num_reserved = 0

    def add(self, num_prompt_tokens: int) -> None:
        """Reserve the maximum for a prompt and its answers.

        Raises `InputError` if the request exceeds its own limit, `QueueFull` if the total of all
        requests would exceed the limit.
        """
        params, remaining = self._params, max(0, self._max_model_len - num_prompt_tokens)
        longest = remaining if params.max_tokens is None else min(remaining, params.max_tokens)
        self._num_prompt_tokens += num_prompt_tokens
        self._num_output_tokens += params.n * longest
        of_prompts = self._num_prompt_tokens * _per_token(params.prompt_logprobs)
        of_answers = self._num_output_tokens * _per_token(params.logprobs)
        if of_prompts + of_answers > self._budget.max_request:
            raise self._too_many(of_prompts, of_answers)
        more = of_prompts + of_answers - self._num_reserved
        total = self._budget.num_reserved
        if more and self._num_reserved < total and total + more > self._budget.max_total:
            text = f"log probabilities: {total} are reserved for other requests, and {more} more"
            raise QueueFull(f"{text} exceed {self._budget.max_total}; try again later")
        self._num_reserved += more
        self._budget.num_reserved += more

    def _too_many(self, of_prompts: int, of_answers: int) -> InputError:
        limit = f"a request may ask for {self._budget.max_request} log probabilities"
        if of_prompts >= of_answers:
            field, count, tokens = "prompt_logprobs", of_prompts, self._num_prompt_tokens
            fix = "send fewer or shorter prompts per request, or lower prompt_logprobs"
        else:
            field, count, tokens = "logprobs", of_answers, self._num_output_tokens
            fix = "set a lower max_tokens, n or number of logprobs"
        per_token = _per_token(getattr(self._params, field))
        return InputError(field, f"{tokens} tokens x {per_token} = {count}; {limit}; {fix}")

    def close(self) -> None:
        """Release the reservation. Safe to call twice."""
        self._budget.num_reserved -= self._num_reserved
        self._num_reserved = 0

    def __enter__(self) -> LogprobCharge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _per_token(count: int | None) -> int:
    """Return the number of log probabilities per token: its own and `count` alternatives."""
    return 0 if count is None else count + 1
