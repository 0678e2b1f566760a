"""What can be set: one frozen section a policy, units in the keys, each default with its reason.

One scenario configures engine and twin alike. Reading files, origins and complaints live in ``scenario.py``; this
module only says what exists and which values make sense. Policies see these sections and nothing else.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from engine.cache_config import ExactConfig, SemanticConfig, SnapshotConfig
from engine.events import PRIORITY, Criticality
from engine.ingress_config import IngressConfig
from engine.redis_config import SessionsConfig, SharedConfig
from engine.stepcost import StepCost
from engine.units import ms_to_ns, s_to_ns
from engine.upstream_config import UpstreamConfig
from engine.values import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Share, Speed


class ClassConfig(Section):
    """A traffic class: how much it matters, what it is promised, how it may be answered."""

    criticality: Criticality
    share: Share = 0.0  # of the workload's requests
    tenant: str = "local"  # whose requests these are, in the workload
    slo_ttft_ms: Positive = 3000
    slo_e2e_ms: Positive = 6000
    max_wait_ms: NonNegative = 0  # longest wait for the first step; 0 = the TTFT SLO: later work would be dead work
    timeout_ms: Positive = 30_000  # the whole answer; then 504
    max_tokens: Positive = 24  # cap and default of the request's own max_tokens
    brownout_max_tokens: NonNegative = 0  # from level 1 on; 0 = no other cap. Never of a critical class
    system_prompt: str = ""  # file below data/corpora; put before conversations that bring no system message
    pinned: bool = False  # keep the system prompt's KV blocks resident
    caches: Literal["none", "exact", "semantic"] = "exact"  # semantic: exact first, then similar questions
    depends_on: tuple[str, ...] = ("catalogue",)  # tags of its answers: what empties them, see `/admin/cache`
    fallback: str = ""  # file below data/corpora with the answer of last resort; "" = an explicit 503
    retrieved: NonNegative = 0  # in the workload: passages about what is asked, put before each question (RAG)
    cap_rps: NonNegativeFloat = 0.0  # 0 = none. Of a class; of a critical one for each tenant, and then no other limit

    @property
    def priority(self) -> int:
        """0 critical, 1 standard, 2 sheddable."""
        return PRIORITY[self.criticality]

    @property
    def start_within_ns(self) -> int:
        """From submission to the first step; later is too late."""
        return ms_to_ns(self.max_wait_ms or self.slo_ttft_ms)


class LimiterConfig(Section):
    """Token bucket per tenant. The defaults are for tenants whose key names no limit of its own."""

    enabled: bool = True
    rate_rps: PositiveFloat = 1000.0  # generous: the limiter guards against one tenant, overload control against all
    burst: PositiveFloat = 1000.0  # requests
    tokens_per_s: NonNegativeFloat = 0.0  # model tokens, prompt and answer; 0 = unlimited
    token_burst_s: PositiveFloat = 10.0  # the model-token bucket holds so many seconds of its rate
    total_rps: NonNegativeFloat = 0.0  # of all tenants together; 0 = unlimited: what is too much is overload's to say
    total_burst_s: PositiveFloat = 1.0
    user_rps: NonNegativeFloat = 0.0  # of each user whom a tenant names; 0 = unlimited
    user_burst_s: PositiveFloat = 10.0  # people click in bursts
    user_tokens_per_s: NonNegativeFloat = 0.0  # model tokens of each user; 0 = unlimited
    users_most: Positive = 1_000_000  # debtors that are remembered (0.5 KB each); more are limited as their tenant


class TenantConfig(Section):
    """What a key grants. ``None`` = the scenario's default."""

    classes: tuple[str, ...] = ()  # () = all; the first is the default class
    rate_rps: PositiveFloat | None = None
    burst: PositiveFloat | None = None
    tokens_per_s: NonNegativeFloat | None = None
    weight: PositiveFloat = 1.0


class BreakerConfig(Section):
    """Circuit breaker round a replica: failures and slow calls in a sliding window."""

    enabled: bool = True
    window: Literal["count", "time"] = "time"  # a count of calls would be a second of the sale and an hour of the night
    window_size: Positive = 60  # last calls, or seconds: long enough for `minimum_calls` before the sale
    minimum_calls: Positive = 40  # enough to tell a bad spell from bad luck
    failure_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5  # every other call fails: worse than not asking
    slow_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8  # overload is slow too, and not the breaker's business
    slow_ms: NonNegative = 20_000  # far beyond what a full batch takes on a laptop; 0 = slow is only what is called so
    open_ms: Positive = 5_000  # a worker that died is back within 3 s
    open_max_ms: Positive = 60_000  # doubling ends here: a minute after its repair at the latest it is noticed
    open_jitter: Share = 0.1  # the open time is cut by up to this share, so that not all gateways probe at once
    half_open_permits: Positive = 4  # probes: one poisoned request among them does not decide
    half_open_max_ms: Positive = 30_000  # a probe counts as failed after the default `timeout_ms`: nobody waits longer


