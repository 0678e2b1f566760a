"""One gateway with caches, similar questions and jobs, spoken to by hand."""

from __future__ import annotations

from engine.cache_config import ExactConfig, SemanticConfig
from engine.config import ClassConfig, GatewayConfig, OverloadConfig, TenantConfig
from engine.events import (
    Arrive,
    BackgroundRecord,
    Ended,
    EndReason,
    FindSimilar,
    GatewayAction,
    Neighbour,
    Record,
    ReplicaLost,
    Similar,
    Submit,
    TextMarks,
)
from engine.policy.gateway import Gateway

ALWAYS, NEVER = 0, (1 << 31) - 1  # draws below every share, and below none


class World:
    """One gateway, spoken to by hand. Questions are one word; tenants, askers and tags by name."""

    def __init__(self, revalidate_s: float = 0, **semantic: object) -> None:
        cls = {"caches": "semantic", "slo_ttft_ms": 1000}
        self.gateway = Gateway(
            GatewayConfig(
                classes={
                    "qa": ClassConfig("standard", **cls), "vip": ClassConfig("critical", **cls),  # type: ignore
                    "tip": ClassConfig("sheddable", **cls),  # type: ignore[arg-type]
                },
                tenants={"t": TenantConfig(), "u": TenantConfig()},
                exact=ExactConfig(ttl_s=10, stale_s=40, revalidate_s=revalidate_s),
                semantic=SemanticConfig(ttl_s=10, stale_s=40, **semantic),  # type: ignore[arg-type]
                overload=OverloadConfig(window_ms=250),
            )
        )
        self.now_ns, self.rid = 0, -1

    def tell(self, event: object) -> list[GatewayAction]:
        out = self.gateway.handle(self.now_ns, event)  # type: ignore[arg-type]
        self.gateway.check()
        return out

    def ask(
        self, text: str, near: float | None = None, of: str = "red", cls: str = "qa", tenant: str = "t",
        asker: str = "", draw: int = NEVER, tags: tuple[str, ...] = (), marks: TextMarks = TextMarks(),  # noqa: B008
    ) -> list[GatewayAction]:
        """With the cosine to another question that the index finds."""
        self.rid += 1
        key = f"{tenant}{cls}{text}".encode()
        out = self.tell(
            Arrive(
                self.rid, f"r{self.rid}", tenant, cls, self.now_ns, 5, 4, key, b"h" + tenant.encode(), text.encode(),
                draw=draw, asker=asker.encode(), tags=tags, marks=marks,
            )
        )
        if not only(out, FindSimilar):
            return out
        found = () if near is None else (Neighbour(of.encode(), round(near * 1e6)),)
        return out + self.tell(Similar(self.rid, found))

    def end(self, actions: list[GatewayAction], answer: str, reason: EndReason = "stop") -> list[GatewayAction]:
        """The one submission among these actions is over."""
        (submit,) = only(actions, Submit)
        good = reason == "stop"
        return self.tell(
            Ended(submit.sid, reason, 5, 0, 3, answer_id=answer if good else "", answer_bytes=10 if good else 0)
        )


def only(actions: list[GatewayAction], kind: type) -> list:  # type: ignore[type-arg]
    return [action for action in actions if isinstance(action, kind)]


def records(actions: list[GatewayAction]) -> list[BackgroundRecord]:
    return [a.record for a in only(actions, Record) if isinstance(a.record, BackgroundRecord)]


def lost(world: World, *flights: list[GatewayAction]) -> list[GatewayAction]:
    """The only replica dies, and its driver says so of each of these."""
    out = world.tell(ReplicaLost(0))
    for actions in flights:
        out += world.end(actions, "", "lost")
    return out
