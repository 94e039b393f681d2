"""Collective communication volume and library-call costs of a compiled program, from its HLO text.

XLA's cost analysis does not include communication, and it counts the body of a loop once.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# HLO dtype -> bytes per element.
DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)\}?")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count":\s*\{"n":"(\d+)"')
_LOOP_BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")

_ASSIGNMENT = re.compile(r"%([\w.\-]+) = (.*?) [\w\-]+\(")
_LIBRARY_CALL = re.compile(r" = (.*?) custom-call\((.*?)\), custom_call_target=\"__cu(blas|dnn)")
_CONTRACTING_AXES = re.compile(r'lhs_contracting_dimensions":\[([^\]]*)\]')


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
        kind: one of `COLLECTIVES`.
        array_bytes: size in bytes of the full array that is gathered, reduced or exchanged.
        group_size: number of devices in each replica group.
        num_executions: number of executions in one run of the program; more than 1 in a loop.
        op_name: the `op_name` of its HLO metadata.
    """

    kind: str
    array_bytes: int
    group_size: int
    num_executions: int
    op_name: str

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in all executions, with a ring algorithm.

        Example:
            >>> Collective("all-gather", 1024, 4, 1, "").bytes_sent
            768.0
        """
        if self.kind == "collective-permute":
            return float(self.array_bytes * self.num_executions)
        passes = 2 if self.kind == "all-reduce" else 1  # a reduce-scatter, then an all-gather
        return (passes * self.array_bytes * (self.group_size - 1) / self.group_size
                * self.num_executions)


def parse_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, given `compiled.as_text()`.

    The trip count of a loop is the one that XLA has written into the text, or else the bound in the
    condition of the loop. That bound is correct for `jax.lax.scan`, but not for loops whose trip
    count depends on data. A TPU program may split one asynchronous collective into several
    operations with the same channel id; they are counted as one.

    Example:
        >>> parse_collectives('''ENTRY %main (x: f32[8]) -> f32[8] {
        ...   %y = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
        ... }''')
        [Collective(kind='all-reduce', array_bytes=32, group_size=2, num_executions=1, op_name='')]
    """
    computations, entry = _parse_computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    num_devices = int(partitions[1]) if partitions else 1
    num_executions = _count_executions(computations, entry)
    found: dict[object, Collective] = {}
    for name, lines in computations.items():
        for i, line in enumerate(lines):
            if num_executions[name] and (match := _COLLECTIVE.search(line)):
                collective = _parse_collective(
                    line, match, num_executions[name], "reduce-scatter" in name, num_devices)
                channel = re.search(r"channel_id=(\d+)", line)
                key = (collective.kind, channel[1]) if channel else (name, i)
                if key not in found or collective.num_executions > found[key].num_executions:
                    found[key] = collective
    return list(found.values())


def library_call_costs(text: str) -> tuple[float, float]:
    """(FLOPs of cuBLAS calls, bytes read and written by cuBLAS and cuDNN calls) of a GPU program.

    XLA's cost analysis omits these calls.
    """
    computations, entry = _parse_computations(text)
    num_executions = _count_executions(computations, entry)
    flops = bytes_accessed = 0.0
    for name, lines in computations.items():
        shapes = {match[1]: _SHAPE.findall(match[2])
                  for line in lines if (match := _ASSIGNMENT.search(line))}
        for line in lines:
            if not (num_executions[name] and (match := _LIBRARY_CALL.search(line))):
                continue
            # A result of dtype s8 is scratch space.
            results = [shape for shape in _SHAPE.findall(match[1]) if shape[0] != "s8"]
            operands = [shapes.get(operand, []) for operand in re.findall(r"%([\w.\-]+)", match[2])]
            sizes = [_num_bytes(*shape) for group in (results, *operands) for shape in group]
            bytes_accessed += sum(sizes) * num_executions[name]
            if match[3] == "blas":
                axes = re.findall(r"\d+", _CONTRACTING_AXES.search(line)[1])
                lhs_shape = [int(n) for n in operands[0][0][1].split(",")]
                output_size = math.prod(int(n) for n in results[0][1].split(","))
                contracted_size = math.prod(lhs_shape[int(i)] for i in axes)
                flops += 2 * output_size * contracted_size * num_executions[name]
    return flops, bytes_accessed


def _parse_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Splits HLO text into (computation -> its lines, name of the entry computation)."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _count_executions(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Computation -> number of executions in one run of the program."""
    num_executions: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        num_executions[name] += count
        for line in computations.get(name, ()):
            if match := _WHILE.search(line):
                visit(match[2], count * _trip_count(line, computations.get(match[1], ())))
            for names in _CALLED.findall(line):
                for called in names.split(","):
                    visit(called.strip().lstrip("%"), count)

    visit(entry, 1)
    return num_executions


def _trip_count(line: str, condition: list[str]) -> int:
    """Trip count of a while loop, given the line of the loop and the lines of its condition."""
    if match := _TRIP_COUNT.search(line):
        return int(match[1])
    bounds = [int(match[1]) for text in condition if (match := _LOOP_BOUND.search(text))]
    return max(bounds, default=1)


def _parse_collective(
    line: str, match: re.Match, num_executions: int, is_reduce_scatter_fusion: bool,
    num_devices: int,
) -> Collective:
    """Parses a line that matches `_COLLECTIVE`."""
    kind = match[2]
    sizes = [_num_bytes(*shape) for shape in _SHAPE.findall(match[1]) if shape[1] or not match[3]]
    if match[3] and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # the type of a "-start" lists operands, then results
    size = sum(sizes)
    group_size = _group_size(line, num_devices)
    if kind == "reduce-scatter":
        size *= group_size
    # On TPUs a reduce-scatter is a fusion of an all-reduce and a slice of its result.
    if kind == "all-reduce" and is_reduce_scatter_fusion:
        kind = "reduce-scatter"
    op_name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, int(size), group_size, num_executions, op_name[1] if op_name else "")


def _num_bytes(dtype: str, shape: str) -> float:
    return DTYPE_BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


def _group_size(line: str, num_devices: int = 1) -> int:
    """Number of devices in each replica group, in any notation of XLA; {} is one group of all
    devices.
    """
    if "replica_groups={}" in line:
        return num_devices
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1
