"""What a gateway process and a replica process say to each other: msgpack frames, length first, over a local socket.

Facts and payload travel together here and part on arrival: the machine gets the Submit, the runner the tokens.
"""

from __future__ import annotations

import struct

import msgspec

from engine.events import Abort, Drain, ReplicaWord, Submit
from engine.model.stepping import SamplingParams, TokenLogprobs

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20


Said = list[dict[str, str]] | str  # a conversation, or a bare prompt


class Work(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True):
    """A Submit with the tokens it is about. ``said``: the same as text, for who has a tokenizer of its own."""

    submit: Submit
    prompt: list[int]
    params: SamplingParams
    said: Said = ""


class Hello(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The gateway of this index shares the replica with others; said once, when it is ready to hear."""

    gateway: int


class Ready(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The replica has its weights; sent once after connecting."""

    model: str
    digest: str
    device: str
    dtype: str
    threads: int


class Output(msgspec.Struct, frozen=True, gc=False, tag=True):
    """What one turn of the replica brought: new tokens by submission first, then what happened, in order."""

    events: list[ReplicaWord]
    tokens: list[tuple[int, list[int]]] = []
    logprobs: list[tuple[int, list[TokenLogprobs]]] = []  # of each token, for the submissions that asked


ToReplica = Work | Abort | Drain
FromReplica = Ready | Output

_encoder = msgspec.msgpack.Encoder()
decode_to_replica = msgspec.msgpack.Decoder(ToReplica | Hello).decode
decode_from_replica = msgspec.msgpack.Decoder(FromReplica).decode


def frame(message: ToReplica | Hello | FromReplica) -> bytes:
    """One message as bytes for the socket."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Unframer:
    """Bytes in any portions to whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that ``data`` completes."""
        self._buffer += data
        out: list[bytes] = []
        at = 0
        while len(self._buffer) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, at)
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {size} bytes: the peer does not speak this protocol")
            if len(self._buffer) - at - LENGTH.size < size:
                break
            out.append(bytes(self._buffer[at + LENGTH.size : at + LENGTH.size + size]))
            at += LENGTH.size + size
        del self._buffer[:at]
        return out
