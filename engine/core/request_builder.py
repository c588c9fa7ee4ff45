"""Build the scheduler's requests: resolve defaults and seeds, one `Request` per answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...scheduler.params import RequestOptions, SamplingParams
from ...scheduler.request import Request
from ..errors import InputError
from ..input.processor import ProcessedInput


def check_params(params: Any) -> None:
    """Raise `InputError` if `params` is neither None nor a `SamplingParams`."""
    if params is not None and not isinstance(params, SamplingParams):
        text = f"must be octavo.SamplingParams, not {type(params).__name__}"
        raise InputError("params", text)


class Deadline:
    """Request options whose timeout counts from the creation of this object."""

    def __init__(self, options: RequestOptions) -> None:
        self._options, self._start = options, time.monotonic()

    @property
    def left(self) -> RequestOptions:
        """The options, with the remaining time as `timeout_s`."""
        if self._options.timeout_s is None:
            return self._options
        spent = time.monotonic() - self._start
        return replace(self._options, timeout_s=max(0.0, self._options.timeout_s - spent))


@dataclass(frozen=True)
class RequestBuilder:
    """Builder of scheduler requests for one model."""

    defaults: SamplingParams  # from the checkpoint's generation_config.json
    end_token_ids: frozenset[int]
    max_position_embeddings: int
    max_unit_temporal_patches: int
    vocab_size: int
    bad_word_ids: Callable[[Sequence[str]], tuple[tuple[int, ...], ...]]

    def make(
        self,
        names: Sequence[str],
        ready: ProcessedInput,
        params: SamplingParams | None,
        options: RequestOptions,
        deadline: float,
    ) -> tuple[Request, ...]:
        """Return one request per name, all with the same prompt; answer i uses seed + i."""
        chosen = self._resolve(params or SamplingParams(), ready)
        ends = frozenset() if chosen.ignore_eos else self.end_token_ids
        salt = options.cache_salt.encode("utf-8", "surrogatepass")
        size = self.max_unit_temporal_patches
        stops = ends | frozenset(chosen.stop_token_ids)
        bad_words = ready.bad_words
        if bad_words is None:  # not preprocessed by a pool
            bad_words = self.bad_word_ids(chosen.bad_words)
        units = tuple(unit for span in ready.spans for unit in span.units(size))
        return tuple(
            Request(
                request_id=name,
                prompt_token_ids=ready.prompt_token_ids,
                params=replace(
                    chosen,
                    seed=((chosen.seed or 0) + index) % 2**63,
                    # The answers share the prompt; its logprobs are computed once.
                    prompt_logprobs=None if index else chosen.prompt_logprobs,
                ),
                units=units,
                cache_salt=salt,
                priority=options.priority,
                deadline=deadline,
                mrope_positions=ready.mrope_positions,
                mrope_position_delta=ready.mrope_position_delta,
                stop_token_ids=frozenset(token for token in stops if token < self.vocab_size),
                bad_words=bad_words,
            )
            for index, name in enumerate(names)
        )

    def _resolve(self, params: SamplingParams, ready: ProcessedInput) -> SamplingParams:
        """Fill in defaults and a seed, and limit max_tokens to the model's positions."""
        params = params.with_defaults(self.defaults)
        for token, _ in params.biases:
            if token >= self.vocab_size:
                text = f"must be below the vocabulary size {self.vocab_size}"
                raise InputError("logit_bias", f"token id {token}: {text}")
        used = len(ready.prompt_token_ids) + ready.mrope_position_delta
        remaining = self.max_position_embeddings - used
        longest = remaining if params.max_tokens is None else min(remaining, params.max_tokens)
        return replace(
            params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=longest,
            min_tokens=min(longest, params.min_tokens),
        )
