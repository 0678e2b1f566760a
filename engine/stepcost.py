"""What a step costs, as a formula: six non-negative terms over the step's shape.

    t = fixed + prefill_token * P + prefill_row * n + decode_row * D + decode_kv * KV + area * A

Prefill tokens P in n rows, decode rows D over KV context tokens, attention area A (``StepShape``). The physical form
holds outside the calibrated range where a random forest does not (4.6 % against 47 % off, ``sim/README.md``).
Fitting lives in the twin; the fake model and the twin's clock both read this.
"""

from __future__ import annotations

from engine.events import StepShape
from engine.values import Section


class StepCost(Section):
    """Coefficients in nanoseconds per unit."""

    fixed_ns: float
    prefill_token_ns: float
    prefill_row_ns: float
    decode_row_ns: float
    decode_kv_ns: float  # per context token attended to by a decode row
    area_ns: float  # per unit of the doubled attention area

    def ns(self, shape: StepShape, later: int = 0) -> int:
        """Duration of the step ``later`` steps after the one with this shape: every decode row has grown by one."""
        return round(
            self.fixed_ns
            + self.prefill_token_ns * shape.prefill_tokens
            + self.prefill_row_ns * shape.prefill_rows
            + self.decode_row_ns * shape.decode_rows
            + self.decode_kv_ns * (shape.decode_kv_tokens + later * shape.decode_rows)
            + self.area_ns * shape.attention_area
        )
