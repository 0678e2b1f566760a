"""``/admin/cache`` of a real engine: who may, what is shown and what is not, and what a flush reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.events import Arrive, Invalidate
from engine.policy.semantic import SemanticEntry
from engine.service.admin import MOST_SHOWN, MOST_TAGS, TAGS_HEADER, needs_no_key, tags_of
from sim.twin.replay import replay
from tests.service import harness
from tests.service.harness import CHAT, Engine, body, check_error, journal, start

CACHE = "/admin/cache"
AWAY = {  # what tells a request through a proxy, or of a page whose name was made to point here, from this machine's
    "x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1", "x-real-ip": "::1", "via": "1.1 proxy",
    "host": "evil.example",
}


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with one more tenant, whose key is an admin's. Each test asks for what no other asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.TENANTS, "office", 'classes = ["chat"]\nadmin = true\n')
        with start(tmp_path_factory.mktemp("office")) as engine:
            yield engine


def ask(engine: Engine, text: str, tenant: str = "shop", tags: str | None = None, **more: Any) -> str:
    """The tier that answered."""
    headers = {} if tags is None else {TAGS_HEADER: tags}
    with engine.http(tenant, **headers) as client:
        got = client.post(CHAT, json=body(text, **more))
    assert got.status_code == 200, got.text
    return got.headers["x-doorbuster-tier"]


def flush(engine: Engine, **what: Any) -> dict[str, int]:
    with engine.http("office") as client:
        got = client.post(CACHE, json=what)
    assert got.status_code == 200, got.text
    return got.json()  # type: ignore[no-any-return]


def look(engine: Engine, **query: int) -> dict[str, Any]:
    with engine.http("office") as client:
        got = client.get(CACHE, params=query)
    assert got.status_code == 200, got.text
    return got.json()  # type: ignore[no-any-return]


def test_only_admin_keys_look_or_flush(office: Engine) -> None:
    assert ask(office, "is this still there?") == "model"
    before = look(office)
    for header, value in AWAY.items():
        with office.http(None, **{header: value}) as nobody:
            check_error(nobody.get(CACHE), 401, "unauthorized")
            check_error(nobody.post(CACHE, json={"all": True}), 401, "unauthorized")
    for tenant in ("shop", "bank", "trickle"):
        with office.http(tenant) as client:
            assert "admin = true" in check_error(client.get(CACHE), 403, "forbidden")
            check_error(client.post(CACHE, json={"tenant": tenant}), 403, "forbidden")
    with office.http("office") as client:
        check_error(client.put(CACHE), 405, "method_not_allowed")
    assert look(office) == before
    assert ask(office, "is this still there?") == "exact"


def test_this_machine_itself_needs_no_key(office: Engine) -> None:
    assert ask(office, "what a shell may flush") == "model"
    with office.http(None) as shell:
        assert shell.get(CACHE).json()["exact"] == look(office)["exact"]
        assert shell.post(CACHE, json={"tag": "sku:nowhere"}).json() == {"exact": 0, "semantic": 0}
        assert shell.post(CACHE, json={"all": True}).json()["exact"] >= 1
    assert ask(office, "what a shell may flush") == "model"


SIMPLE = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "text/plain;json", None]


@pytest.mark.parametrize("media_type", SIMPLE)
def test_a_page_of_somebody_elses_cannot_flush(office: Engine, media_type: str | None) -> None:
    """A browser on this machine sends such writes for any page without asking (CSRF), and names the page in others."""
    assert ask(office, "what no page may flush") in ("model", "exact")
    headers = {} if media_type is None else {"content-type": media_type}
    with office.http(None, **headers) as page:
        why = check_error(page.post(CACHE, content=b'{"all": true}'), 401, "unauthorized")
        assert "application/json" in why
    for origin in ("https://evil.example", "null", office.url):
        with office.http(None, origin=origin) as page:
            check_error(page.post(CACHE, json={"all": True}), 401, "unauthorized")
    with office.http(None, origin="https://evil.example") as page:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        leave = page.options(CACHE, headers=asked)
        check_error(leave, 405, "method_not_allowed")
        assert not any(name.startswith("access-control") for name in leave.headers), "no leave is given"
        assert not any(name.startswith("access-control") for name in page.get(CACHE).headers), "nor to read"
    assert ask(office, "what no page may flush") == "exact"


@given(
    local=st.booleans(), method=st.sampled_from(["GET", "HEAD", "POST"]), origin=st.sampled_from([None, b"null", b"x"]),
    media_type=st.sampled_from([None, b"", b"text/plain", b"application/json", b"Application/JSON; charset=utf-8"]),
)
def test_who_needs_no_key(local: bool, method: str, origin: bytes | None, media_type: bytes | None) -> None:
    json_said = media_type is not None and b"json" in media_type.lower()
    may = local and (method != "POST" or (origin is None and json_said))
    assert needs_no_key(local, method, media_type, origin) == may


def test_a_look_shows_facts_and_no_texts(office: Engine) -> None:
    hits = look(office)["exact"]["hits"]
    with office.http("bank", **{"x-request-id": "look-1", TAGS_HEADER: "sku:7"}) as client:
        headers = {"x-doorbuster-class": "chat"}
        text = client.post(CHAT, json=body("a secret of the bank", user="Ann Example"), headers=headers).json()
    assert ask(office, "the newest one") == "model" and ask(office, "the newest one") == "exact"
    seen = look(office, limit=2)
    newest, older = seen["entries"]
    assert newest["tenant"] == "shop" and newest["tags"] == ["catalogue"]
    assert (older["cache"], older["source"], older["tenant"]) == ("exact", "look-1", "bank")
    assert older["tags"] == ["catalogue", "sku:7"] and older["age_s"] > newest["age_s"] > 0
    assert older.keys() == {"cache", "answer_id", "source", "age_s", "tags", "tenant"}
    assert seen["exact"]["hits"] == hits + 1 and seen["exact"]["entries"] >= 2
    assert {"asked", "served", "lessons", "wrong", "bound_millionths"} <= seen["semantic"]["rule"].keys()
    assert {"rides", "quarantined", "invalidations"} <= seen["semantic"].keys() and seen["jobs"]["open"] == 0
    said = json.dumps(seen)
    for word in (text["choices"][0]["message"]["content"], "secret", "Ann", *office.keys.values()):
        assert word not in said
    assert look(office)["entries"] == []


@pytest.mark.parametrize("query", ["limit=-1", "limit=1001", "limit=", "limit=x", "a=1", "limit=1&limit=1"])
def test_a_look_is_strict(office: Engine, query: str) -> None:
    with office.http("office") as client:
        got = client.get(f"{CACHE}?{query}")
        param = None if "&" in query else query.partition("=")[0]
        check_error(got, 400, "invalid_request", param)


def test_a_flush_by_tag_reaches_what_depends_on_it(office: Engine) -> None:
    texts = {"about shoes, in blue": "sku:1", "about shoes, in red": "sku:1,campaign/may", "about a hat": "sku:2"}
    for text, tags in texts.items():
        assert [ask(office, text, tags=tags), ask(office, text, tags=tags)] == ["model", "exact"]
    assert flush(office, tag="sku:1") == {"exact": 2, "semantic": 0}
    assert [ask(office, text, tags=tags) for text, tags in texts.items()] == ["model", "model", "exact"]
    assert flush(office, tag="sku:none") == {"exact": 0, "semantic": 0}


def test_a_version_counts_once(office: Engine) -> None:
    for version, left, tier in ((5, 1, "model"), (5, 0, "exact"), (4, 0, "exact"), (6, 1, "model")):
        ask(office, "what does the lamp cost?", tags="lamp")
        assert flush(office, tag="lamp", version=version) == {"exact": left, "semantic": 0}
        assert ask(office, "what does the lamp cost?", tags="lamp") == tier


def test_similar_questions_answers_are_shown_and_flushed_too(office: Engine) -> None:
    """No class of this engine looks for similar questions: the entry is put where one would be."""
    driver = office.inside.driver

    def put() -> None:
        now_ns = driver.now_ns()
        entry = SemanticEntry(b"h" * 16, b"t" * 16, "ab" * 16, now_ns, "req-s", 4, "shop", ("catalogue", "sku:9"))
        driver.machine.answers.semantic.put(entry, now_ns)

    office.call(put)
    (seen,) = look(office, limit=1)["entries"]
    assert (seen["cache"], seen["source"], seen["answer_id"]) == ("semantic", "req-s", "ab" * 16)
    assert flush(office, tag="sku:9", tenant="bank") == {"exact": 0, "semantic": 0}
    assert flush(office, tag="sku:9", tenant="shop") == {"exact": 0, "semantic": 1}
    assert look(office)["semantic"]["entries"] == 0


def test_a_flush_by_answer_and_by_tenant(office: Engine) -> None:
    for tenant in ("shop", "office"):
        for text in ("one of two", "two of two"):
            assert ask(office, text, tenant) == "model"
    entry = look(office, limit=1)["entries"][0]
    assert flush(office, answer_id=entry["answer_id"], tenant="office") == {"exact": 1, "semantic": 0}
    tiers = [ask(office, text, tenant) for tenant in ("shop", "office") for text in ("one of two", "two of two")]
    assert tiers == ["exact", "exact", "exact", "model"]
    assert flush(office, tenant="office")["exact"] == 2
    tiers = [ask(office, text, tenant) for tenant in ("shop", "office") for text in ("one of two", "two of two")]
    assert tiers == ["exact", "exact", "model", "model"]


def test_a_flush_of_everything(office: Engine) -> None:
    for tenant in ("shop", "office"):
        ask(office, "gone with the rest", tenant)
    kept = look(office)["exact"]["entries"]
    assert kept >= 2 and flush(office, all=True) == {"exact": kept, "semantic": 0}
    assert look(office, limit=MOST_SHOWN)["entries"] == []
    assert [ask(office, "gone with the rest", tenant) for tenant in ("shop", "office")] == ["model", "model"]


@pytest.mark.parametrize(
    ("what", "param", "words"),
    [
        ({}, None, 'send {"all": true}'),
        ({"all": False}, None, "nothing flushed"),
        ({"version": 3}, "version", "name the tag"),
        ({"all": True, "version": 3}, "version", "name the tag"),
        ({"all": True, "tag": "sku:1"}, "all", "stands alone"),
        ({"tenant": "shpo"}, "tenant", "no such tenant"),
        ({"tag": ""}, "tag", "length >= 1"),
        ({"tag": "a", "version": 0}, "version", ">= 1"),
        ({"tag": "a", "version": "3"}, "version", "int"),
        ({"tags": ["a"]}, "tags", "unknown parameter"),
    ],
)
def test_a_flush_that_is_unclear_does_nothing(office: Engine, what: dict[str, Any], param: str, words: str) -> None:
    ask(office, "unmoved", tags="sku:1")
    with office.http("office") as client:
        assert words in check_error(client.post(CACHE, json=what), 400, "invalid_request", param)
    assert ask(office, "unmoved", tags="sku:1") == "exact"


@pytest.mark.parametrize("said", [b"", b"all", b"[]", b'{"all": true'])
def test_a_flush_is_json(office: Engine, said: bytes) -> None:
    with office.http("office") as client:
        check_error(client.post(CACHE, content=said), 400, "invalid_request")


@pytest.mark.parametrize("what", [{"tag": "clock"}, {"tenant": "shop"}, {"all": True}], ids=str)
def test_what_is_being_computed_is_not_kept_nor_shared(office: Engine, what: dict[str, Any]) -> None:
    text = f"what does the clock cost? {what}"
    with ThreadPoolExecutor() as pool, office.frozen():
        first = pool.submit(ask, office, text, tags="clock")
        office.waiting(1)
        assert flush(office, **what)["semantic"] == 0
        late = pool.submit(ask, office, text, tags="clock")
        office.waiting(2)
        office.worker.resume()
        assert first.result() == "model", "whoever asked before has his answer"
        assert late.result() == "model", "whoever asked after it waits for none that may be old"
    assert ask(office, text, tags="clock") == "exact", "the second one is kept"


def test_a_flush_finds_its_way_while_there_is_no_room(office: Engine) -> None:
    most = harness.SCENARIO.ingress.max_in_flight
    ask(office, "dear", tags="dear")
    with ThreadPoolExecutor(most) as pool, office.frozen():
        waits = [pool.submit(ask, office, f"room {i}") for i in range(most)]
        office.waiting(most)
        with office.http("office") as client:
            check_error(client.post(CHAT, json=body("no room")), 503, "overloaded")
        assert flush(office, tag="dear")["exact"] == 1
        office.worker.resume()
        assert all(wait.result() == "model" for wait in waits)


# ---------------------------------------------------------------- what a request says of itself


def test_tags_and_user_reach_the_machine_and_the_journal_replays(tmp_path: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.TENANTS, "office", "admin = true\n")
        with start(tmp_path) as engine:
            ask(engine, "a", tags="sku:1 , sku:1,, b", user="Ann")
            ask(engine, "b", safety_identifier="Ann")
            ask(engine, "c", tenant="office", user="Ann")
            with engine.http(**{TAGS_HEADER: "sku:1"}) as client:
                assert client.post("/v1/completions", json={"model": "default", "prompt": "d"}).status_code == 200
            assert flush(engine, tag="sku:1") == {"exact": 2, "semantic": 0}
    entries = journal(tmp_path)
    a, b, c, d = (entry.event for entry in entries if isinstance(entry.event, Arrive))
    assert [entry.event for entry in entries if isinstance(entry.event, Invalidate)] == [Invalidate(tag="sku:1")]
    assert (a.tags, b.tags, d.tags) == (("sku:1", "b"), (), ("sku:1",))
    assert a.asker == b.asker != c.asker and len(c.asker) == 16 and d.asker == b""
    assert replay(tmp_path / "journal" / "gateway-0.ndjson").identical


@pytest.mark.parametrize("tags", [",".join("abcdefghi"), "x" * 65, "a b", "grün", "sku:1;sku:2", '"a"'])
def test_bad_tags_are_refused(office: Engine, tags: str) -> None:
    with office.http() as client:
        for path, said in ((CHAT, body("tagged")), ("/v1/completions", {"model": "default", "prompt": "tagged"})):
            got: httpx.Response = client.post(path, json=said, headers={TAGS_HEADER: tags.encode()})  # type: ignore[dict-item]
            assert TAGS_HEADER in check_error(got, 400, "invalid_request", TAGS_HEADER)


def test_the_most_that_a_tag_header_may_say() -> None:
    most = [f"{i}" + "x" * 63 for i in range(MOST_TAGS)]
    assert tags_of(",".join(most).encode()) == tuple(most)
    assert tags_of(None) == tags_of(b"") == tags_of(b" , ") == ()
    with pytest.raises(RequestError):
        tags_of(b"a\n")
    assert tags_of(b"A9._:/-") == ("A9._:/-",)
