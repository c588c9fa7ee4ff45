"""Prefixes found again, images not encoded twice, forks that share their prompt."""

from array import array

import pytest

from octavo.benchmarks.fakes.simulated_worker import (
    Simulation,
    make_config,
    make_request,
    naive_output,
)
from octavo.scheduler.block_hash import block_hash, next_hash, root_hash
from octavo.scheduler.request import EncodeUnit, Request, RequestStatus, salted

CAT, DOG = b"cat!" * 8, b"dog!" * 8


def make_simulation(**settings: int) -> Simulation:
    return Simulation(make_config(**{"num_blocks": 40, "max_num_batched_tokens": 64, **settings}))


def run_one(simulation: Simulation, *requests: Request) -> int:
    """Tokens computed to answer them."""
    before = simulation.worker.computed
    simulation.scheduler.add(*requests)
    simulation.run()
    return simulation.worker.computed - before


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 15, 16, 17, 40])
def test_a_full_hit_computes_one_token(size: int) -> None:
    simulation = make_simulation()
    prompt = list(range(size))
    assert run_one(simulation, make_request("a", prompt, max_tokens=1)) == size
    again = make_request("b", prompt, max_tokens=1)
    assert run_one(simulation, again) == max(1, size % 4)
    assert again.num_cached_tokens == size - max(1, size % 4)
    assert simulation.outputs["b"] == naive_output(again, 1)


def test_a_conversation_goes_on_from_the_answer_before() -> None:
    """The output's blocks are found too."""
    simulation = make_simulation()
    first = make_request("a", 10, max_tokens=9)
    run_one(simulation, first)
    longer = make_request("b", [*first.token_ids, 1, 2, 3])
    run_one(simulation, longer)
    assert longer.num_cached_tokens == 16  # of 18 computed: the last token was not
    assert simulation.outputs["b"] == naive_output(longer, 4)


def test_a_prefix_is_shared_while_its_first_owner_runs() -> None:
    simulation = make_simulation()
    simulation.scheduler.add(make_request("a", list(range(16)), max_tokens=20))
    simulation.step()
    other = make_request("b", [*range(16), 7])
    simulation.scheduler.add(other)
    plan = simulation.step()
    assert plan is not None and plan.num_scheduled_tokens == (1, 1)
    assert other.block_table[:4] == simulation.scheduler.requests["a"].block_table[:4]
    assert plan.copies == ()
    simulation.run()


def test_what_is_being_computed_is_not_found_yet() -> None:
    simulation = make_simulation()
    for name in "ab":
        simulation.scheduler.add(make_request(name, list(range(16))))
    plan = simulation.step()
    assert plan is not None and plan.num_scheduled_tokens == (16, 16)
    simulation.run()


@pytest.mark.lesson("L04")
def test_prefix_media() -> None:
    """The same text and placeholders over another image, or the image elsewhere: no hit."""
    tokens = [*range(8), *[49] * 6, *range(10)]
    simulation = make_simulation()
    run_one(simulation, make_request("cat", tokens, (8, 6, CAT)))
    for spans, cached in (
        ([(8, 6, CAT)], 23),  # the very same
        ([(8, 6, DOG)], 8),  # another image: only what comes before
        ([(9, 5, CAT)], 8),
        ([(8, 3, CAT), (11, 3, CAT)], 8),
        ([], 8),
    ):
        request = make_request(f"{spans}", tokens, *spans)
        run_one(simulation, request)
        assert request.num_cached_tokens == cached, spans
        assert simulation.outputs[request.request_id] == naive_output(request, 4)


