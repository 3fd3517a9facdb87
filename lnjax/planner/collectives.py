"""Collectives of a compiled program, read from its HLO text. Imports no jax."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
OPERATION = re.compile(rf"%(\S+) = (.+?) ({KINDS})(-start)?\(")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5}
MADE = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.+?) ([\w-]+)\(")
NO_TRAFFIC = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "dynamic-update-slice"}
SMALL = 2**20
"""Bytes below which nothing is worth a complaint: norms, scalars, tokens."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One operation of the program."""

    kind: str
    name: str
    op_name: str
    """Where in the source's trace it comes from."""
    group: int
    """Devices that take part together."""
    axes: str
    """Mesh axes of the group, where the program names them."""
    dtype: str
    num_bytes: float
    """What one device gets (gather), gives (scatter) or reduces, each time."""
    largest: float
    """Bytes of the largest single array."""
    times: int
    """How often a run of the program does it."""


def read_collectives(text: str) -> list[Collective]:
    """All collectives, those in loops with the number of trips."""
    lines, times = _computations(text)
    return [c for name, body in lines.items() if times[name] for line in body for c in _read(line, times[name])]


def traffic(text: str) -> float:
    """Bytes that go through memory: every array that is made, written once and read twice. Updates in place are left out."""
    lines, times = _computations(text, inside_fusions=False)
    total = 0.0
    for name, body in lines.items():
        for line in body if times[name] else ():
            made = MADE.match(line)
            if made and made[3] not in NO_TRAFFIC and "update-slice" not in made[1]:
                total += times[name] * sum(_bytes(dtype, dims) for dtype, dims in SHAPE.findall(made[2]))
    return 3 * total


def _computations(text: str, *, inside_fusions: bool = True) -> tuple[dict[str, list[str]], dict[str, int]]:
    """(lines of each computation, how often it runs)."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            current = head[2]
            entry = current if head[1] else entry
            lines[current] = []
        elif current and line.startswith("  "):
            lines[current].append(line)
    calls: dict[str, list[tuple[str, int]]] = {
        name: [
            (callee, int(trips[1]) if (trips := TRIPS.search(line)) else 1)
            for line in body
            if inside_fusions or " while(" in line
            for callee in CALLED.findall(line)
            if callee in lines
        ]
        for name, body in lines.items()
    }
    found: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        found[name] += count
        for callee, trips in calls[name]:
            visit(callee, count * trips)

    visit(entry, 1)
    return lines, found


def _read(line: str, times: int) -> Iterator[Collective]:
    match = OPERATION.search(line)
    if not match:
        return
    name, result, kind, start = match.groups()
    arrays = [(dtype, _bytes(dtype, dims)) for dtype, dims in SHAPE.findall(result)]
    if start and result.startswith("(("):  # (operands), results
        half = len(arrays) // 2
        given, got = arrays[:half], arrays[half:]
    else:
        given = got = arrays
    pairs = re.findall(r"(\d+),(\d+)", line.split("source_target_pairs=")[-1].split("}}")[0])
    if kind == "collective-permute" and all(a == b for a, b in pairs):
        return  # every device to itself: a copy
    group, axes = _group(line)
    sizes = given if kind == "reduce-scatter" and start else got
    scale = group if kind == "reduce-scatter" and not start else 1
    where = re.search(r'op_name="([^"]*)"', line)
    yield Collective(
        kind=kind,
        name=name,
        op_name=where[1] if where else "",
        group=group,
        axes=axes,
        dtype=sizes[0][0] if sizes else "",
        num_bytes=scale * sum(s for _, s in sizes),
        largest=scale * max((s for _, s in sizes), default=0.0),
        times=times,
    )


def _bytes(dtype: str, dims: str) -> float:
    bits = re.search(r"\d+", dtype)
    size = SIZES.get(dtype, int(bits[0]) / 8 if bits else 4)
    return size * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str) -> tuple[int, str]:
    """(devices of one group, names of its mesh axes) in the three ways XLA prints them."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = [a for a in re.findall(r"'(\w+)'", named[2]) if sizes.get(a, 1) > 1]
        return math.prod(sizes[a] for a in axes), "+".join(axes)
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if counted:
        return int(counted[2]), ""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return (len(listed[1].split(",")) if listed else 1), ""


def unexpected(found: list[Collective], *, gather_limit: float, compute_dtype: str) -> list[str]:
    """What no layout should need, one line each. `gather_limit`: bytes of the largest gathered array that is expected."""
    problems = []
    for c in found:
        if c.kind != "all-gather" or c.largest <= SMALL:
            continue
        what = f"{c.name} ({c.op_name}) gathers {c.largest / 2**20:,.0f} MiB of {c.dtype} over {c.group} devices"
        if c.largest > gather_limit:
            problems.append(f"{what}: more than the largest kernel or activation, {gather_limit / 2**20:,.0f} MiB")
        elif c.dtype == "f32" and compute_dtype == "bfloat16":
            problems.append(f"{what}: it should move as bf16")
    return problems


def summarise(found: list[Collective]) -> list[dict[str, object]]:
    """Bytes and counts by kind, group and axes."""
    rows: dict[tuple[str, int, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for c in found:
        row = rows[c.kind, c.group, c.axes]
        row[0] += c.times
        row[1] += c.times * c.num_bytes
    return [
        {"kind": kind, "group": group, "axes": axes, "count": int(count), "bytes": size}
        for (kind, group, axes), (count, size) in sorted(rows.items())
    ]
