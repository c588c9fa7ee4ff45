"""Scheduler limits and the admission checks that enforce them."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import AdmissionError, PromptTooLong, QueueFull
from .request import Request


@dataclass(frozen=True)
class SchedulerConfig:
    """Scheduler limits.

    Raises ValueError if a value is below its minimum.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int  # concurrently running requests
    max_num_batched_tokens: int  # tokens per step
    max_model_len: int  # prompt and output tokens per request
    max_encode_tokens: int  # image tokens encoded per step
    encoder_cache_tokens: int  # image tokens of cached embeddings
    max_num_partial_prefills: int = 4  # chunked prompts per step
    long_prefill_token_threshold: int = 256  # tokens of all chunks per step while others decode
    max_queue_len: int = 1024  # waiting requests
    max_queue_tokens: int = 1 << 20  # their tokens; a single waiting request may exceed it
    priority_ageing_s: float = 10.0  # seconds of waiting that outweigh one priority level
    max_empty_steps: int = 100  # idle steps before the first request fails

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("encoder_cache_tokens", "priority_ageing_s") else 1
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")

    @property
    def max_request_len(self) -> int:
        """Return the maximum tokens per request: model length or KV capacity."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


def check_size(request: Request, config: SchedulerConfig) -> None:
    """Raise `AdmissionError` if the request can never run."""
    count = request.num_prompt_tokens
    if count == 0:
        raise AdmissionError("prompt: has no tokens; pass at least one", "prompt")
    if count >= config.max_request_len:
        limit = f"max_model_len is {config.max_model_len}"
        if config.max_request_len < config.max_model_len:
            limit = f"the KV cache holds {config.max_request_len}"
        text = f"prompt: {count} tokens leave no capacity for output; {limit}"
        raise PromptTooLong(text, "prompt")
    for limit in ("max_encode_tokens", "encoder_cache_tokens"):
        most = max((unit.num_tokens for unit in request.units), default=0)
        if most > getattr(config, limit):
            raise AdmissionError(
                f"an image or video unit of {most} tokens exceeds {limit}="
                f"{getattr(config, limit)}; lower its max_pixels"
            )


def check_queue(
    request: Request, num_waiting: int, num_tokens: int, num_running: int, config: SchedulerConfig
) -> None:
    """Raise `QueueFull` if the waiting queue cannot take the request.

    `num_waiting` requests with `num_tokens` tokens wait already. Free running slots extend the
    queue, since that many requests start in the next step.
    """
    capacity = config.max_queue_len + max(0, config.max_num_seqs - num_running)
    if num_waiting >= capacity:
        raise QueueFull(
            f"{num_waiting} requests are waiting and max_queue_len={config.max_queue_len}; "
            "try again later"
        )
    if num_waiting and num_tokens + request.num_tokens > config.max_queue_tokens:
        raise QueueFull(
            f"{num_tokens} tokens are waiting, and {request.num_tokens} more exceed "
            f"max_queue_tokens={config.max_queue_tokens}; try again later"
        )
