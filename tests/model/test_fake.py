"""The fake model: its words, its pace, and that a run of several steps is the same as so many single ones.

Run: python -m pytest tests/model/test_fake.py -q
Mutations it caught: tokens told between steps told again at the end; a run that goes on after an answer has ended;
blocks filled in the middle of a run forgotten.
"""

from __future__ import annotations

from engine.events import Chunk, RunStep, SeqStart, StepDone, StepShape
from engine.model.blockhash import Hasher
from engine.model.fake import FakeRunner, speaker
from engine.model.smalllm import small_tokenizer
from engine.model.stepping import SamplingParams

SHAPE = StepShape()


def started(lengths: list[int]) -> FakeRunner:
    """One sequence an answer length, all past their prompt of twenty tokens and their first token."""
    runner = FakeRunner(lambda prompt: [1000 * prompt[0] + i for i in range(prompt[1])], Hasher(b"k", 16), None)
    for sid, length in enumerate(lengths):
        runner.submit(sid, [sid, length, *range(18)], 100, (), SamplingParams())
    start = tuple(SeqStart(sid, 0, (2 * sid, 2 * sid + 1)) for sid in range(len(lengths)))
    chunks = tuple(Chunk(sid, 20) for sid in range(len(lengths)))
    first = runner.run(RunStep(0, SHAPE, start=start, chunks=chunks), lambda: False)
    assert first.done == StepDone(1, tuple(range(len(lengths))))
    assert first.tokens == [(sid, [1000 * sid]) for sid in range(len(lengths))]
    return runner


def test_several_steps_are_so_many_single_ones() -> None:
    many = started([30, 14]).run(RunStep(1, SHAPE, at_most=16), lambda: False)
    runner = started([30, 14])
    singles = [runner.run(RunStep(1 + i, SHAPE), lambda: False) for i in range(14)]
    assert many.done.steps == 14  # thirteen more tokens, and the end token of the shorter answer
    assert many.done.ended == singles[-1].done.ended
    assert many.done.filled == tuple(f for one in singles for f in one.done.filled)
    assert [f.index for f in many.done.filled] == [1, 1], "both filled their second block on the way"
    for sid in (0, 1):
        said = [token for one in singles for s, ids in one.tokens if s == sid for token in ids]
        assert dict(many.tokens)[sid] == said


def test_tokens_told_between_steps_are_not_told_again() -> None:
    early: list[tuple[int, list[int]]] = []
    result = started([30]).run(RunStep(1, SHAPE, at_most=10), lambda: False, early.extend)
    told = [token for _, ids in early for token in ids] + [token for _, ids in result.tokens for token in ids]
    assert told == list(range(1, 11))
    assert len(early) == 9


def test_a_waiting_message_ends_the_run() -> None:
    assert started([30]).run(RunStep(1, SHAPE, at_most=10), lambda: True).done.steps == 1


def test_the_speaker_repeats_the_last_user_message_or_looks_it_up() -> None:
    tokenizer = small_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "where is my order?"}]
    prompt = tokenizer.encode(tokenizer.render(messages))
    assert tokenizer.decode(speaker({})(prompt)) == "where is my order?"
    assert tokenizer.decode(speaker({"where is my order?": "On its way."})(prompt)) == "On its way."
