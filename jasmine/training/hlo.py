"""What a compiled program does, read from its text: FLOPs, bytes, and what devices send each other.

The compiler's own cost analysis counts the body of a loop once, however often it runs; here a computation counts as often as
it is called. Sizes are those of one device's program. Two things are peculiar to TPUs: arrays in the memory on the chip
(layout `S(1)`) cost no traffic to HBM, and what goes between slices is a `send` that the runtime carries out.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Costs nothing itself: names, views, or the end of what was counted at its start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "domain", "send", "recv", "add-dependency",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind in a step.

    Attributes:
        kind: such as `all-reduce`.
        count: how often a step does one.
        bytes: that each device sends in all of them, by the ring algorithms, which send the least.
        between_slices: over the data centre's network, and not over the chips' own.
    """

    kind: str
    count: int
    bytes: int
    between_slices: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a program on one device. `flops`: of matrix products and convolutions; `bytes`: read from and written to
    the main memory, each instruction for itself."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]


def cost(text: str, slices: int = 1) -> Cost:
    """Counts over an optimized HLO module.

    Args:
        text: of a compiled program (`as_text()`).
        slices: over which the program runs.
    """
    program = _Program(text)
    flops = moved = 0.0
    found: dict[tuple[str, bool], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    seen = set()  # by channel: what runs along with other work is written out in several fusions
    for name, times in program.executions().items():
        fused = name in program.fused
        for one in program.computations[name].values():
            flops += times * program.flops(name, one)
            moved += 0 if fused else times * program.traffic(name, one)
            exchange = _exchange(one, slices, name)
            if exchange is not None and (one.channel is None or (one.opcode, one.channel) not in seen):
                seen.add((one.opcode, one.channel))
                kind, sent, slow = exchange
                found[kind, slow][0] += times
                found[kind, slow][1] += times * sent
    return Cost(
        flops,
        moved,
        tuple(Collective(kind, int(n), int(sent), slow) for (kind, slow), (n, sent) in sorted(found.items())),
    )


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8  # what is not in the table are floats of 8 bits

    @property
    def main_bytes(self) -> int:
        """0 where it lies in the memory on the chip, as single numbers do."""
        return 0 if "S(" in self.layout or not self.shape else self.bytes


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[_Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    def attribute(self, name: str, pattern: str) -> str | None:
        found = re.search(rf"\b{name}=({pattern})", self.rest)
        return found[1] if found else None

    @property
    def channel(self) -> str | None:
        return self.attribute("channel_id", r"\d+")

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> int:
        return sum(array.main_bytes for array in self.arrays)

    def called(self) -> dict[str, str]:
        """Computations that it runs, by attribute. `to_apply` of other than `call` is work on single numbers."""
        found = {}
        for key in ("calls", "body", "condition", "true_computation", "false_computation"):
            if name := self.attribute(key, r"%[\w.\-]+"):
                found[key] = name[1:]
        if self.opcode == "call" and (name := self.attribute("to_apply", r"%[\w.\-]+")):
            found["to_apply"] = name[1:]
        if branches := self.attribute("branch_computations", r"\{[^}]*\}"):
            found |= {f"branch {index}": name for index, name in enumerate(re.findall(r"%([\w.\-]+)", branches))}
        return found


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        current: dict[str, _Instruction] = {}
        for line in re.sub(r"/\*[^*]*\*/", "", text).splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif one := _parse(line):
                current[one.name] = one
        self.fused: set[str] = set()
        for one in self._instructions():
            if one.opcode == "fusion":
                self.fused |= set(one.called().values())
        for name in list(self.fused):  # fusions inside of fusions
            self._spread(name)

    def _spread(self, name: str) -> None:
        for one in self.computations[name].values():
            for inner in one.called().values():
                if inner not in self.fused:
                    self.fused.add(inner)
                    self._spread(inner)

    def _instructions(self) -> Iterator[_Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def executions(self) -> dict[str, float]:
        """How often each computation runs in one run of the program. Of a conditional's branches, each counts as taken."""
        times: dict[str, float] = collections.defaultdict(float)

        def run(name: str, count: float) -> None:
            times[name] += count
            for one in self.computations[name].values():
                called = one.called()
                trips = self._trips(one, called, self.computations[name]) if one.opcode == "while" else 1
                for key, inner in called.items():
                    run(inner, count * (trips if key == "body" else 1))

        run(self.entry, 1)
        return times

    def _trips(self, loop: _Instruction, called: dict[str, str], around: dict[str, _Instruction]) -> int:
        """Of a loop: as noted by the compiler; else from its counter, if that is compared with a constant; else 1. Loops that
        were unrolled count in larger steps, and those that lost their first turn to the code before them start later."""
        if noted := re.search(r"known_trip_count\D*(\d+)", loop.rest):
            return int(noted[1])
        condition, body = self.computations[called["condition"]], self.computations[called["body"]]
        root = next(one for one in condition.values() if one.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest or len(root.operands) != 2:
            return 1
        counter, limit = (condition[name] for name in root.operands)
        place = counter.attribute("index", r"\d+")
        if limit.opcode != "constant" or place is None:
            return 1
        index, first, step = int(place), 0, 1
        before = around[loop.operands[0]]
        if before.opcode == "tuple":
            first = _constant(before.operands[index], around) or 0
        after = body.get(next(one for one in body.values() if one.root).operands[index])
        if after is not None and after.opcode == "add":
            steps = [_constant(name, body) for name in after.operands]
            step = next((number for number in steps if number), 1)
        return math.ceil((int(limit.inside) - first) / step)

    # --- FLOPs --------------------------------------------------------------------------------------------------

    def flops(self, computation: str, one: _Instruction) -> float:
        if one.opcode not in ("dot", "convolution"):
            return 0.0
        arrays = [self.computations[computation][name].arrays[0] for name in one.operands[:2]]
        out = math.prod(one.arrays[0].shape)
        if one.opcode == "dot":
            axes = one.attribute("lhs_contracting_dims", r"\{[^}]*\}") or "{}"
            return 2.0 * out * math.prod(arrays[0].shape[int(axis)] for axis in re.findall(r"\d+", axes))
        return _convolution_flops(one, arrays[0].shape, arrays[1].shape)

    # --- traffic ------------------------------------------------------------------------------------------------

    def traffic(self, computation: str, one: _Instruction) -> float:
        """Bytes that an instruction outside of fusions moves between the cores and the main memory."""
        here = self.computations[computation]
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")) or "ConcatBitcast" in one.rest:
            return 0.0
        operands = [here[name] for name in one.operands if name in here]
        if one.opcode in ("copy-start", "slice-start"):  # one array here or there, and where it came from
            whole = one.arrays[1]
            return whole.main_bytes + (whole.bytes if operands and operands[0].main_bytes else 0)
        if one.opcode == "dynamic-slice":
            return one.main_bytes + (one.bytes if operands[0].main_bytes else 0)
        if one.opcode == "dynamic-update-slice":
            return operands[1].main_bytes + (operands[1].bytes if one.main_bytes else 0)
        if one.opcode == "fusion":
            body = self.computations[one.called()["calls"]]
            written = self._written(body, one)
            return written + sum(
                min(operand.main_bytes, self._read(body, index)) for index, operand in enumerate(operands)
            )
        return one.main_bytes + sum(operand.main_bytes for operand in operands)

    def _read(self, body: dict[str, _Instruction], index: int) -> float:
        """Bytes that a fusion reads of its argument: less than all where only slices of it are looked at."""
        argument = next((one for one in body.values() if one.opcode == "parameter" and one.inside == str(index)), None)
        if argument is None:
            return 0.0
        total = 0.0
        for user in body.values():
            for place, name in enumerate(user.operands):
                if name != argument.name:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += user.bytes
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    total += 0.0  # updated in place
                elif user.opcode == "fusion":
                    total += self._read(self.computations[user.called()["calls"]], place)
                else:
                    return argument.bytes
        return total

    def _written(self, body: dict[str, _Instruction], one: _Instruction) -> float:
        """Bytes that a fusion writes: of an update in place, the update."""
        root = next(inner for inner in body.values() if inner.root)
        results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0.0
        for array, result in zip(one.arrays, results, strict=False):
            while result.opcode in ("bitcast", "copy") and result.operands and result.operands[0] in body:
                result = body[result.operands[0]]
            if result.opcode == "dynamic-update-slice" and array.main_bytes:
                total += body[result.operands[1]].bytes
            else:
                total += array.main_bytes
        return total


def _constant(name: str, computation: dict[str, _Instruction]) -> int | None:
    """The whole number that is called `name`, if it is one, copied or not."""
    one = computation[name]
    while one.opcode in ("copy", "bitcast") and one.operands[0] in computation:
        one = computation[one.operands[0]]
    return int(one.inside) if one.opcode == "constant" and one.inside.lstrip("-").isdigit() else None


def _parse(line: str) -> _Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    kind = re.match(r"\s*([\w\-]+)\(", line[end:])
    if kind is None:
        return None
    opened = end + kind.end() - 1
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed - 1]
    arrays = tuple(
        _Array(dtype, tuple(int(size) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(line[at:end])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Instruction(head[2], arrays, kind[1], operands, inside, line[closed:], bool(head[1]))


def _closing(line: str, at: int) -> int:
    """The place after the parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    return len(line)


def _convolution_flops(one: _Instruction, lhs: Sequence[int], rhs: Sequence[int]) -> float:
    """Two for each product that is not with padding. TPUs write batched products as convolutions with much of it."""
    labels = one.attribute("dim_labels", r"[\w?]+_[\w?]+->[\w?]+")
    assert labels is not None
    left, right, result = re.split(r"_|->", labels)
    window = one.attribute("window", r"\{[^}]*\}") or "{}"

    def sizes(name: str, default: str) -> list[list[int]]:
        found = re.search(rf"\b{name}=([\dx_\-]+)", window)
        return [[int(n) for n in part.split("_")] for part in (found[1].split("x") if found else [])] or [
            [int(n) for n in default.split("_")]
        ] * sum(label.isdigit() for label in result)

    products = 1.0
    for axis, (stride, pad, stretch, gaps) in enumerate(
        zip(sizes("stride", "1"), sizes("pad", "0_0"), sizes("lhs_dilate", "1"), sizes("rhs_dilate", "1"), strict=True)
    ):
        label = str(axis)
        out, kernel, size = (
            one.arrays[0].shape[result.index(label)], rhs[right.index(label)], lhs[left.index(label)]
        )  # fmt: skip
        place = np.arange(out)[:, None] * stride[0] - pad[0] + np.arange(kernel) * gaps[0]
        inside = (place >= 0) & (place <= (size - 1) * stretch[0]) & (place % stretch[0] == 0)
        products *= float(inside.sum())
    features = rhs[right.index("i")] * rhs[right.index("o")]
    batch = one.arrays[0].shape[result.index("b")]
    return 2.0 * products * features * batch


def _exchange(one: _Instruction, slices: int, computation: str) -> tuple[str, float, bool] | None:
    """Kind, bytes that each device sends, and whether they leave the slice; None of what is no exchange."""
    if one.opcode == "send" and "megascale" in one.rest:
        kind = (
            (one.attribute("_xla_megascale_transfer_type", r'"\w+"') or '"SEND"').strip('"').lower().replace("_", "-")
        )
        size = one.arrays[0].bytes
        return kind, size * (2 * (slices - 1) / slices if kind == "all-reduce" else 1), True
    kind = one.opcode.removesuffix("-start")
    if kind not in _KINDS or one.opcode.endswith("-done"):
        return None
    arrays = [array for array in one.arrays if array.shape or kind == "all-reduce"]
    if one.opcode.endswith("-start") and kind != "all-reduce":  # the operands stand before the results
        arrays = arrays[len(arrays) // 2 :]
    size, group = sum(array.bytes for array in arrays), _group_size(one)
    others = group - 1
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a fusion that keeps only one part
        return "reduce-scatter", size * others / group, False
    return (
        kind,
        {
            "all-reduce": 2 * size * others / group,
            "all-gather": size * others / group,
            "reduce-scatter": size * others,
            "collective-permute": size,
        }.get(kind, size * others / group),
        False,
    )


def _group_size(one: _Instruction) -> int:
    """How many devices exchange with each other, by any of the notations for groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", one.rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", one.rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else axes[name] for name, part in parts)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", one.rest):
        return found[1].count(",") + 1
    return 2