ENCODER_BREAKER = BreakerConfig(  # a miss is cheap and a wait is not: trips early, tries again soon
    window="count", window_size=20, minimum_calls=10, slow_share=0.5, slow_ms=0, open_ms=1000, open_max_ms=8000,
    half_open_permits=2, half_open_max_ms=2000,
)


class RouterConfig(Section):
    """Which replica computes an answer: least predicted work, and who has the prompt's blocks."""

    affinity: bool = True  # count a prompt's cached blocks for the replica that has them
    imbalance_tokens: NonNegative = 512  # a replica this far behind the least busy is not chosen for what it has cached
    answer_weight: NonNegative = 3  # prompt tokens that take as long as one answer token; SmolLM2 on a CPU: 2.6
    remembered_blocks: Positive = 8192  # of each replica; more than it can hold. Without events only
    stale_ms: NonNegative = 1000  # work and no sign of progress for so long: the better of two by lot; 0 = never
    kv_events: bool = True  # replicas say what their caches hold; with one replica nobody asks and nothing is said


class OverloadConfig(Section):
    """Overload levels from the age of the oldest waiting request, as a share of its class's TTFT SLO.

    Age of the head, because it needs no model of the service rate and is immune to quick rejections (the signal of
    CoDel and DAGOR; measured for LLM queues in ``engine/policy/README.md``).
    """

    enabled: bool = True
    brownout_share: PositiveFloat = 0.25  # level 1: a few steps of waiting, more than batching itself causes
    degraded_share: PositiveFloat = 0.25  # sheddable work that waited so long: less of it is let in
    shed_share: PositiveFloat = 0.4  # standard work: what was let in until then still comes before the SLO
    window_ms: Positive = 250  # DESIGN of Breakwater and DAGOR: evaluate several times a second
    hold_ms: Positive = 9_000  # a level stays so long after it was last called for: it must not flicker
    graded: bool = True  # a share of the work is let in, not all or nothing; False: level 2 and 3 keep all of it out
    cut_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.06  # of the share that is let in, at each cut
    grow_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.02  # of it, in each calm window; doubling while idle
    emergency_share: Share = 0.05  # level 4: hardly more than critical work is let in
    forecast: bool = True  # replicas say their pace and what is ahead: times to first token are predicted
    predictive: bool = False  # what is predicted too late is refused at once, not when its time is up; never critical
    predicted_signal: bool = False  # a class that waits counts as old as its next one is predicted to become
    fallback_rps: PositiveFloat = 500.0  # fallback answers a second: the last resort must not be a flood of its own

    @property
    def window_ns(self) -> int:
        """Length of a window."""
        return ms_to_ns(self.window_ms)

    @property
    def hold_ns(self) -> int:
        """How long a level outlasts what called for it."""
        return ms_to_ns(self.hold_ms)


class RetryConfig(Section):
    """What clients are told about coming back, and how many may come back."""

    jitter_share: Share = 0.2  # Retry-After is longer by up to this share, by lot, so that not all come back at once
    jitter_least_s: NonNegativeFloat = 2.0  # by at least so much in all: Retry-After is told in whole seconds
    budget_share: Share = 0.1  # under overload: second tries for each first one (Site Reliability Engineering, 21)
    budget_most: Positive = 20  # that are saved up


class FairnessConfig(Section):
    """Whose turn it is among the tenants of one priority: the one that has been served least for its weight."""

    enabled: bool = True  # False: first come, first served, whoever asks
    prompt_token_weight: Positive = 1  # a computed prompt token; what the prefix cache holds is free
    output_token_weight: Positive = 2  # the paper's pair: a token decoded alone costs more than one of a chunk


