"""From a conversation to what the gateway machine is told of it: counts, digests, block hashes. Never its text.

The live ingress and the twin call the same ``arrive``, so the twin's requests are the live ones. A class's system
prompt is encoded once: tokenizers cut text at special tokens before all else, so the ids before such a cut and those
after it do not depend on each other; the cut is tried out once per class. Knows no HTTP, no clock and no cache.
"""

from __future__ import annotations

import msgspec

from engine.config import Scenario
from engine.errors import RequestError, UserError
from engine.events import Arrive, TextMarks
from engine.model.blockhash import Hasher
from engine.model.stepping import SamplingParams
from engine.model.textmarks import marks_of
from engine.model.tokenizer import Tokenizer
from engine.model.wire import Said
from engine.scenario import data_path
from engine.service.charges import asker_of, draw_of

Messages = list[dict[str, str]]


class Opening(msgspec.Struct, frozen=True):
    """A class's system prompt, encoded: a prompt that starts with ``text`` has ``ids`` for ``text[:cut]``."""

    text: str  # up to the first letter of the user's own words
    cut: int  # before the last special token that all of them share
    ids: list[int]


class FactMaker:
    """One per served model. ``model_name`` is part of every digest: two models never share an answer or a block."""

    def __init__(self, tokenizer: Tokenizer, hasher: Hasher, scenario: Scenario, model_name: str) -> None:
        self._tokenizer, self._hasher, self._model = tokenizer, hasher, model_name
        self._classes, self._context = scenario.classes, scenario.model.context_tokens
        self._upstreams = bool(scenario.upstreams)
        self._similar = {
            name for name, cls in scenario.classes.items() if cls.caches == "semantic" and scenario.semantic.enabled
        }
        self._system = {
            name: data_path("corpora", cls.system_prompt).read_text(encoding="utf-8").strip()
            for name, cls in scenario.classes.items()
            if cls.system_prompt
        }
        try:
            self._openings = {name: find_opening(tokenizer, text) for name, text in self._system.items()}
        except RequestError as error:
            raise UserError(
                f"model {model_name} cannot be given a system prompt", why=error.message,
                fix="leave out system_prompt in every [classes.NAME], or take a chat model",
            ) from None

    def arrive(
        self,
        rid: int,
        request_id: str,
        tenant: str,
        traffic_class: str,
        messages: Messages,
        params: SamplingParams,
        max_tokens: int | None,
        arrived_ns: int,
        asker: str = "",
        tags: tuple[str, ...] = (),
        attempt: int = 0,
    ) -> tuple[Arrive, list[int]]:
        """The facts, and the prompt's token ids for the replica.

        ``asker``: the tenant's own user, "" = not named. ``tags``: what the answer depends on beside what its class
        says; an answer kept under some is never one for others, whom their change would not reach. ``attempt``: 0 is
        the first one; no key depends on it.
        ``params.seed`` 0 means that the client gave none: with a temperature such a request has no exact key.
        Raises RequestError when the conversation does not fit the model.
        """
        text, prompt, shared_tokens = self._prompt(traffic_class, messages)
        most = self._room("messages", prompt, max_tokens, traffic_class)
        question = question_of(messages)
        facts = Arrive(
            rid=rid, request_id=request_id, tenant=tenant, traffic_class=traffic_class, arrived_ns=arrived_ns,
            prompt_tokens=len(prompt), max_tokens=most,
            exact_key=self._exact_key(_tagged("exact", tags), tenant, traffic_class, params, most, text),
            hard_key=self._hard_key(_tagged("hard", tags), tenant, traffic_class, params, most, messages),
            text_key=self.text_key(tenant, question) if question else b"", blocks=self._blocks(tenant, prompt),
            pinned_blocks=shared_tokens // self._hasher.block_tokens if self._classes[traffic_class].pinned else 0,
            marks=marks_of(question, self._hasher) if question and traffic_class in self._similar else TextMarks(),
            draw=draw_of(self._hasher, tenant, request_id), asker=asker_of(self._hasher, tenant, asker), tags=tags,
            attempt=attempt,
        )
        return facts, prompt

    def complete(
        self,
        rid: int,
        request_id: str,
        tenant: str,
        traffic_class: str,
        text: str,
        params: SamplingParams,
        max_tokens: int | None,
        arrived_ns: int,
        asker: str = "",
        tags: tuple[str, ...] = (),
        attempt: int = 0,
    ) -> tuple[Arrive, list[int]]:
        """``arrive`` for a bare prompt: no template, no system prompt of the class, special tokens as they are spelt.

        It has no ``text_key``: there is no user turn to be similar to. Its exact key is of its own kind, because a
        template and a bare prompt may differ in the model's start token only.
        """
        prompt = self._tokenizer.encode(text, add_special=True)
        if not prompt:
            raise RequestError("invalid_request", "prompt: it has no tokens", "prompt")
        most = self._room("prompt", prompt, max_tokens, traffic_class)
        facts = Arrive(
            rid=rid, request_id=request_id, tenant=tenant, traffic_class=traffic_class, arrived_ns=arrived_ns,
            prompt_tokens=len(prompt), max_tokens=most,
            exact_key=self._exact_key(_tagged("exact-bare", tags), tenant, traffic_class, params, most, text),
            blocks=self._blocks(tenant, prompt), draw=draw_of(self._hasher, tenant, request_id),
            asker=asker_of(self._hasher, tenant, asker), tags=tags, attempt=attempt,
        )
        return facts, prompt

    def again(self, facts: Arrive, rid: int, request_id: str, arrived_ns: int, attempt: int = 0) -> Arrive:
        """What ``arrive`` or ``complete`` would say of the same request under another name, without reading it."""
        draw = draw_of(self._hasher, facts.tenant, request_id)
        return msgspec.structs.replace(
            facts, rid=rid, request_id=request_id, arrived_ns=arrived_ns, draw=draw, attempt=attempt
        )

    def said(self, traffic_class: str, said: Said) -> Said:
        """What an upstream is told: the conversation under its class's system prompt. "" where there is none."""
        if not self._upstreams:
            return ""
        system = self._system.get(traffic_class)
        if system is None or isinstance(said, str) or any(turn["role"] == "system" for turn in said):
            return said
        return [{"role": "system", "content": system}, *said]

    def text_key(self, tenant: str, text: str) -> bytes:
        """Digest of one text of a tenant, under which its vector is known: the encoder's memory of what one has asked
        makes nobody else's question quicker."""
        return self._hasher.digest("text", tenant, text.strip())

    def count(self, text: str) -> int:
        """Model tokens of a text."""
        return len(self._tokenizer.encode(text))

    def _blocks(self, tenant: str, prompt: list[int]) -> tuple[bytes, ...]:
        return self._hasher.chain(self._hasher.root(tenant, self._model), prompt)

    def _room(self, what: str, prompt: list[int], max_tokens: int | None, traffic_class: str) -> int:
        """Tokens that the answer may have at most, if prompt and answer fit the context."""
        cls = self._classes[traffic_class]
        most = min(max_tokens or cls.max_tokens, cls.max_tokens)
        if len(prompt) + most > self._context:
            take = "messages take" if what == "messages" else f"{what} takes"
            raise RequestError(
                "context_length_exceeded",
                f"the context is {self._context} tokens: the {take} {len(prompt)}, the answer up to {most}",
                what,
            )
        return most

    def _prompt(self, traffic_class: str, messages: Messages) -> tuple[str, list[int], int]:
        """Text, its ids, and how many of these are the class's own system turn."""
        system = self._system.get(traffic_class)
        if system is None or any(turn["role"] == "system" for turn in messages):
            text = self._tokenizer.render(messages)
            return text, self._tokenizer.encode(text), 0
        text = self._tokenizer.render([{"role": "system", "content": system}, *messages])
        opening = self._openings[traffic_class]
        if opening is None or not text.startswith(opening.text):
            return text, self._tokenizer.encode(text), 0
        return text, opening.ids + self._tokenizer.encode(text[opening.cut :]), len(opening.ids)

    def _exact_key(
        self, tag: str, tenant: str, traffic_class: str, params: SamplingParams, most: int, text: str
    ) -> bytes:
        how = _how(params)
        return self._hasher.digest(tag, tenant, traffic_class, self._model, how, str(most), text) if how else b""

    def _hard_key(
        self, tag: str, tenant: str, traffic_class: str, params: SamplingParams, most: int, messages: Messages
    ) -> bytes:
        """Everything but the question: who asks, under what context, for an answer of what kind."""
        system = [turn["content"] for turn in messages if turn["role"] == "system"]
        context = system or [self._system.get(traffic_class, "")]
        return self._hasher.digest(tag, tenant, traffic_class, self._model, _how(params), str(most), *context)


