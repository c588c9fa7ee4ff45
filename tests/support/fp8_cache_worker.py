"""A worker that supports FP8 KV caches on a CPU, with the kernels' reference implementations.

Slow; used to measure the effect of FP8 on outputs without a GPU. Set
`engine.worker.process.WORKER_MODULE` to this module, or run `python -P -m
octavo.tests.support.fp8_cache_worker --socket PATH`.
"""

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