class BatcherConfig(Section):
    """Continuous batching over a budget of tokens and time."""

    step_tokens: Positive = 128  # prompt tokens + decode rows in a step: bounds the step, hence a critical one's wait
    max_step_ms: Positive = 250  # a step's prompt tokens are cut so that the calibration predicts no more than this
    step_margin: Share = 0.08  # of max_step_ms, not planned for: steps take longer than predicted by 3 % in the middle
    slots: Positive = 16  # sequences that hold KV and run
    reserved_slots: NonNegative = 2  # of these, only for critical
    reserved_blocks: NonNegative = 32  # KV blocks that only critical may take last
    watermark: Share = 0.01  # of the blocks: stays free when one is taken in beside others, so that rows can grow
    reserve: Literal["full", "ratio", "none"] = "ratio"  # what is kept free for the answers' tokens to come
    reserve_start: Share = 0.7  # ratio: share of `max_tokens` that is expected to be used, before anything is known
    reserve_least: Share = 0.1  # ratio: it decays no further: someone does use all
    reserve_decay_steps: Positive = 600  # ratio: from 1 to 0 in so many safe steps: within a minute of a sale
    reserve_jump: Share = 0.5  # ratio: of the way to 1, for each victim of a shortage: a few make it `full`
    age_ms: NonNegative = 5000  # waited so long, sheddable counts as standard; beyond its TTFT SLOs: 0 = never
    hold_back_tokens: Positive = 32  # so much of a prompt is worth waiting for while another computes it
    max_multi_steps: Positive = 16  # longest run of pure decode steps between two looks at the mailbox

    @property
    def step_limit_ns(self) -> int:
        """What a step may take by prediction."""
        return round(ms_to_ns(self.max_step_ms) * (1 - self.step_margin))


class PrefixConfig(Section):
    """KV blocks and the prefix cache over them."""

    enabled: bool = True
    block_tokens: Positive = 16
    blocks: Positive = 1024  # 16,384 tokens: 720 MiB for SmolLM2-135M in fp32
    pinned_blocks: NonNegative = 128  # cap on pins: never more than this share of the pool may be held for good
    pin_ttl_s: PositiveFloat = 300.0  # a pin that nobody asked for so long is let go


class ModelConfig(Section):
    """Which weights, on what."""

    name: str = "smollm2"  # smollm2 | tiny | fake | a hub name | a folder
    context_tokens: Positive = 1024
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto = float32 on a CPU, bfloat16 on CUDA
    native: bool = True  # CPU kernels of our own, where there is a C++ compiler
    deterministic: bool = False  # CUDA: a row's attention never depends on its neighbours; matrix products still may
    cuda_graphs: bool = False  # CUDA: decode steps replayed at fixed shapes; off until it was measured on a GPU
    threads: NonNegative = 0  # torch threads of one replica; 0 = one core left for everything else
    fake_speed: Speed = 1.0  # fake only: times the calibrated speed; inf = at once
    fake_answers: str = ""  # fake only: CSV prompt,answer_id,answer
    seed: int = 0  # weights of `tiny`


class ProfileConfig(Section):
    """The shape of the sale in time."""

    base_s: PositiveFloat
    ramp_s: PositiveFloat
    plateau_s: PositiveFloat
    decay_s: PositiveFloat

    @property
    def duration_s(self) -> float:
        """Whole length."""
        return self.base_s + self.ramp_s + self.plateau_s + self.decay_s


class WorkloadConfig(Section):
    """Who asks what, and how often."""

    corpus: str = "questions.csv"  # below data/corpora
    traps: str = "traps.csv"  # below data/corpora; "" = none
    trap_share: Share = 0.02  # of a class's requests: look like a popular question, must not get its answer
    zipf_exponent: NonNegativeFloat = 1.0  # popularity of answers inside a class
    wording_exponent: NonNegativeFloat = 1.5  # of the wordings of one question: most people use the same words
    spike_factor: PositiveFloat = 4.0  # plateau over base: +300 %
    base_rate_rps: NonNegativeFloat = 0.0  # 0 = from the measured capacity and overload_factor
    overload_factor: PositiveFloat = 2.0  # plateau = so many times the capacity, counted after the caches
    profiles: dict[str, ProfileConfig] = msgspec.field(default_factory=dict)


