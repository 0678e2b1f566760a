"""Key files, keys and classes: what is let in, what is refused, and in which words."""

from __future__ import annotations

import hmac
import re
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from engine.config import ClassConfig, TenantConfig
from engine.errors import RequestError, UserError
from engine.service.auth import KeyRing, new_key

KNOWN = {
    "fraud": ClassConfig("critical"), "chat": ClassConfig("standard"), "search": ClassConfig("sheddable"),
}
DIGEST = sha256(b"some key").hexdigest()


def load(tmp_path: Path, text: str) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return KeyRing.load(path, KNOWN)


def test_a_new_key_opens_the_door_that_its_stanza_describes(tmp_path: Path) -> None:
    key, stanza = new_key("shop-1", ["fraud", "chat"])
    assert re.fullmatch(r"db-[A-Za-z0-9_-]{43}", key)
    assert key not in stanza and key.removeprefix("db-") not in stanza
    ring = load(tmp_path, stanza + "rate_rps = 5\nburst = 10.5\ntokens_per_s = 0\nweight = 2\n")
    assert ring.tenants == {
        "shop-1": TenantConfig(("fraud", "chat"), rate_rps=5.0, burst=10.5, tokens_per_s=0.0, weight=2.0)
    }
    assert ring.authenticate(b"Bearer " + key.encode()) == "shop-1"
    assert ring.authenticate(b"bearer  " + key.encode() + b" ") == "shop-1"


@pytest.mark.parametrize("admin", [False, True])
def test_an_admins_key_is_made_where_it_is_asked_for(tmp_path: Path, admin: bool) -> None:
    _, stanza = new_key("office", ["chat"], admin=admin)
    ring = load(tmp_path, stanza)
    assert ring.is_admin("office") is admin
    assert ring.tenants["office"].classes == ("chat",)


def test_two_new_keys_differ_and_odd_names_survive_the_file() -> None:
    (one, _), (two, stanza) = new_key("a"), new_key('odd "name" of 7.5')
    assert one != two
    assert tomllib.loads(stanza)["tenants"].keys() == {'odd "name" of 7.5'}
    with pytest.raises(UserError, match="needs a name"):
        new_key("")


def test_each_key_finds_its_own_tenant(tmp_path: Path) -> None:
    made = {f"t{i}": new_key(f"t{i}") for i in range(5)}
    ring = load(tmp_path, "\n".join(stanza for _, stanza in made.values()))
    for name, (key, _) in made.items():
        assert ring.authenticate(f"Bearer {key}".encode()) == name


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Bearer db-nobody", b"Bearer \xff", "KEY", "Basic", "Twice"]
)
def test_no_key_no_entry(header: bytes | str | None) -> None:
    ring, key = KeyRing.single()
    if isinstance(header, str):  # the right key, said in the wrong way
        header = {"KEY": key, "Basic": f"Basic {key}", "Twice": f"Bearer {key}, Bearer {key}"}[header].encode()
    with pytest.raises(RequestError) as caught:
        ring.authenticate(header)
    assert (caught.value.code, caught.value.status) == ("unauthorized", 401)
    assert key not in caught.value.message


def test_a_key_is_compared_with_all_digests_wherever_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [new_key(f"t{i}") for i in range(4)]
    ring = load(tmp_path, "\n".join(stanza for _, stanza in made))
    compared: list[bytes] = []

    def watched(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", watched)
    for key in (made[0][0], made[3][0]):
        compared.clear()
        ring.authenticate(f"Bearer {key}".encode())
        assert len(set(compared)) == 4


def test_single_grants_everything_to_one_fresh_key() -> None:
    (ring, key), (_, other) = KeyRing.single(), KeyRing.single()
    assert key != other and ring.authenticate(f"Bearer {key}".encode()) == "local"
    assert ring.tenants == {"local": TenantConfig()}
    assert [ring.class_of("local", name, KNOWN) for name in KNOWN] == [*KNOWN]
    assert ring.class_of("local", None, KNOWN) == "chat", "nobody is critical for want of a word"
    assert ring.class_of("local", None, {"fraud": KNOWN["fraud"]}) == "fraud", "unless there is nothing else"


def test_only_who_is_said_to_be_an_admin_is_one(tmp_path: Path) -> None:
    made = {name: new_key(name)[1] for name in ("office", "shop", "bank")}
    ring = load(tmp_path, made["office"] + "admin = true\n" + made["shop"] + "admin = false\n" + made["bank"])
    assert [ring.is_admin(name) for name in ("office", "shop", "bank", "nobody")] == [True, False, False, False]
    assert ring.tenants["office"] == ring.tenants["bank"], "it grants nothing else"
    assert KeyRing.single()[0].is_admin("local") and not KeyRing.single()[0].is_admin("shop")


def test_a_class_must_be_known_and_granted(tmp_path: Path) -> None:
    ring = load(tmp_path, f'[tenants.bank]\nkey_sha256 = "{DIGEST}"\nclasses = ["fraud", "chat"]\n')
    assert ring.class_of("bank", None, KNOWN) == "fraud"
    assert ring.class_of("bank", "chat", KNOWN) == "chat"
    with pytest.raises(RequestError) as caught:
        ring.class_of("bank", "search", KNOWN)
    assert (caught.value.code, caught.value.param) == ("forbidden", "x-doorbuster-class")
    for unknown in ("serach", ""):
        with pytest.raises(RequestError) as caught:
            ring.class_of("bank", unknown, KNOWN)
        assert (caught.value.code, caught.value.param) == ("invalid_request", "x-doorbuster-class")
        assert "fraud, chat, search" in caught.value.message


TABLE = f'[tenants.a]\nkey_sha256 = "{DIGEST}"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenants.a]\nkey_sha256 = = 3\n", ["keys.toml", "not valid TOML", "line 2"]),
        ("", ["no tenant", "doorbuster keys new"]),
        ("tenants = 3", ["no tenant"]),
        ("[tenant.a]\n", ["tenant is not a known key"]),
        ("[tenants]\na = 3\n", ["[tenants.a]", "object"]),
        ("[tenants.a]\n", ["[tenants.a]", "key_sha256"]),
        (TABLE + 'class = ["chat"]\n', ["[tenants.a]", "class is not a known key", "did you mean classes?"]),
        (TABLE + 'classes = ["chta"]\n', ["'chta'", "fraud, chat, search", "did you mean chat?"]),
        (TABLE + 'rate_rps = "many"\n', ["[tenants.a]", "rate_rps", "float"]),
        (TABLE + "burst = 0\n", ["burst", "> 0"]),
        (TABLE + 'admin = "yes"\n', ["[tenants.a]", "admin", "bool"]),
        (TABLE + "admim = true\n", ["admim is not a known key", "did you mean admin?"]),
        (TABLE.replace(DIGEST, DIGEST[:-1]), ["[tenants.a]", "not a SHA-256 digest", "63 characters"]),
        (TABLE.replace(DIGEST, "g" * 64), ["not a SHA-256 digest"]),
        (TABLE + TABLE.replace(".a", ".b").replace(DIGEST, DIGEST.upper()), ["[tenants.b]", "same", "[tenants.a]"]),
    ],
)
def test_a_bad_key_file_is_explained(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert caught.value.where and (caught.value.why or caught.value.fix), said


def test_a_missing_key_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the key file") as caught:
        KeyRing.load(tmp_path / "none.toml", KNOWN)
    assert "none.toml" in caught.value.where and "keys new" in caught.value.fix
