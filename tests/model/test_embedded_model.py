"""The embedded model: size, accuracy, equality with transformers, and resumable training."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.benchmarks.compare.transformers_model import TransformersModel
from octavo.benchmarks.demo_model import train
from octavo.benchmarks.demo_model.data import Maker
from octavo.benchmarks.demo_model.stream import Batches
from octavo.benchmarks.demo_model.tokenizer import QUESTIONS
from octavo.benchmarks.eval_demo_model import KINDS, Question, measure, questions
from octavo.engine.cli.info import checkpoint_info
from octavo.engine.config.engine_config import EMBEDDED_MODEL

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=32)
WHO = Question([{"role": "user", "content": QUESTIONS["who"]}], "")


@pytest.fixture(scope="module")
def llm() -> Iterator[octavo.LLM]:
    with octavo.LLM(dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(llm: octavo.LLM) -> Callable[[list[Question]], list[str]]:
    def answer(asked: list[Question]) -> list[str]:
        outputs = llm.chat([question.messages for question in asked], GREEDY)
        return [output.outputs[0].text for output in outputs]

    return answer


def test_model_is_small() -> None:
    info = checkpoint_info(None, "huggingface", "float32", 1)
    assert info.parameters <= 10_000_000
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.glob("*.safetensors")) <= 20_000_000
    assert {1, 2, 4} <= set(info.tensor_parallel_sizes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_model_answers_correctly(kind: str, answer: Callable[[list[Question]], list[str]]) -> None:
    """Measure a sample; `benchmarks/eval_demo_model.py` measures a thousand of each kind."""
    found = measure(answer, kind, 40, seed=3)
    assert found["right"] >= 0.85, found


def test_model_identifies_itself(answer: Callable[[list[Question]], list[str]]) -> None:
    assert "Octavo" in answer([WHO])[0]


def test_transformers_gives_the_same_tokens(llm: octavo.LLM) -> None:
    """Compare in float32 for every kind of question."""
    reference = TransformersModel(EMBEDDED_MODEL)
    asked = [WHO, *(question for kind in KINDS for question in islice(questions(kind, 11), 3))]
    outputs = llm.chat([question.messages for question in asked], GREEDY)
    for question, output in zip(asked, outputs, strict=True):
        ready = reference.processor.from_prompt(question.messages)
        assert output.outputs[0].token_ids == reference.generate(ready, 32), question


def test_transformers_reads_its_tokenizer_and_template(llm: octavo.LLM) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    ids = tokenizer.apply_chat_template(WHO.messages, add_generation_prompt=True)["input_ids"]
    assert llm.chat(WHO.messages, GREEDY)[0].prompt_token_ids == list(ids)


@pytest.mark.slow
def test_training_is_seeded_and_resumes(tmp_path: Path) -> None:
    def trainer() -> train.Trainer:
        torch.manual_seed(1)
        return train.Trainer(tmp_path, 1, 1e-3, 0.4, False, 0.0, 60.0)

    def batches(first: int) -> Batches:
        return Batches(first_trainer.tokenizer.to_str(), 1, first, 1.0, 300, train.KINDS)

    first_trainer = trainer()
    stream = iter(batches(0))
    for batch in islice(stream, 2):
        first_trainer.train_step(batch)
    first_trainer.save()
    second = trainer()
    assert second.step == 2
    here, there = next(stream), next(iter(batches(2)))
    assert [one.questions for one in here] == [one.questions for one in there]
    first_trainer.train_step(here)
    second.train_step(there)
    for name, value in first_trainer.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value)


def test_labels_lie_where_the_marks_are() -> None:
    """The label of each digit is at its position, in reading order."""
    tokenizer = train.make_tokenizer(train.VOCABULARY)
    maker = Maker(tokenizer, np.random.default_rng(5), 0.0)
    for _ in range(5):
        batch = maker.make("number", 1500)
        labels = batch.items[0].labels
        for text, digit, order in zip(batch.answers, labels["digit"], labels["order"], strict=True):
            for rank, char in enumerate(text, 1):
                assert set(digit[order == rank].tolist()) == {int(char) + 1}, (text, rank)
