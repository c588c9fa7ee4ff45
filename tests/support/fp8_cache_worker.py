"""A worker whose KV cache may be in FP8 on a CPU too, by the kernels' oracles: slow, to see what it
does to answers where there is no GPU. `python -P -m octavo.tests.support.fp8_cache_worker --socket
PATH`; `engine.worker.process.WORKER_MODULE` names it."""

from __future__ import annotations

import torch

from octavo.engine.runner import loader
from octavo.engine.worker.worker import main
from octavo.kernels.fp8_linear import FP8


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return FP8 if name == "fp8" else dtype


if __name__ == "__main__":
    loader.resolve_kv_cache_dtype = resolve
    main()
