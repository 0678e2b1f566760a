"""Requests through the real replica machine and a real model, by the live worker's own driver, on a counting clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from engine.config import BatcherConfig, PrefixConfig, ReplicaConfig
from engine.events import Ended, RunStep, StepDone, Submit
from engine.model.blockhash import Hasher
from engine.model.loader import LoadedModel
from engine.model.runner import TorchRunner
from engine.model.stepping import SamplingParams
from engine.model.wire import Output, Work
from engine.model.worker import ReplicaDriver
from engine.policy.replica import Replica

NEVER_NS = 1 << 62


@dataclass
class Request:
    """``at_step``: it arrives when so many steps have run."""

    prompt: list[int]
    max_tokens: int
    traffic_class: str = "product_qa"
    priority: int = 1
    at_step: int = 0


@dataclass
class Run:
    """What came out, and what the machine did on the way."""

    out: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    most_decoding: int = 0
    chunks: dict[int, int] = field(default_factory=dict)  # by sid, before its first token
    shared_in_step: int = 0  # prefixes read in the very step that computed them
    preempted_mid_answer: int = 0
    most_steps: int = 0


def config(blocks: int, slots: int, step_tokens: int, pinned: int = 0) -> ReplicaConfig:
    batcher = BatcherConfig(step_tokens=step_tokens, slots=slots, reserved_slots=1, reserved_blocks=4)
    return ReplicaConfig(batcher=batcher, prefix=PrefixConfig(blocks=blocks, pinned_blocks=pinned))


def through_replica(model: LoadedModel, requests: list[Request], shape: ReplicaConfig) -> Run:
    """Run all of them to their end; machine invariants are checked after every step."""
    hasher = Hasher(b"k" * 16, shape.prefix.block_tokens)
    runner = TorchRunner(model, shape.prefix.blocks, shape.prefix.block_tokens, hasher)
    runner.pool.poison(range(shape.prefix.blocks))
    driver = ReplicaDriver(Replica(shape), runner)
    run, waiting, steps, now_ns = Run(), dict(enumerate(requests)), 0, 0
    while waiting or len(run.ended) < len(requests):
        now_ns += 1
        due = [sid for sid, request in waiting.items() if request.at_step <= steps]
        work = [_work(sid, waiting.pop(sid), hasher, now_ns) for sid in due]
        step, output = driver.begin(now_ns, list(work))
        _gather(run, output)
        if step is None:
            steps = min((request.at_step for request in waiting.values()), default=steps)
            continue
        _watch(run, step, runner)
        result = runner.run(step, lambda: False)
        assert isinstance(result.done, StepDone), result.done
        steps += result.done.steps
        run.most_steps = max(run.most_steps, result.done.steps)
        _gather(run, driver.finish(now_ns, result))
        driver.machine.check()
    return run


def _work(sid: int, request: Request, hasher: Hasher, now_ns: int) -> Work:
    blocks = hasher.chain(hasher.root("tenant", "model"), request.prompt)
    submit = Submit(
        sid=sid, rid=sid, tenant="tenant", traffic_class=request.traffic_class, priority=request.priority,
        sent_ns=now_ns, start_by_ns=NEVER_NS, prompt_tokens=len(request.prompt), max_tokens=request.max_tokens,
        blocks=blocks,
    )  # fmt: skip
    return Work(submit, request.prompt, SamplingParams())


def _gather(run: Run, output: Output | None) -> None:
    if output is not None:
        for sid, tokens in output.tokens:
            run.out.setdefault(sid, []).extend(tokens)
        run.ended |= {event.sid: event for event in output.events if isinstance(event, Ended)}


def _watch(run: Run, step: RunStep, runner: TorchRunner) -> None:
    run.most_decoding = max(run.most_decoding, step.shape.decode_rows)
    run.preempted_mid_answer += sum(bool(run.out.get(sid)) and sid not in run.ended for sid in step.stop)
    for chunk in step.chunks:
        run.chunks[chunk.sid] = run.chunks.get(chunk.sid, 0) + (chunk.sid not in run.out)
    size = runner.pool.block_tokens
    begun = [set(start.blocks[start.computed // size :]) for start in step.start]
    for start in step.start:
        read = set(start.blocks[: start.computed // size])
        run.shared_in_step += any(read & fresh for fresh in begun)


def differences(plain: PreTrainedModel, requests: list[Request], run: Run, eos: int, tie: float = 1e-4) -> list[str]:
    """Requests whose tokens are not those of generate(), unless its own two best tokens were level there (printed)."""
    wrong = []
    for sid, request in enumerate(requests):
        said = plain.generate(
            torch.tensor([request.prompt]), max_new_tokens=request.max_tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        want = [token for token in said.sequences[0, len(request.prompt) :].tolist() if token != eos]
        got = run.out.get(sid, [])
        if got == want:
            continue
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        best = said.logits[at][0].topk(2).values if at < len(said.logits) else torch.tensor([1.0, 0.0])
        gap = float(best[0] - best[1])
        if gap < tie:
            print(f"request {sid}: token {at} differs where the reference itself is level, gap {gap:.1e}")
        else:
            wrong.append(f"request {sid}: token {at} of {len(want)}, gap {gap:.1e}: {got[at:][:3]} {want[at:][:3]}")
    return wrong
