"""What can be set of an upstream: an OpenAI-compatible server that is a replica of ours."""

from __future__ import annotations

import re

from engine.units import ms_to_ns
from engine.values import NonNegative, Positive, Section

URL = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")


class UpstreamConfig(Section):
    """``[upstreams.NAME]``. With one or more of them there are no replicas of our own; they are numbered in order."""

    url: str  # http://host:port, with or without the path's /v1
    model: str = ""  # what it calls the model; "" = the first that its /v1/models names
    api_key_env: str = ""  # environment variable that holds its key; a key has no place in a file that is shown around
    window: Positive = 8  # requests that it is given at a time; the rest wait here, in our order
    reserved: NonNegative = 1  # of these places, only for critical
    health_path: str = "/v1/models"  # asked for with GET; llama.cpp and vLLM also have /health, which needs no key
    health_ms: Positive = 1000  # between two looks, and as long as one may take
    health_misses: Positive = 3  # in a row, and nothing heard meanwhile: it is lost until a look finds it again
    connect_ms: Positive = 500  # a server that is there accepts at once; who waits can still be computed elsewhere
    silence_ms: Positive = 20_000  # no byte for so long and the request has failed; above the longest prefill
    start_ms: Positive = 10_000  # that it may take to answer when we start

    @property
    def root(self) -> str:
        """The URL without ``/v1`` and without a slash at its end."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def health_ns(self) -> int:
        """Between two looks."""
        return ms_to_ns(self.health_ms)
