"""Greedy tokens are transformers' own, however the work was cut up; and a runner reports what it must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from engine.events import Chunk, Filled, Grow, RunStep, SeqStart, StepDone, StepFailed, StepShape
from engine.model import runner
from engine.model.gathered import BUCKET_BLOCKS
from engine.model.loader import LoadedModel
from engine.model.stepping import SamplingParams, TokenLogprobs
from tests.model.hand import BLOCK, BLOCKS, Hand, hand_on, prompt_of

N = 12  # tokens generated unless a test says otherwise


def test_a_batch_gives_what_each_request_gives_alone(hand: Hand, reference) -> None:
    prompts = {sid: prompt_of(sid, length) for sid, length in enumerate((5, 16, 17, 40, 64, 100))}
    for sid, prompt in prompts.items():
        hand.submit(sid, prompt, N)
    starts = [SeqStart(sid, 0, hand.take(len(p) + N)) for sid, p in prompts.items()]
    hand.step(starts, [(sid, len(p)) for sid, p in prompts.items()])
    hand.finish(*prompts)
    assert hand.out == {sid: reference(p, N) for sid, p in prompts.items()}


def test_rows_of_very_different_length_decode_together(hand: Hand, reference) -> None:
    lengths = (3, 200, 20, 330)  # more than one length bucket
    for sid, length in enumerate(lengths):
        hand.whole(sid, prompt_of(sid, length), N)
    assert (330 - 3) // BLOCK > BUCKET_BLOCKS
    hand.finish(*range(4))
    assert hand.out == {sid: reference(prompt_of(sid, n), N) for sid, n in enumerate(lengths)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_a_prompt_in_chunks_beside_decoding_rows(hand: Hand, reference, chunk: int) -> None:
    hand.whole(0, prompt_of(0, 21), 40)
    prompt = prompt_of(1, 75)
    hand.submit(1, prompt, N)
    start = [SeqStart(1, 0, hand.take(75 + N))]
    for done in range(0, 75, chunk):
        assert 1 not in hand.out
        hand.step(start, [(1, min(chunk, 75 - done))])
        start = []
    hand.finish(0, 1)
    assert hand.out == {0: reference(prompt_of(0, 21), 40), 1: reference(prompt, N)}


def test_a_shared_prefix_is_read_and_not_computed_again(hand: Hand, reference) -> None:
    prefix = prompt_of(7, 3 * BLOCK)
    owner, sharer = prefix + prompt_of(8, 9), prefix + prompt_of(9, 20)
    hand.submit(0, owner, N)
    table = hand.take(len(owner) + N)
    hand.step([SeqStart(0, 0, table)], [(0, len(owner))])
    hand.submit(1, sharer, N)
    own = hand.take(len(sharer) + N - len(prefix))
    hand.step([SeqStart(1, len(prefix), table[:3] + own)], [(1, 20)])
    hand.finish(0, 1)
    assert hand.out == {0: reference(owner, N), 1: reference(sharer, N)}


@pytest.mark.parametrize("owner", [0, 2])
def test_a_prefix_is_shared_in_the_step_that_computes_it(hand: Hand, reference, owner: int) -> None:
    """The owner may stand behind its sharers in the batch: all writes of a layer come before all reads."""
    prefix = prompt_of(7, 2 * BLOCK)
    prompts = {sid: prefix + prompt_of(10 + sid, 5 + sid) for sid in range(3)}
    shared = hand.take(len(prefix))
    starts, chunks = [], []
    for sid, prompt in prompts.items():
        hand.submit(sid, prompt, N)
        computed = 0 if sid == owner else len(prefix)
        starts.append(SeqStart(sid, computed, shared + hand.take(5 + sid + N)))
        chunks.append((sid, len(prompt) - computed))
    hand.step(starts, chunks)
    hand.finish(*prompts)
    assert hand.out == {sid: reference(p, N) for sid, p in prompts.items()}


def test_stopped_and_started_again_elsewhere_it_goes_on_as_if_nothing_had_been(hand: Hand, reference) -> None:
    prompt, other = prompt_of(3, 30), prompt_of(4, 18)
    hand.submit(0, prompt, 20)
    first_table = hand.take(50)
    hand.step([SeqStart(0, 0, first_table)], [(0, 30)])
    hand.whole(1, other, 30)
    for _ in range(6):
        hand.step()
    known = 30 + len(hand.out[0])
    hand.step(stop=[0])
    assert known == 30 + len(hand.out[0]), "a stopped sequence does not run"
    hand.give(first_table)
    hand.take(BLOCK)  # so that it cannot come back to the same blocks
    table = hand.take(50)
    hand.step([SeqStart(0, 0, table)], [(0, 10)])
    assert known == 30 + len(hand.out[0]), "short of its chunks it waits"
    hand.step(chunks=[(0, known - 10)])
    hand.finish(0, 1)
    assert hand.out == {0: reference(prompt, 20), 1: reference(other, 30)}
    assert hand.first == [0, 1], "a first token comes once"


def test_one_token_short_of_its_chunks_it_still_waits(hand: Hand) -> None:
    hand.submit(0, prompt_of(0, 9), N)
    hand.whole(1, prompt_of(1, 9), N)
    hand.step([SeqStart(0, 0, hand.take(9 + N))], [(0, 8)])
    hand.step()
    assert 0 not in hand.out
    hand.step(chunks=[(0, 1)])
    assert len(hand.out[0]) == 1


def test_a_table_grows_block_by_block(hand: Hand, reference) -> None:
    prompt = prompt_of(5, BLOCK - 2)
    hand.submit(0, prompt, 40)
    hand.step([SeqStart(0, 0, hand.take(BLOCK))], [(0, len(prompt))])
    while not hand.ended:
        tokens = len(prompt) + len(hand.out[0])
        grow = [Grow(0, hand.take(1))] if (tokens - 1) % BLOCK == 0 and tokens > BLOCK else []
        hand.step(grow=grow)
    assert hand.out[0] == reference(prompt, 40)


def test_tokens_told_between_steps_are_not_told_again(tiny: LoadedModel) -> None:
    hand = hand_on(tiny)
    hand.whole(0, [5, 6, 7], max_tokens=30, params=SamplingParams(ignore_eos=True))
    told: list[int] = []
    plan = RunStep(hand.steps, StepShape(), at_most=9)
    result = hand.runner.run(plan, lambda: False, lambda tokens: told.extend(t for _, ids in tokens for t in ids))
    assert len(told) == 8
    assert [len(ids) for _, ids in result.tokens] == [1]
    same = hand_on(tiny)
    same.whole(0, [5, 6, 7], max_tokens=30, params=SamplingParams(ignore_eos=True))
    same.step(at_most=9)
    assert same.out[0] == [*hand.out[0], *told, *result.tokens[0][1]]


@pytest.mark.parametrize("at_most", [2, 5, 64])
def test_several_steps_at_once_are_single_steps(tiny: LoadedModel, at_most: int) -> None:
    hands = [hand_on(tiny), hand_on(tiny)]
    for hand, most in zip(hands, (1, at_most), strict=True):
        for sid, tokens in enumerate((9, 20, 20, 31)):
            hand.whole(sid, prompt_of(sid, 20 + sid), tokens)
        hand.finish(0, 1, 2, 3, at_most=most)
    one, many = hands
    assert many.out == one.out
    assert (many.steps, many.ended, many.first) == (one.steps, one.ended, one.first)
    assert sorted(many.filled, key=repr) == sorted(one.filled, key=repr)


def test_several_steps_end_when_a_sequence_ends_or_a_message_waits(hand: Hand) -> None:
    hand.whole(0, prompt_of(0, 20), 6)
    hand.whole(1, prompt_of(1, 20), 60)
    # sequence 0 has two of its six
    assert hand.step(at_most=50).steps == 4 and hand.ended == {0: "length"}
    asked = iter([False, False, True])
    assert hand.step(at_most=50, waits=lambda: next(asked)).steps == 3


def end_of(reference, seed: int, length: int) -> tuple[list[int], int]:
    """A prompt and one of its generated tokens, which a test may call an end token."""
    prompt = prompt_of(seed, length)
    return prompt, reference(prompt, N)[4]


def test_an_end_token_ends_the_sequence_and_is_no_output(tiny: LoadedModel, reference) -> None:
    prompt, eos = end_of(reference, 1, 20)
    want = reference(prompt, N)
    hand = hand_on(replace(tiny, eos_ids=(eos,)))
    hand.whole(0, prompt, N)
    hand.whole(1, prompt, N, SamplingParams(ignore_eos=True))
    hand.finish(0, 1)
    assert hand.out == {0: want[: want.index(eos)], 1: want}
    assert hand.ended == {0: "stop", 1: "length"}


def test_an_end_token_at_once_is_no_first_token(tiny: LoadedModel, reference) -> None:
    prompt = prompt_of(2, 20)
    hand = hand_on(replace(tiny, eos_ids=(reference(prompt, N)[0],)))
    hand.whole(0, prompt)
    assert (hand.out, hand.first, hand.ended) == ({}, [], {0: "stop"})


def test_max_tokens_of_one_ends_with_the_first(hand: Hand) -> None:
    hand.whole(0, prompt_of(0, 20), 1)
    assert (len(hand.out[0]), hand.first, hand.ended) == (1, [0], {0: "length"})


def test_filled_blocks_carry_on_the_prompts_chain(hand: Hand) -> None:
    prompt = prompt_of(6, 2 * BLOCK + 3)
    hand.whole(0, prompt, 3 * BLOCK)
    hand.finish(0)
    tokens = prompt + hand.out[0]
    chain = hand.hasher.chain(hand.hasher.root("t", "tiny"), tokens[:-1])  # the last token's KV was never computed
    assert hand.filled == [Filled(0, i, chain[i]) for i in range(2, len(chain))]
    assert len(hand.filled) == 3


def test_a_filled_block_is_told_once_though_it_is_computed_again(hand: Hand) -> None:
    prompt = prompt_of(6, BLOCK + 3)
    hand.whole(0, prompt, 3 * BLOCK)
    while len(hand.filled) < 1:
        hand.step()
    known = len(prompt) + len(hand.out[0])
    hand.whole(1, prompt_of(1, 5), 1)
    before = len(hand.out[0])
    hand.step([SeqStart(0, 0, hand.take(known + 3 * BLOCK))], [(0, len(prompt) + before)], stop=[0])
    hand.finish(0)
    assert [f.index for f in hand.filled] == [1, 2, 3]


@pytest.mark.parametrize("more", [{"top_p": 0.95}, {"top_k": 30}, {"top_k": 30, "top_p": 0.9}, {}])
def test_neighbours_never_change_a_sample(tiny: LoadedModel, more: dict[str, float]) -> None:
    params = SamplingParams(temperature=0.9, seed=11, **more)  # type: ignore[arg-type]
    alone, crowd = hand_on(tiny), hand_on(tiny)
    alone.whole(5, prompt_of(5, 30), 20, params)
    alone.finish(5)
    for sid in range(8):
        crowd.whole(sid, prompt_of(sid, 30), 20, params if sid == 5 else SamplingParams(1.2, 0.9, sid))
    crowd.finish(*range(8))
    assert crowd.out[5] == alone.out[5]
    assert len({tuple(tokens) for tokens in crowd.out.values()}) == 8


def test_a_preemption_never_changes_a_sample(tiny: LoadedModel) -> None:
    params = SamplingParams(temperature=1.1, top_p=0.95, seed=5, top_k=200)
    prompt = prompt_of(5, 30)
    whole, put_back = hand_on(tiny), hand_on(tiny)
    for hand in (whole, put_back):
        hand.whole(5, prompt, 24, params)
    whole.finish(5)
    for _ in range(7):
        put_back.step()
    put_back.whole(1, prompt_of(1, 9), 30)
    known = 30 + len(put_back.out[5])
    put_back.step(stop=[5])
    put_back.step([SeqStart(5, 0, put_back.take(30 + 24))], [(5, known)])
    put_back.finish(5)
    assert put_back.out[5] == whole.out[5] and len(set(whole.out[5])) > 10


def outputs(hand: Hand, plan: RunStep) -> tuple[StepDone, dict[int, list[int]], dict[int, list[TokenLogprobs]]]:
    result = hand.runner.run(plan, lambda: False)
    assert isinstance(result.done, StepDone)
    return result.done, dict(result.tokens), dict(result.logprobs)


def test_logprobs_come_with_the_tokens_of_those_who_ask(hand: Hand, plain: PreTrainedModel) -> None:
    prompts = {sid: prompt_of(sid, 20) for sid in range(3)}
    asks = {0: SamplingParams(logprobs=0), 1: SamplingParams(), 2: SamplingParams(logprobs=4)}
    for sid, prompt in prompts.items():
        hand.submit(sid, prompt, N, asks[sid])
    start = tuple(SeqStart(sid, 0, hand.take(20 + N)) for sid in prompts)
    said: dict[int, list[int]] = {sid: [] for sid in prompts}
    logs: dict[int, list[TokenLogprobs]] = {0: [], 2: []}
    plan = RunStep(0, StepShape(), start=start, chunks=tuple(Chunk(sid, 20) for sid in prompts))
    for _ in range(5):
        done, tokens, logprobs = outputs(hand, plan)
        assert done.steps == 1, "one step at a time, because they are told with their tokens"
        assert logprobs.keys() == {0, 2} and all(len(logprobs[sid]) == len(tokens[sid]) for sid in logprobs)
        for sid, ids in tokens.items():
            said[sid] += ids
            logs[sid] = logs.get(sid, []) + logprobs.get(sid, [])
        plan = RunStep(plan.step + 1, StepShape(), at_most=4)
    for sid in (0, 2):
        with torch.inference_mode():
            logits = plain(torch.tensor([prompts[sid] + said[sid]])).logits[0, 19:-1]
        table = torch.log_softmax(logits.float(), -1)
        for row, (token, log) in enumerate(zip(said[sid], logs[sid], strict=True)):
            assert log.logprob == pytest.approx(table[row, token].item(), abs=1e-4)
            assert len(log.top) == (4 if sid == 2 else 0)
            assert [i for i, _ in log.top] == table[row].topk(4).indices.tolist()[: len(log.top)]


def test_an_end_token_and_a_failed_row_have_no_logprobs(tiny: LoadedModel, reference) -> None:
    prompt, eos = end_of(reference, 1, 20)
    hand = hand_on(replace(tiny, eos_ids=(eos,)))
    hand.submit(0, prompt, N, SamplingParams(logprobs=1))
    plan = RunStep(0, StepShape(), start=(SeqStart(0, 0, hand.take(20 + N)),), chunks=(Chunk(0, 20),))
    count = 0
    while True:
        done, tokens, logprobs = outputs(hand, plan)
        count += len(logprobs.get(0, []))
        if done.ended:
            break
        plan = RunStep(plan.step + 1, StepShape())
    assert (tokens, logprobs, count) == ({}, {}, reference(prompt, N).index(eos))
    with nan_embedding(tiny, 1999):
        hand.submit(1, [1999, 5], N, SamplingParams(logprobs=1))
        plan = RunStep(99, StepShape(), start=(SeqStart(1, 0, hand.take(2 + N)),), chunks=(Chunk(1, 2),))
        done, tokens, logprobs = outputs(hand, plan)
    assert (tokens, logprobs, [end.reason for end in done.ended]) == ({}, {}, ["failed"])


def test_the_parts_of_a_step_are_timed_and_added_up(hand: Hand, monkeypatch) -> None:
    ticks = iter(range(0, 10**6, 7))
    monkeypatch.setattr(runner.time, "perf_counter_ns", lambda: next(ticks))  # the clock, not the thing under test
    hand.submit(0, prompt_of(0, 20), N, SamplingParams(ignore_eos=True))
    done = hand.step([hand.start(0, 20 + N)], [(0, 20)])
    assert (done.forward_ns, done.sample_ns) == (7, 7)
    many = hand.step(at_most=5)
    assert (many.steps, many.forward_ns, many.sample_ns) == (5, 35, 35)


@contextmanager
def nan_embedding(model: LoadedModel, token: int) -> Iterator[None]:
    """Inside, whoever reads ``token`` gets nan."""
    weight = model.model.get_input_embeddings().weight
    with torch.inference_mode():
        kept = weight.detach()[token].clone()
        weight[token] = float("nan")
        try:
            yield
        finally:
            weight[token] = kept


def test_a_row_with_nan_fails_alone_and_taints_nobody(hand: Hand, reference, tiny: LoadedModel) -> None:
    short, long, after = prompt_of(0, 20), prompt_of(1, 70), prompt_of(2, 18)
    bad = [*prompt_of(3, 2), 1999, *prompt_of(4, 28)]
    hand.free.remove(0)
    table = (hand.take(16)[0], 0, *hand.take(16))  # block 0 is what a careless padding would read
    hand.whole(0, short, N)
    hand.whole(1, long, N)
    with nan_embedding(tiny, 1999):
        hand.submit(2, bad, N)
        hand.step([SeqStart(2, 0, table)], [(2, 31)])
    assert hand.ended == {2: "failed"} and 2 not in hand.out
    assert all(torch.isnan(hand.runner.pool.values[1][block]).any() for block in table[:2]), "the test must taint"
    hand.submit(3, after, N)
    hand.step([SeqStart(3, 0, table)], [(3, 18)])
    hand.finish(0, 1, 3)
    assert hand.out == {0: reference(short, N), 1: reference(long, N), 3: reference(after, N)}


def test_a_block_that_gave_nan_is_not_offered_to_others(hand: Hand, tiny: LoadedModel) -> None:
    hand.whole(0, prompt_of(0, 2 * BLOCK - 1), N)
    with nan_embedding(tiny, hand.out[0][0]):
        hand.step()
    assert hand.ended == {0: "failed"} and hand.filled == []


def test_a_forward_that_raises_is_a_failed_step_and_the_runner_lives_on(hand: Hand, reference, monkeypatch) -> None:
    prompt = prompt_of(0, 20)
    hand.submit(0, prompt, N)
    table = hand.take(20 + N)
    step = RunStep(0, StepShape(), start=(SeqStart(0, 0, table),), chunks=(Chunk(0, 20),))
    with monkeypatch.context() as patch:
        patch.setattr(hand.runner.model.model, "forward", lambda *a, **k: 1 / 0)
        result = hand.runner.run(step, lambda: False)
    assert isinstance(result.done, StepFailed) and "ZeroDivisionError" in result.done.why and result.tokens == []
    hand.step([SeqStart(0, 0, table)], [(0, 20)], stop=[0])
    hand.finish(0)
    assert hand.out[0] == reference(prompt, N)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (RunStep(0, StepShape(), start=(SeqStart(9, 0, (1,)),), chunks=(Chunk(9, 5),)), "KeyError"),
        (RunStep(0, StepShape(), start=(SeqStart(0, 0, (1,)),), chunks=(Chunk(0, 20),)), "do not fit"),
        (RunStep(0, StepShape(), start=(SeqStart(0, 0, (1, 2)),), chunks=(Chunk(0, 21),)), "21 tokens"),
        (RunStep(0, StepShape()), "no sequence"),
    ],
)
def test_an_impossible_plan_is_a_failed_step(hand: Hand, step: RunStep, why: str) -> None:
    hand.submit(0, prompt_of(0, 20))
    result = hand.runner.run(step, lambda: False)
    assert isinstance(result.done, StepFailed) and why in result.done.why


def test_forgotten_and_unknown_ids_are_no_ops(hand: Hand) -> None:
    hand.whole(0, prompt_of(0, 20), 30)
    hand.whole(1, prompt_of(1, 20), 30)
    hand.runner.forget(0)
    hand.runner.forget(77)
    hand.step(stop=[0, 77])
    assert len(hand.out[0]) == 2 and len(hand.out[1]) == 2


def test_the_pool_knows_its_size(hand: Hand) -> None:
    pool = hand.runner.pool
    assert pool.bytes == sum(t.numel() * t.element_size() for t in (*pool.keys, *pool.values))
    assert pool.num_blocks == BLOCKS
