"""Measure how often int8 weights and activations choose the same next token as bfloat16.

    python -m octavo.benchmarks.quantization_agreement --model DIR --num-prompts 200

Compares the token that follows each of a set of random prompts. The agreement of bfloat16 with
float32 is printed as well: it shows how often rounding alone changes the choice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.llm import LLM
from octavo.scheduler.params import SamplingParams

from .workload import Vocabulary, Workload


def next_tokens(model: Path, workload: Workload, settings: dict[str, Any]) -> list[int]:
    """Return the most likely token after each prompt."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    prompts = [request.prompt for request in workload.requests(Vocabulary.of(model))]
    with LLM(model, kv_cache_memory_bytes=1 << 28, max_model_len=2048, **settings) as llm:
        outputs = llm.generate(prompts, params, progress=False)
    return [output.outputs[0].token_ids[0] for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--input-len", type=int, default=64)
    args = parser.parse_args()
    workload = Workload(input_len=args.input_len, output_len=1, num_prompts=args.num_prompts)
    kinds: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "int8": {"dtype": "bfloat16", "quantization": "int8"},
        "float32": {"dtype": "float32"},
    }
    found = {name: next_tokens(args.model, workload, kind) for name, kind in kinds.items()}
    for name in ("int8", "float32"):
        same = sum(a == b for a, b in zip(found["bfloat16"], found[name], strict=True))
        print(json.dumps({"bfloat16 and": name, "agree": same / args.num_prompts}), flush=True)


if __name__ == "__main__":
    main()
