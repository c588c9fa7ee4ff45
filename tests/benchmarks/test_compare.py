"""`benchmarks/compare/run.py`: alternating engines, ratios, and missing engines."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from octavo.benchmarks.compare import run as compare
from octavo.benchmarks.compare.engines import RequestTimes
from octavo.benchmarks.compare.report import MEASURES, Comparison, Round, Spread
from octavo.benchmarks.options import WorkloadOptions
from octavo.benchmarks.request_file import to_line
from octavo.benchmarks.workload import BenchRequest
from octavo.engine.config.engine_config import EMBEDDED_MODEL

SMALL = WorkloadOptions(input_len=10, output_len=4, image_size=["56x56"])
SPEED, _, PREFILL, TPOT, MEMORY = MEASURES


def a_round(seconds: float, memory: int = 100) -> Round:
    return Round(4, 100, seconds, seconds / 2, seconds / 100, memory)


def test_ratios_are_of_the_same_round() -> None:
    found = Comparison()
    for label in ("ours", "theirs"):
        found.add_engine(label, "1", 1.0)
    for mine, other in ((1.0, 2.0), (10.0, 10.0), (2.0, 8.0)):  # the machine's speed varies
        found.add_round("ours", a_round(mine, 50), 0.0)
        found.add_round("theirs", a_round(other), 0.0)
    assert found.reference == "theirs"
    assert found.ratios("ours", SPEED) == Spread(2.0, 1.0, 4.0)
    assert found.ratios("ours", PREFILL) == Spread(2.0, 1.0, 4.0)  # inverted: higher is better
    assert found.ratios("ours", MEMORY) == Spread(2.0, 2.0, 2.0)
    assert found.as_dict()["ratios"]["ours"]["output tok/s"]["median"] == 2.0
    assert "theirs" not in found.as_dict()["ratios"]


def test_figures_of_a_round() -> None:
    seen = [
        RequestTimes(1, due=0.0, times=[1.0, 2.0, 3.0], output_tokens=3),
        RequestTimes(1, due=0.0, times=[2.0, 4.0], output_tokens=2),
    ]
    found = Round.of(seen, 7)
    assert found == Round(2, 5, 4.0, 2.0, 1.5, 7)
    assert SPEED.of(found) == 5 / 4 and TPOT.of(found) == 1500


def test_engine_spec_parses_name_and_settings() -> None:
    spec = compare.EngineSpec.parse("octavo:quantization=int8,max_num_seqs=8,overlap_steps=false")
    assert spec.settings == {"quantization": "int8", "max_num_seqs": 8, "overlap_steps": False}
    with pytest.raises(ValueError, match="unknown engine"):
        compare.EngineSpec.parse("llama")
    with pytest.raises(ValueError, match="name=value"):
        compare.EngineSpec.parse("octavo:int8")


@pytest.mark.slow
def test_engine_processes_and_missing_engines(tmp_path: Path) -> None:
    """Run Octavo and transformers, an invalid setting, and vLLM, which is not installed."""
    file = tmp_path / "a.json"
    names = ["octavo:kv_cache_memory_bytes=8000000", "octavo:nonsense=1", "vllm", "transformers"]
    options = ["--model", str(EMBEDDED_MODEL), "--num-prompts", "3", "--rounds", "2"]
    options += ["--input-len", "10", "--output-len", "4", "--image-size", "56x56"]
    options += ["--vllm-python", "/no/such/python", "--json", str(file)]
    done = CliRunner().invoke(compare.app, [*names, *options])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert list(found["engines"]) == [names[0], names[3]]
    assert list(found["skipped"]) == [names[1], names[2]]
    assert "nonsense: unknown" in found["skipped"][names[1]]
    assert "/no/such/python" in found["skipped"]["vllm"]
    assert "vllm skipped" in done.output
    assert found["reference"] == names[3]
    for engine in found["engines"].values():
        assert [each["output_tokens"] for each in engine["rounds"]] == [12, 12]
        assert all(each["memory_bytes"] > 50e6 for each in engine["rounds"])
        assert engine["start_seconds"] > 0
    rounds = [engine["rounds"] for engine in found["engines"].values()]
    ratio = found["ratios"][names[0]]["req/s"]
    each = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(*rounds, strict=True)]
    assert (ratio["least"], ratio["most"]) == pytest.approx((min(each), max(each)))


def test_engines_alternate_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines alternate (A B A B); one that fails is reported and the others continue."""
    runs: list[tuple[str, str]] = []

    class Fake:
        version, start_seconds, pid = "1", 1.0, 2**22 + 1  # a pid above the maximum

        def __init__(self, spec: compare.EngineSpec, python: str, model: Path) -> None:
            self.spec = spec

        def run(self, requests: list[BenchRequest]) -> Round:
            runs.append((self.spec.name, "".join(map(to_line, requests))))
            if self.spec.name == "vllm" and len(runs) > 6:
                raise compare.NotThere("killed")
            return a_round(1.0)

        def close(self) -> None:
            runs.append((self.spec.name, "closed"))

    monkeypatch.setattr(compare, "EngineProcess", Fake)
    specs = [compare.EngineSpec.parse(name) for name in ("octavo", "vllm")]
    found = compare.compare(specs, {}, EMBEDDED_MODEL, SMALL, 2, 4, Console(quiet=True))
    names = [name for name, _ in runs]
    assert names == ["octavo", "vllm"] * 4 + ["octavo", "vllm", "octavo"]
    assert [text for _, text in runs[-2:]] == ["closed"] * 2
    for first, second in ((2, 3), (4, 5)):  # same prompts within a round, new in each round
        assert runs[first][1] == runs[second][1]
    assert len({text for _, text in runs[:-2]}) == 5
    assert found.skipped == {"vllm": "in round 3: killed"}
    assert [len(engine.rounds) for engine in found.engines.values()] == [4, 2]
    assert found.ratios("octavo", SPEED).median == 1.0


def test_each_round_has_new_prompts() -> None:
    first, second = (SMALL.make(EMBEDDED_MODEL, 2, number) for number in (0, 1))
    assert not {r.prompt_token_ids for r in first} & {r.prompt_token_ids for r in second}


def test_invalid_options_are_reported_in_one_line() -> None:
    done = CliRunner().invoke(compare.app, ["octavo", "llama", "--model", str(EMBEDDED_MODEL)])
    assert done.exit_code == 2 and "llama: unknown engine" in done.output
    help_text = CliRunner().invoke(compare.app, ["--help"]).output
    for name in ("--rounds", "--vllm-python", "--image-size", "--json"):
        assert name in help_text