class Scenario(Section):
    """One file: the sale, the classes, and every policy."""

    name: str
    seed: int = 1
    replicas: Positive = 1  # with upstreams: as many as there are of these
    replica_restarts: NonNegative = 5  # of a replica that died, within a minute; then it is given up
    replica_hang_s: NonNegativeFloat = 0.0  # work and no word for so long: killed; 0 = 40 x max_step_ms
    classes: dict[str, ClassConfig] = msgspec.field(default_factory=dict)
    workload: WorkloadConfig = WorkloadConfig()
    model: ModelConfig = ModelConfig()
    ingress: IngressConfig = IngressConfig()
    limiter: LimiterConfig = LimiterConfig()
    exact: ExactConfig = ExactConfig()
    semantic: SemanticConfig = SemanticConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    breaker: BreakerConfig = BreakerConfig()
    encoder_breaker: BreakerConfig = ENCODER_BREAKER
    router: RouterConfig = RouterConfig()
    overload: OverloadConfig = OverloadConfig()
    retry: RetryConfig = RetryConfig()
    fairness: FairnessConfig = FairnessConfig()
    batcher: BatcherConfig = BatcherConfig()
    prefix: PrefixConfig = PrefixConfig()
    sessions: SessionsConfig = SessionsConfig()
    shared: SharedConfig = SharedConfig()
    upstreams: dict[str, UpstreamConfig] = msgspec.field(default_factory=dict)  # who answers instead of replicas


class GatewayConfig(Section):
    """All that a Gateway machine is made from; written into its journal's header."""

    classes: dict[str, ClassConfig]
    tenants: dict[str, TenantConfig]
    limiter: LimiterConfig = LimiterConfig()
    exact: ExactConfig = ExactConfig()
    semantic: SemanticConfig = SemanticConfig()
    breaker: BreakerConfig = BreakerConfig()
    encoder_breaker: BreakerConfig = ENCODER_BREAKER
    router: RouterConfig = RouterConfig()
    overload: OverloadConfig = OverloadConfig()
    retry: RetryConfig = RetryConfig()
    replicas: Positive = 1
    block_tokens: Positive = 16  # of the replicas' prefix caches
    index: int = 0  # of this gateway: its submission ids start at index << 40


class ReplicaConfig(Section):
    """All that a Replica machine is made from; written into its journal's header."""

    batcher: BatcherConfig = BatcherConfig()
    prefix: PrefixConfig = PrefixConfig()
    fairness: FairnessConfig = FairnessConfig()
    weights: dict[str, PositiveFloat] = msgspec.field(default_factory=dict)  # by tenant; who is not named has 1
    cost: StepCost | None = None  # of a step on this machine; without one the token budget alone bounds it
    kv_events: bool = False  # tell the gateways what the prefix cache holds
    forecast: bool = False  # tell them the pace, and what is ahead
    index: int = 0

    @property
    def pin_ttl_ns(self) -> int:
        """Lifetime of a pin after its last use."""
        return s_to_ns(self.prefix.pin_ttl_s)


class LaneConfig(Section):
    """All that a Lane machine is made from; written into its journal's header."""

    window: Positive = 8
    reserved: NonNegative = 1
    fairness: FairnessConfig = FairnessConfig()
    weights: dict[str, PositiveFloat] = msgspec.field(default_factory=dict)  # by tenant; who is not named has 1
    index: int = 0


def gateway_config(scenario: Scenario, tenants: dict[str, TenantConfig], index: int = 0) -> GatewayConfig:
    """The gateway's part of a scenario."""
    router = scenario.router
    if scenario.upstreams:  # they do not say what they have cached: it is guessed from what was sent
        router = msgspec.structs.replace(router, kv_events=False)
    return GatewayConfig(
        classes=scenario.classes, tenants=tenants, limiter=scenario.limiter, exact=scenario.exact,
        semantic=scenario.semantic, breaker=scenario.breaker, encoder_breaker=scenario.encoder_breaker,
        router=router, overload=scenario.overload, retry=scenario.retry, replicas=scenario.replicas,
        block_tokens=scenario.prefix.block_tokens, index=index,
    )


def replica_config(
    scenario: Scenario, tenants: dict[str, TenantConfig] | None = None, index: int = 0, cost: StepCost | None = None
) -> ReplicaConfig:
    """A replica's part of a scenario; ``tenants`` bring their weights, a calibration the ``cost`` of a step."""
    return ReplicaConfig(
        batcher=scenario.batcher, prefix=scenario.prefix, fairness=scenario.fairness,
        weights={name: tenant.weight for name, tenant in (tenants or {}).items()}, cost=cost, index=index,
        kv_events=scenario.router.kv_events and scenario.replicas > 1, forecast=scenario.overload.forecast,
    )


def lane_config(scenario: Scenario, tenants: dict[str, TenantConfig], index: int) -> LaneConfig:
    """The part of the lane before the upstream of this number."""
    upstream = list(scenario.upstreams.values())[index]
    return LaneConfig(
        window=upstream.window, reserved=upstream.reserved, fairness=scenario.fairness,
        weights={name: tenant.weight for name, tenant in tenants.items()}, index=index,
    )
