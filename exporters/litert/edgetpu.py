"""What the Edge TPU's compiler demands of a file, told before it is called: https://coral.ai/docs/edgetpu/models-intro/
(model requirements, supported operations) and https://coral.ai/docs/edgetpu/compiler/ (parameter caching).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from exporters.artifact import UNQUANTIZED, Achieved
from exporters.runtimes.tflite_file import CUSTOM, EIGHT, HEAVY, Operator, Tensor, TfliteFile, precisions, read

COMPILED = "edgetpu-custom-op"  # the operator that the compiler puts in the place of what the Edge TPU runs
SRAM = 8 << 20  # bytes on the chip, of which the executable takes its part; parameters beyond come from the host
LONGEST_SOFTMAX = 16_000
# BuiltinOperator's numbers of the operations that Coral lists.
SUPPORTED = {
    **{0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 9: "FULLY_CONNECTED"},
    **{11: "L2_NORMALIZATION", 14: "LOGISTIC", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1"},
    **{21: "RELU6", 22: "RESHAPE", 23: "RESIZE_BILINEAR", 25: "SOFTMAX", 26: "SPACE_TO_DEPTH", 28: "TANH", 34: "PAD"},
    **{40: "MEAN", 41: "SUB", 43: "SQUEEZE", 44: "UNIDIRECTIONAL_SEQUENCE_LSTM", 45: "STRIDED_SLICE", 49: "SPLIT"},
    **{54: "PRELU", 55: "MAXIMUM"},
    **{57: "MINIMUM", 65: "SLICE", 67: "TRANSPOSE_CONV", 70: "EXPAND_DIMS", 74: "SUM", 76: "RSQRT", 82: "REDUCE_MAX"},
    **{83: "PACK", 89: "REDUCE_MIN", 97: "RESIZE_NEAREST_NEIGHBOR", 99: "SQUARED_DIFFERENCE", 114: "QUANTIZE"},
}
OTHERS = {6: "DEQUANTIZE", 39: "TRANSPOSE", 66: "SIN", 108: "COS", 126: "BATCH_MATMUL", 130: "BROADCAST_TO"}
FUSED = {1: 5, 2: 1, 17: 5}  # operations that may have no fused activation, and its slot in their options


@dataclass(frozen=True)
class Demands:
    """What a file lacks (`violations`: the compiler refuses it), the operators that stay on the CPU with the reason,
    how many there are and how many come before the first of those, and the bytes of its parameters."""

    violations: tuple[str, ...]
    fallbacks: tuple[tuple[str, str], ...]
    operators: int
    mapped: int
    parameters: int

    @property
    def lines(self) -> tuple[str, ...]:
        """For the record."""
        cached = "fit" if self.parameters <= SRAM else "do not fit"
        reasons = Counter(f"{name} ({why})" for name, why in self.fallbacks)
        told = [f"{n} {word}" for word, n in reasons.most_common()]
        return (
            f"the Edge TPU takes {self.mapped} of {self.operators} operators, up to the first that it lacks",
            *([f"on the CPU: {'; '.join(told)}"] if told else []),
            f"parameters of {self.parameters / 2**20:.2f} MiB {cached} into its 8 MiB of memory",
        )


def demands(file: TfliteFile) -> Demands:
    """What the compiler will say of a file."""
    found: list[str] = []
    tensors = file.tensors
    for side, numbers in (("input", file.inputs), ("output", file.outputs)):
        found += [
            f"{side} '{tensors[n].name}' is {tensors[n].dtype}, expected int8 or uint8"
            for n in numbers
            if tensors[n].dtype not in EIGHT
        ]
    found += [
        f"input '{tensors[n].name}' has a batch of {tensors[n].shape[0]}, expected 1"
        for n in file.inputs
        if len(tensors[n].shape) > 1 and tensors[n].shape[0] not in (1, -1)
    ]
    found += [f"tensor '{t.name}' has a size that varies: {list(t.shape)}" for t in tensors if -1 in t.shape]
    for op in file.operators:
        if op.kind in HEAVY and any(n >= 0 and not tensors[n].is_constant for n in op.inputs[1:2]) and op.kind != 126:
            found.append(f"the weights of '{file.name(op)}' are computed, expected a constant")
    reasons = [(op, _reason(file, op)) for op in file.operators]
    first = next((at for at, (_, why) in enumerate(reasons) if why), len(reasons))
    if not first:
        found.append(f"the first operator, {_word(file.operators[0])}, is not for the Edge TPU ({reasons[0][1]})")
    constants = {t.constant[0]: t.constant[1] for t in tensors if t.is_constant}
    return Demands(
        tuple(found),
        tuple((_word(op), why) for op, why in reasons if why),
        len(reasons),
        first,
        sum(constants.values()),
    )


def _word(op: Operator) -> str:
    return op.custom or SUPPORTED.get(op.kind) or OTHERS.get(op.kind) or f"operator {op.kind}"


def _reason(file: TfliteFile, op: Operator) -> str:
    """Why an operator stays on the CPU, or ""."""
    if op.kind not in SUPPORTED:
        return "not one of the supported operations"
    data = [file.tensors[n] for n in (*op.inputs, *op.outputs) if n >= 0 and not file.tensors[n].is_constant]
    odd = next((t for t in data if t.dtype not in EIGHT), None)
    if odd is not None:
        return f"on {odd.dtype}"
    if any(_is_deep(t) for t in data):
        return "more than the three innermost axes are larger than 1"
    if op.kind in FUSED and op.options is not None and op.options.number(FUSED[op.kind], "b"):
        return "with a fused activation"
    made = file.tensors[op.outputs[0]] if op.outputs else None
    if made is not None and made.shape and op.kind == 25 and (_rows(made) > 1 or made.shape[-1] > LONGEST_SOFTMAX):
        return "of more than one row"
    if made is not None and op.kind == 9 and _rows(made) > 1:
        return "of more than one row"
    return ""


def _is_deep(tensor: Tensor) -> bool:
    return any(n > 1 for n in tensor.shape[:-3])


def _rows(tensor: Tensor) -> int:
    """How many vectors along its last axis a tensor has."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    return count


def is_compiled(file: TfliteFile) -> bool:
    """Whether the compiler's operator is in a file, and holds something to run."""
    return any(_runs(op) for op in file.operators)


def _runs(op: Operator) -> bool:
    return op.kind == CUSTOM and op.custom == COMPILED and op.custom_bytes > 0


def read_precision(path: Path) -> Achieved:
    """INT8 of what the compiler made; what it did not make is told, whatever it is called."""
    file = read(path)
    left = precisions(file)
    counts = Counter(kind for _, kind, _ in left if kind)
    evidence = {f"operators {k} on the CPU": n for k, n in counts.items()}
    if not is_compiled(file):
        return Achieved(f"not compiled for the Edge TPU: it has no {COMPILED} that holds something", evidence)
    number = sum(_runs(op) for op in file.operators)
    evidence |= {COMPILED: number, UNQUANTIZED: sum(not kind for _, kind, _ in left)}
    return Achieved("int8", evidence, tuple(sorted(n for n, k, _ in left if k not in ("int8", ""))))
