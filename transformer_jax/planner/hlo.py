"""What a compiled program sends between devices, read from its text.

XLA's cost analysis says nothing of communication, and counts the body of a loop once. The text has
both: every collective with its shape and its group of devices, and every loop with its bound.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
         "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)\}?")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\s*\{"n":"(\d+)"')
_BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


_DEFINED = re.compile(r"%([\w.\-]+) = (.*?) [\w\-]+\(")
_LIBRARY = re.compile(r" = (.*?) custom-call\((.*?)\), custom_call_target=\"__cu(blas|dnn)")
_CONTRACTED = re.compile(r'lhs_contracting_dimensions":\[([^\]]*)\]')


class Collective(NamedTuple):
    """One exchange of a program, as one device sees it."""

    kind: str  # one of `KINDS`
    bytes: int  # of the whole array: gathered, reduced or exchanged
    group: int  # devices that take part together
    count: int  # executions in one run of the program
    source: str  # the `op_name` that XLA gives it

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in all executions, if the group is a ring."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.count)
        ways = 2 if self.kind == "all-reduce" else 1  # a reduce-scatter, then an all-gather
        return ways * self.bytes * (self.group - 1) / self.group * self.count


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`).

    Loops count as often as they run, which is what their condition compares with: programs of
    `jax.lax.scan`, not loops that end on their data. The pieces into which a TPU cuts one
    asynchronous exchange, which share a channel, are counted once.
    """
    bodies, entry = _computations(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    everyone = int(devices[1]) if devices else 1
    times = _executions(bodies, entry)
    found: dict[object, Collective] = {}
    for name, lines in bodies.items():
        for i, line in enumerate(lines):
            if times[name] and (match := _COLLECTIVE.search(line)):
                made = _read(line, match, times[name], "reduce-scatter" in name, everyone)
                channel = re.search(r"channel_id=(\d+)", line)
                key = (made.kind, channel[1]) if channel else (name, i)
                if key not in found or made.count > found[key].count:
                    found[key] = made
    return list(found.values())


def library_calls(text: str) -> tuple[float, float]:
    """FLOPs of products that a GPU program leaves to cuBLAS, and bytes that these and calls of
    cuDNN read and write: XLA's cost analysis knows neither."""
    bodies, entry = _computations(text)
    times = _executions(bodies, entry)
    flops = moved = 0.0
    for name, lines in bodies.items():
        shapes = {match[1]: _SHAPE.findall(match[2])
                  for line in lines if (match := _DEFINED.search(line))}
        for line in lines:
            if not (times[name] and (match := _LIBRARY.search(line))):
                continue
            # Beside a result in bytes, the scratch space.
            results = [shape for shape in _SHAPE.findall(match[1]) if shape[0] != "s8"]
            operands = [shapes.get(operand, []) for operand in re.findall(r"%([\w.\-]+)", match[2])]
            sizes = [_bytes(*shape) for group in (results, *operands) for shape in group]
            moved += sum(sizes) * times[name]
            if match[3] == "blas":
                contracted = re.findall(r"\d+", _CONTRACTED.search(line)[1])
                left = [int(n) for n in operands[0][0][1].split(",")]
                outputs = math.prod(int(n) for n in results[0][1].split(","))
                flops += 2 * outputs * math.prod(left[int(i)] for i in contracted) * times[name]
    return flops, moved


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _HEADER.match(line):
            current = bodies.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def _executions(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            if match := _WHILE.search(line):
                visit(match[2], count * _trips(line, bodies.get(match[1], ())))
            for called in _CALLED.findall(line):
                for one in called.split(","):
                    visit(one.strip().lstrip("%"), count)

    visit(entry, 1)
    return times


def _trips(line: str, condition: list[str]) -> int:
    if match := _TRIPS.search(line):
        return int(match[1])
    bounds = [int(match[1]) for text in condition if (match := _BOUND.search(text))]
    return max(bounds, default=1)


def _read(
    line: str, match: re.Match, count: int, scattered: bool, everyone: int
) -> Collective:
    kind = match[2]
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(match[1]) if shape[1] or not match[3]]
    if match[3] and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # a start gives its operands, then its results
    size = sum(sizes)
    group = _group(line, everyone)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and scattered:  # A TPU's fusion of the two, of which a part is kept.
        kind = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, int(size), group, count, source[1] if source else "")


def _bytes(dtype: str, shape: str) -> float:
    return BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


def _group(line: str, everyone: int = 1) -> int:
    """Devices in each replica group, in any of the ways XLA writes them; `everyone` for none."""
    if "replica_groups={}" in line:
        return everyone
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1