def _tagged(tag: str, tags: tuple[str, ...]) -> str:
    """A digest's tag that says of which dependencies; tags have no blanks, their order means nothing."""
    return " ".join((tag, *sorted(set(tags))))


def _how(params: SamplingParams) -> str:
    """How an answer is drawn and where it is cut, as far as it can be had again; "" when it cannot.

    Log-probabilities are not kept with an answer, so whoever asks for them has one computed for himself.
    """
    if params.logprobs is not None:
        return ""
    ends = f"{params.ignore_eos} {sorted(set(params.stop))}"
    if not params.temperature:
        return f"greedy {ends}"  # whatever top_k, top_p and seed say
    return f"{params.temperature!r} {params.top_k} {params.top_p!r} {params.seed} {ends}" if params.seed else ""


def question_of(messages: Messages) -> str:
    """The question of a conversation of one turn, stripped; "" where earlier turns could change its meaning."""
    turns = [turn for turn in messages if turn["role"] != "system"]
    return turns[0]["content"].strip() if len(turns) == 1 and turns[0]["role"] == "user" else ""


def find_opening(tokenizer: Tokenizer, system: str) -> Opening | None:
    """What all conversations under this system prompt begin with, or None when no special token ends its turn."""
    first, second = (
        tokenizer.render([{"role": "system", "content": system}, {"role": "user", "content": word}])
        for word in ("Is", "be")
    )
    differ = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    shared = first[:differ]
    whole = tokenizer.encode(first)
    for cut in range(len(shared) - 1, 0, -1):
        head, tail = tokenizer.encode(first[:cut]), tokenizer.encode(first[cut:])
        if head + tail == whole and _is_special(tokenizer, tail[0]):
            return Opening(shared, cut, head)
    return None


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Whether decoding leaves it out wherever it stands (a lone blank vanishes at the start of a text only)."""
    word = tokenizer.encode("a")
    return tokenizer.decode([*word, token, *word]) == tokenizer.decode(word + word)
