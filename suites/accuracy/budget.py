"""How much of the task metric an artifact may lose, by precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporters.spec import Precision


@dataclass(frozen=True)
class Budget:
    """How far the artifact's metric may be from the reference's: a difference either way, or the least share of it."""

    allowed: float
    is_share: bool

    def line(self) -> str:
        return f"at least {self.allowed:g} of it" if self.is_share else f"within {self.allowed:g} of it"


# What a precision costs by its arithmetic: FP32 the order of sums; 10 bits of fraction (TF32, FP16) scores of up to
# 5e-3 (our tolerance), so about so much of the ranking; 8 bits and less what MLPerf grants a quantized model.
DEFAULTS: Mapping[Precision, Budget] = {
    Precision.FP32: Budget(0.001, False),
    Precision.TF32: Budget(0.005, False),
    Precision.FP16: Budget(0.005, False),
    Precision.BF16: Budget(0.99, True),
    Precision.FP8: Budget(0.99, True),
    Precision.INT8: Budget(0.99, True),
}
