"""A replica process whose model has two bad words: at one its forward raises, at the other its logits are no numbers.

``python -m tests.drill.faulty``: the real process, runner and weights, with hooks round the model's forward. The engine
has no such switch; a drill starts this module in place of ``engine.model.process``.
"""

from __future__ import annotations

from typing import Any

import engine.model.process as process

RAISES, NAN = " Zimbabwe", " Kazakhstan"  # single pieces of SmolLM2's vocabulary that no other prompt of a drill has


def words() -> tuple[int, int]:
    """Their token ids."""
    from engine.service.server import tokenizer_for

    [raises], [nan] = (tokenizer_for("smollm2").encode(word) for word in (RAISES, NAN))
    return raises, nan


def spoil(model: Any) -> None:
    """Hooks, so that whatever the layers were replaced by stays as it is."""
    raises, nan = words()

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == raises).any():
            raise ArithmeticError("a bad word")

    def after(_: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        for at in (kwargs["input_ids"][0] == nan).nonzero().flatten().tolist():
            row = next((n for n, last in enumerate(kwargs["logits_to_keep"].tolist()) if last >= at), None)
            if row is not None:
                out.logits[0, row] = float("nan")
        return out

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)


def main() -> None:
    """As the real one, with the runner's model spoilt once it is loaded."""
    make = process.make_runner

    def make_runner(*args: Any) -> Any:
        runner, ready = make(*args)
        spoil(runner.model.model)  # type: ignore[attr-defined]
        return runner, ready

    process.make_runner = make_runner
    process.main()


if __name__ == "__main__":
    main()