@pytest.mark.lesson("L04")
def test_prefix_media_every_part_of_a_block_counts() -> None:
    def unit(name: bytes = CAT, index: int = 0, offset: int = 18, size: int = 9) -> EncodeUnit:
        return EncodeUnit(name, index, offset, size, 4 * size)

    tokens = array("i", range(40))
    root = root_hash(b"")
    cases = {
        "as it is": (root, tokens, (unit(),), 16),
        "another parent": (root_hash(b"x"), tokens, (unit(),), 16),
        "another token": (root, array("i", [*range(17), 99, *range(18, 40)]), (unit(),), 16),
        "another image": (root, tokens, (unit(DOG),), 16),
        "the last bit of its hash": (root, tokens, (unit(CAT[:-1] + b"\x20"),), 16),
        "another unit": (root, tokens, (unit(index=1),), 16),
        "elsewhere": (root, tokens, (unit(offset=19),), 16),
        "two of them": (root, tokens, (unit(size=3), unit(offset=22)), 16),
        "none": (root, tokens, (), 16),
    }
    hashes = {name: next_hash(*case, case[-1] + 16) for name, case in cases.items()}
    assert len(set(hashes.values())) == len(cases)
    # Only what overlaps the block counts: a unit that ends before it or begins behind it does not.
    aside = (unit(offset=0, size=16), unit(), unit(DOG, offset=32, size=4))
    assert next_hash(root, tokens, aside, 16, 32) == hashes["as it is"]


@pytest.mark.lesson("L17")
def test_prefix_encode() -> None:
    """After a hit that ends inside an image, that image is encoded, and no image before it."""
    first = [*range(4), *[49] * 8, *range(4), *[49] * 8, *range(8)]
    spans = ((4, 8, CAT), (16, 8, DOG))
    simulation = make_simulation()
    run_one(simulation, make_request("a", first, *spans))
    simulation.worker.embeddings.clear()
    for key in ((CAT, 0), (DOG, 0)):
        simulation.scheduler.encoder_cache.lose(key)
    blocks = simulation.scheduler.blocks
    probe = make_request("probe", first, *spans)
    for index in (5, 6, 7):  # all but blocks 0 to 4: tokens 0 to 19, in the middle of the dog
        block = blocks.find(block_hash(probe, index, 4))
        assert block is not None
        blocks.forget([block])
    simulation.scheduler.add(probe)
    plan = simulation.step()
    assert plan is not None
    assert plan.num_computed_tokens == (20,)
    assert [each.unit.media_hash for each in plan.encode] == [DOG]
    simulation.run()
    assert simulation.outputs["probe"] == naive_output(probe, 4)
    # A hit behind all images encodes none.
    simulation.worker.embeddings.clear()
    for key in ((CAT, 0), (DOG, 0)):
        simulation.scheduler.encoder_cache.lose(key)
    before = simulation.worker.encoded
    run_one(simulation, make_request("again", first, *spans))
    assert simulation.worker.encoded == before


@pytest.mark.lesson("L29")
def test_cache_timing() -> None:
    """Another tenant's salt: neither blocks nor embeddings are found, in both directions."""
    tokens = [*range(8), *[49] * 6, *range(10)]
    simulation = make_simulation(encoder_cache_tokens=60)
    names = ((b"", 0), (b"one", 0), (b"two", 0), (b"one", 23), (b"", 23))
    for number, (salt, cached) in enumerate(names):
        request = make_request(f"r{number}", tokens, (8, 6, CAT), cache_salt=salt)
        encoded = simulation.worker.encoded
        run_one(simulation, request)
        assert request.num_cached_tokens == cached
        assert simulation.worker.encoded - encoded == (0 if cached else 6)
    request = make_request("x", tokens, (8, 6, CAT), cache_salt=b"one")
    assert request.units[0].media_hash == salted(CAT, b"one") != salted(CAT, b"two")
    assert salted(CAT, b"") == CAT
    assert root_hash(b"one") != root_hash(b"two") != root_hash(b"")


def test_an_image_that_is_cached_is_not_sent_or_encoded() -> None:
    simulation = make_simulation()
    run_one(simulation, make_request("a", 20, (3, 9, CAT)))
    simulation.scheduler.add(make_request("b", 20, (5, 9, CAT)))  # other text: no prefix
    plan = simulation.step()
    assert plan is not None and plan.num_computed_tokens == (0,)
    assert plan.encode == ()
    simulation.run()


