"""A replica process that has imported all that weights need and waits for its spec: the place of one that dies is its.

``python -m engine.model.standby``. Interpreter, torch and transformers take two thirds of a start; here they are paid
before anybody waits. The tiny model is loaded once, since much is imported only by a first forward; no weights stay.
"""

from __future__ import annotations

from engine.model.process import main


def warm() -> None:
    """Import what the first load and the first forward import."""
    from engine.model.loader import load, prepare
    from engine.model.runner import TorchRunner

    assert TorchRunner is not None
    load(prepare("tiny", lambda line: None))


if __name__ == "__main__":
    main(warm)
