"""The scheduler's limits, and what they refuse at the door."""

from __future__ import annotations

from dataclasses import dataclass

from .request import Request


class AdmissionError(ValueError):
    """A request that could never run here; the text names the limit."""


class PromptTooLong(AdmissionError):
    """It leaves no room for output."""


class QueueFull(AdmissionError):
    """Too much is waiting already. The same request may be taken later."""


@dataclass(frozen=True)
class SchedulerConfig:
    num_blocks: int
    block_size: int
    max_num_seqs: int  # requests that run at once
    max_num_batched_tokens: int  # tokens of one step
    max_model_len: int  # tokens of prompt and output
    max_encode_tokens: int  # image tokens encoded in one step
    encoder_cache_tokens: int  # image tokens whose embeddings workers keep
    max_num_partial_prefills: int = 4  # prompts that go in pieces in one step
    long_prefill_token_threshold: int = 256  # tokens of all pieces in a step, while others decode
    max_queue_len: int = 1024  # requests that wait for a place
    max_queue_tokens: int = 1 << 20  # their tokens; a request that waits alone may have more
    priority_ageing_s: float = 10.0  # a wait of so many seconds makes up for one priority
    max_empty_steps: int = 100  # steps in which nothing could run before the head fails

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("encoder_cache_tokens", "priority_ageing_s") else 1
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")

    @property
    def max_request_len(self) -> int:
        """Tokens of the longest request: what the model takes and the blocks hold."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


def check_size(request: Request, config: SchedulerConfig) -> None:
    """Raises `AdmissionError` for what could never run, with the numbers."""
    count = request.num_prompt_tokens
    if count == 0:
        raise AdmissionError("prompt: has no tokens")
    if count >= config.max_request_len:
        limit = f"max_model_len is {config.max_model_len}"
        if config.max_request_len < config.max_model_len:
            limit = f"the KV cache holds {config.max_request_len}"
        raise PromptTooLong(f"prompt: {count} tokens leave no room for output; {limit}")
    for limit in ("max_encode_tokens", "encoder_cache_tokens"):
        most = max((unit.num_tokens for unit in request.units), default=0)
        if most > getattr(config, limit):
            raise AdmissionError(
                f"an image or video unit of {most} tokens is over {limit}="
                f"{getattr(config, limit)}; lower its max_pixels"
            )


def check_queue(
    request: Request, num_waiting: int, num_tokens: int, num_running: int, config: SchedulerConfig
) -> None:
    """Raises `QueueFull` when `num_waiting` requests of `num_tokens` tokens are enough.

    Places that are free count for the queue: what waits there begins with the next step.
    """
    places = config.max_queue_len + max(0, config.max_num_seqs - num_running)
    if num_waiting >= places:
        raise QueueFull(
            f"{num_waiting} requests are waiting and max_queue_len={config.max_queue_len}; "
            "try again later"
        )
    if num_waiting and num_tokens + request.num_tokens > config.max_queue_tokens:
        raise QueueFull(
            f"{num_tokens} tokens are waiting, and {request.num_tokens} more are over "
            f"max_queue_tokens={config.max_queue_tokens}; try again later"
        )