def forks(count: int, prompt: int, *spans: tuple[int, int, bytes], **more: object) -> list[Request]:
    tokens = make_request("fork", prompt).prompt_token_ids
    return [
        make_request(f"fork[{i}]", tokens, *spans, seed=i, **more)  # type: ignore[arg-type]
        for i in range(count)
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 17, 20, 33])
@pytest.mark.parametrize("budget", [3, 64])
def test_forks_share_the_prompt_and_answer_as_if_alone(size: int, budget: int) -> None:
    simulation = make_simulation(max_num_batched_tokens=budget)
    requests = forks(5, size, max_tokens=9)
    computed = run_one(simulation, *requests)
    if budget == 64:  # the prompt once; one token of it for each fork
        assert computed == size + 4 + 5 * 8
    outputs = [simulation.outputs[request.request_id] for request in requests]
    assert outputs == [naive_output(request, 9) for request in requests]
    assert len({tuple(output) for output in outputs}) == 5


def test_forks_hold_few_blocks_and_copy_one_each() -> None:
    simulation = make_simulation()
    requests = forks(5, 30, max_tokens=9)
    simulation.scheduler.add(*requests)
    first, second = simulation.step(), simulation.step()
    assert first is not None and first.request_ids == ("fork[0]",)
    assert second is not None and second.num_scheduled_tokens == (1,) * 5
    tables = [request.block_table for request in requests]
    assert all(table[:7] == tables[0][:7] for table in tables)
    assert len({table[7] for table in tables}) == 5
    assert second.copies == tuple((tables[0][7], table[7]) for table in tables[1:])
    assert simulation.scheduler.blocks.num_free == 40 - 7 - 5
    simulation.run()


@pytest.mark.lesson("L15")
def test_parked_forks_go_on_when_the_first_is_gone() -> None:
    for steps in (0, 1, 2, 3):
        simulation = make_simulation(max_num_batched_tokens=8)
        requests = forks(3, 20, (2, 6, CAT), max_tokens=9)
        simulation.scheduler.add(*requests)
        for _ in range(steps):
            simulation.step()
        simulation.finish("fork[0]")
        simulation.run()
        assert simulation.ended["fork[0]"].status is RequestStatus.FINISHED_ABORTED
        for request in requests[1:]:
            assert simulation.outputs[request.request_id] == naive_output(request, 9)


def test_forks_of_one_that_starts_on_a_copy_in_the_same_step() -> None:
    """The first resumes on a full hit, whose last block it copies, and the forks copy that: it is
    not written yet, so what it is a copy of is read. (Found by a random run.)"""
    simulation = make_simulation()
    requests = forks(3, 7, max_tokens=9)
    run_one(simulation, make_request("twin", requests[0].prompt_token_ids))
    simulation.scheduler.add(*requests)
    simulation.step()  # the prompt and a token: 8, all of which the twin has computed
    simulation.scheduler.state.preempt(requests[0])
    plan = simulation.step()
    assert plan is not None
    (source, _), *others = plan.copies
    assert [each[0] for each in others] == [source, source]
    simulation.run()
    for request in requests:
        assert simulation.outputs[request.request_id] == naive_output(request, 9)


def test_forks_with_an_image_at_the_prompt_s_end() -> None:
    simulation = make_simulation(encoder_cache_tokens=16)
    requests = forks(3, 22, (4, 8, DOG), (12, 10, CAT), max_tokens=9)
    run_one(simulation, *requests)
    for request in requests:
        assert simulation.outputs[request.request_id] == naive_output(request, 9)


def test_what_a_failed_request_computed_is_found_by_no_one() -> None:
    simulation = make_simulation()
    simulation.scheduler.add(make_request("bad", list(range(20)), max_tokens=9))
    simulation.step()
    plan = simulation.scheduler.schedule()
    assert plan is not None
    result = simulation.worker.step(plan, simulation.scheduler.requests)
    result.errors["bad"] = "not finite"
    simulation._take(simulation.scheduler.update(result))
    again = make_request("again", list(range(20)))
    run_one(simulation, again)
    assert again.num_cached_tokens == 0
