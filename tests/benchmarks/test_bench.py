"""`octavo bench`: workloads, request files, figures and commands, with the embedded model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from octavo.benchmarks import plots
from octavo.benchmarks.cli import bench_app
from octavo.benchmarks.compare.engines import OctavoEngine, RequestTimes, read_line, run
from octavo.benchmarks.report import Report, itl, tpot, ttft
from octavo.benchmarks.request_file import read_requests, to_line
from octavo.benchmarks.workload import BenchRequest, Media, Vocabulary, Workload
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig
from octavo.engine.input.tokenizer import TextTokenizer

WORKLOADS = {
    "text": Workload(12, 3, 3),
    "images": Workload(12, 3, 2, Media(((56, 84), (112, 56)))),
    "video": Workload(12, 3, 2, Media(video=(4, 56, 56))),
    "both": Workload(12, 3, 2, Media(((56, 56),), (4, 56, 56))),
    "shared prefix": Workload(12, 3, 3, shared_prefix_len=20),
    "shared image": Workload(12, 3, 3, Media(((56, 56),)), share_media=True, shared_prefix_len=5),
    "turns": Workload(12, 3, 2, Media(((56, 56),)), turns=3),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def engine() -> Iterator[OctavoEngine]:
    engine = OctavoEngine(dtype="float32", kv_cache_memory_bytes=8_000_000)
    yield engine
    engine.close()


def lines(workload: Workload, vocabulary: Vocabulary) -> list[str]:
    return [to_line(request) for request in workload.requests(vocabulary)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_determines_the_workload(name: str, vocabulary: Vocabulary) -> None:
    workload = WORKLOADS[name]
    first = lines(workload, vocabulary)
    assert lines(workload, vocabulary) == first
    other = lines(workload.reseeded(1), vocabulary)
    assert len(other) == len(first) and not set(other) & set(first)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs(name: str, vocabulary: Vocabulary, engine: OctavoEngine) -> None:
    requests = WORKLOADS[name].requests(vocabulary)
    progress: list[tuple[int, int]] = []
    seen = run(engine, requests, on_tokens=lambda tokens, ended: progress.append((tokens, ended)))
    assert [each.output_tokens for each in seen] == [3] * len(requests)
    assert all(each.times == sorted(each.times) for each in seen)
    assert sum(tokens for tokens, _ in progress) == 3 * len(requests)
    assert sum(ended for _, ended in progress) == len(requests)
    for request, each in zip(requests, seen, strict=True):
        grows = bool(request.images or request.videos)  # prompt_tokens counts expanded placeholders
        assert (each.prompt_tokens > len(request.prompt_token_ids)) == grows
        if request.after is not None:
            assert each.due >= seen[request.after].times[-1]


def test_random_text_has_no_special_tokens(vocabulary: Vocabulary) -> None:
    special = {*ModelConfig.from_dir(EMBEDDED_MODEL).vision_token_ids}
    special |= {*TextTokenizer(EMBEDDED_MODEL).added.values()}
    assert not special & set(vocabulary.plain.tolist())
    (request,) = Workload(4000, 1, 1).requests(vocabulary)
    assert not special & set(request.prompt_token_ids) and len(request.prompt_token_ids) == 4000


def test_workload_shares_prefix_and_media(vocabulary: Vocabulary) -> None:
    workload = Workload(8, 2, 3, Media(((56, 56),)), shared_prefix_len=10)
    apart = workload.requests(vocabulary)
    together = replace(workload, share_media=True).requests(vocabulary)
    for requests in (apart, together):
        assert len({request.prompt_token_ids[:10] for request in requests}) == 1
        assert len({request.prompt_token_ids for request in requests}) == 3
    assert len({request.images[0].tobytes() for request in apart}) == 3
    assert len({request.images[0].tobytes() for request in together}) == 1


def test_turns_contain_the_earlier_ones(vocabulary: Vocabulary) -> None:
    requests = WORKLOADS["turns"].requests(vocabulary)
    assert [request.after for request in requests] == [None, 0, 1, None, 3, 4]
    for earlier, later in pairwise(requests[:3]):
        size = len(earlier.prompt_token_ids)
        assert later.prompt_token_ids[:size] == earlier.prompt_token_ids
        assert len(later.prompt_token_ids) == size + 3 + 12
        assert later.images == earlier.images


def test_at_once_limits_concurrency(vocabulary: Vocabulary, engine: OctavoEngine) -> None:
    seen = run(engine, Workload(5, 3, 4).requests(vocabulary), at_once=1)
    for earlier, later in pairwise(seen):
        assert later.due >= earlier.times[-1]


def test_request_file_round_trip(vocabulary: Vocabulary, tmp_path: Path) -> None:
    made = [r for w in WORKLOADS.values() for r in w.requests(vocabulary) if r.after is None]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(f"{to_line(request)}\n" for request in made))
    read = read_requests(path, EMBEDDED_MODEL, 99)
    assert [to_line(request) for request in read] == [to_line(request) for request in made]
    there = read_line(to_line(made[3]))  # as read by another engine's process
    assert tuple(there.prompt_token_ids) == made[3].prompt_token_ids
    assert there.images[0].tobytes() == made[3].images[0].tobytes()


def test_request_file_with_text_and_paths(tmp_path: Path, engine: OctavoEngine) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "color?"}]
    written = [
        {"prompt": "one two", "max_tokens": 2},
        {"messages": [{"role": "user", "content": content}]},
        {"prompt_token_ids": [1, 2], "after": 0},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, written)))
    requests = read_requests(path, EMBEDDED_MODEL, 5)
    assert [request.max_tokens for request in requests] == [2, 5, 5]
    assert requests[1].images[0].size == (56, 56)
    assert [each.output_tokens for each in run(engine, requests)] == [2, 5, 5]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting"),
        ("[]", "must be an object"),
        ("", "empty line"),
        ('{"prompt": "a", "messages": []}', "pass exactly one of"),
        ('{"text": "a"}', "text: unknown"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens=0"),
        ('{"prompt": "a", "after": 1}', "after=1"),
        ('{"prompt_token_ids": ["a"]}', "list of integers"),
        ('{"prompt": "a", "images": ["no.png"]}', "no.png"),
        ('{"prompt": "a", "videos": ["a.mp4"]}', "list of images"),
    ],
)
def test_request_file_errors_name_the_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n" + '{"prompt": "good"}\n')
    with pytest.raises(ValueError, match=r"requests\.jsonl:2: ") as caught:
        read_requests(path, EMBEDDED_MODEL, 5)
    assert words in str(caught.value)


def test_figures_of_a_run() -> None:
    a = RequestTimes(10, due=1.0, times=[3.0, 4.0, 6.0], output_tokens=4)  # a batch of two tokens
    b = RequestTimes(20, due=2.0, times=[2.5], output_tokens=1)
    failed = RequestTimes(5, due=0.0, error="UNAVAILABLE: gone")
    assert (ttft(a), tpot(a), itl(a)) == (2.0, 1.0, [1.0, 2.0])
    report = Report.of([a, b, failed])
    assert (report.num_requests, report.failed) == (2, 1)
    assert (report.prompt_tokens, report.output_tokens) == (30, 5)
    assert (report.seconds, report.prefill_seconds) == (6.0, 3.0)
    assert report.ttft.p50 == pytest.approx(1.25) and report.tpot.p99 == 1.0
    assert report.e2e.mean == pytest.approx((5.0 + 0.5) / 2)
    assert report.requests_per_second == pytest.approx(2 / 6)
    assert report.as_dict()["output_tokens_per_second"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="gone"):
        Report.of([failed])


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(bench_app, arguments)


SMALL = ("--input-len", "20", "--output-len", "6", "--kv-cache-memory-bytes", "8000000")


def test_throughput_sweeps_and_plots(tmp_path: Path) -> None:
    picture, file = tmp_path / "a.png", tmp_path / "a.json"
    options = ["--num-prompts", "1,3", "--json", str(file), "--plot", str(picture)]
    done = bench("throughput", *SMALL, *options, "--image-size", "224x224", "--seed", "7")
    assert done.exit_code == 0, done.stderr
    assert "tok/s" in done.stdout
    found = json.loads(file.read_text())
    assert found["settings"]["seed"] == 7 and found["machine"]["versions"]["torch"]
    assert [run["output_tokens"] for run in found["runs"]] == [6, 18]
    assert [run["prompt_tokens"] for run in found["runs"]] == [20 + 2 + 64, 3 * (20 + 2 + 64)]
    assert all(run["output_tokens_per_second"] > 0 for run in found["runs"])
    with Image.open(picture) as image:
        assert image.size[0] > 1000


def test_latency_of_turns_with_a_shared_image() -> None:
    options = ["--num-prompts", "2", "--turns", "2", "--image-size", "56x56", "--share-media"]
    done = bench("latency", *SMALL, *options, "--json", "-")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)  # the table goes to stderr
    assert "TTFT" in done.stderr
    assert found["num_requests"] == 4 and found["ttft"]["p50"] > 0
    dues = [each["due"] for each in found["requests"]]
    ends = [each["times"][-1] for each in found["requests"]]
    assert all(due >= end for due, end in zip(dues[1:], ends, strict=False))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["throughput", "--num-prompts", "0"], "--num-prompts 0"),
        (["throughput", "--num-prompts", "4,x"], "--num-prompts 4,x"),
        (["throughput", "--image-size", "big"], "WIDTHxHEIGHT"),
        (["throughput", "--video-size", "8x8"], "FRAMESxWIDTHxHEIGHT"),
        (["throughput", "--plot", "a.txt"], "--plot a.txt"),
        (["latency", "--requests", "/no/such.jsonl"], "/no/such.jsonl"),
        (["latency", "--turns", "0"], "--turns 0"),
        (["serve", "--request-rate", "0"], "--request-rate 0"),
        (["serve", "--server", "127.0.0.1:1"], "UNAVAILABLE"),
        (["startup", "--rounds", "0"], "--rounds 0"),
        (["startup", "--model", "/no/such"], "/no/such: no such folder"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], words: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_has_the_shared_options() -> None:
    for command in ("throughput", "latency", "serve"):
        done = bench(command, "--help")
        assert done.exit_code == 0, done.stderr
        for name in ("--model", "--quantization", "--image-size", "--requests", "--json", "--plot"):
            assert name in done.stdout, (command, name)
    assert "--input-len" not in bench("startup", "--help").stdout


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.check(None)
    with pytest.raises(ValueError, match=r"octavo\[plot\]"):
        plots.check(Path("a.png"))


def test_every_plot_is_written(tmp_path: Path) -> None:
    seen = [RequestTimes(10, 0.1 * i, [0.1 * i + 1, 0.1 * i + 2], 2) for i in range(4)]
    report = Report.of(seen)
    drawn = {
        "batches": lambda path: plots.draw_batches({1: report, 2: report}, "t", path),
        "latencies": lambda path: plots.draw_latencies(seen, "t", path),
        "starts": lambda path: plots.draw_starts(
            [{"seconds": 3.0, "phases": {"load": 1.0, "ready": 2.0}}], "t", path
        ),
    }
    for name, draw in drawn.items():
        draw(tmp_path / f"{name}.svg")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert asdict(report)["num_requests"] == 4
    assert BenchRequest((1,)).prompt == {"prompt_token_ids": [1]}
