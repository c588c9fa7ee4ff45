"""What loading costs: memory over all processes at the real 2B shape."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.benchmarks.make_checkpoint import make_checkpoint, real_config
from octavo.engine.config.engine_config import ModelConfig

SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "mrope_section", "tie_word_embeddings",
    "dtype", "vision",
)  # fmt: skip

KV_BYTES = 64 << 20  # of each rank

# Starts an LLM and watches its processes' anonymous and shared memory until it answers.
WATCH = """
import json, re, sys, threading, time
from pathlib import Path
import octavo

def memory(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(n) * 1024 for n in re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+) kB", status))

def family():
    me = Path("/proc/self").resolve().name
    children = Path(f"/proc/{me}/task").glob("*/children")
    return [me, *(pid for file in children for pid in file.read_text().split())]

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, sum(map(memory, family())))
        time.sleep(0.02)

thread = threading.Thread(target=watch)
thread.start()
started = time.time()
with octavo.LLM(sys.argv[1], dtype="bfloat16", tensor_parallel_size=int(sys.argv[2]),
                max_model_len=1024, kv_cache_memory_bytes=int(sys.argv[3])) as llm:
    seconds = time.time() - started
    out = llm.generate("hello", octavo.SamplingParams(max_tokens=2, ignore_eos=True))[0]
    done = True
    thread.join()
    print(json.dumps({"peak": peak, "weights": llm.engine.group.memory.weight_bytes,
                      "seconds": seconds, "tokens": len(out.outputs[0].token_ids)}))
"""


@pytest.mark.parametrize("name", ["2b", "7b", "72b"])
def test_made_checkpoints_have_the_real_shapes(name: str) -> None:
    real = ModelConfig.from_dict(
        json.loads((Path(__file__).parents[1] / f"data/config-{name}.json").read_text())
    )
    made = ModelConfig.from_dict(real_config(name))
    assert {f: getattr(made, f) for f in SHAPE} == {f: getattr(real, f) for f in SHAPE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = make_checkpoint(tmp_path_factory.mktemp("2b"), "2b")
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_peak_memory_of_the_2b_shape(checkpoint: Path, ranks: int) -> None:
    """Anonymous and shared memory of all processes: the ranks' weights, which on a CPU are packed
    (the tower's on every rank), their KV caches, and little beside. No second copy at any time."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    command = [sys.executable, "-P", "-c", WATCH, str(checkpoint), str(ranks), str(KV_BYTES)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(found, f"{found['peak'] / size:.2f} of the checkpoint")
    assert found["tokens"] == 2
    assert found["weights"] < (1.12 if ranks == 1 else 1.42) * size
    assert found["peak"] < found["weights"] + ranks * KV_BYTES + 1.2e9
