"""python -m lnjax.bench CASE --shape NAME [--arms default,steelman] [--rounds N] [--json PATH] [--chart PATH]

Times our step beside the PyTorch path's, one after the other, A B A B, on the machine at hand. CASE: sft (ragged
conversations), sft-dense, logprob, decode, grpo (a whole iteration), sync (a new policy in vLLM), packing (what it saves; no
arms), ops. The PyTorch arms run in processes of their own, with the same weights and tokens; they and we must agree on the first
loss and gradient norm (or greedy tokens), else no time is printed. `ratio` is their time over ours.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from lnjax.profile import PROFILING, table

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the arms share the GPU
if (
    __name__ == "__main__"
):  # a CPU as two devices: what XLA runs on one thread, between products, is then done by two cores
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
if "--profile" in sys.argv:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PROFILING}"

import jax

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console

from lnjax.bench.ours import CASES, GREEDY, RATE, Side, Work
from lnjax.bench.shapes import NUM_BATCHES, Shape, shape
from lnjax.errors import ConfigError, LnjaxError
from lnjax.metrics import peak_memory_bytes
from lnjax.ops.select import check_ops
from lnjax.schema import OpsConfig

PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}
"""bf16, dense: the denominator of MFU."""
LOSS_MARGIN = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative, of first losses; ten times as much of gradient norms."""
TOKEN_MARGIN = {"float32": 0.02, "bfloat16": 0.25}
"""Share of greedy tokens that may differ: random weights have near ties."""
MATMUL = {"cpu": 2048, "gpu": 8192}
PROBE_REPEATS = 5
TOLD = (
    *("dtype", "remat", "row_tokens", "microbatch_rows", "padded_rows"),
    *("prompts", "samples", "prompt_tokens", "new_tokens"),
)
"""Fields of the shape that the other side reads."""


class Arm:
    """A PyTorch process. Raises ConfigError, with the end of what it printed, where it ends early."""

    def __init__(self, name: str, *, python: str, case: str, folder: Path, settings: Mapping[str, Any]):
        self.name, self._log = name, folder / f"{name}.log"
        command = [python, str(Path(__file__).with_name("theirs.py")), case, name, str(folder), json.dumps(settings)]
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environ
            )
        self.first = self._read()["first"]

    def seconds(self, item: str, k: int) -> tuple[float, int]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"item": item, "k": k}) + "\n")
        self._process.stdin.flush()
        found = self._read()
        return found["seconds"], found["peak_bytes"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            end = " ".join(self._log.read_text(errors="replace").split())[-1500:]
            raise ConfigError(f"bench: the {self.name} arm ended with status {self._process.wait()}: {end}")
        return json.loads(line)


def arm_names(text: str, *, case: str, python: str) -> list[str]:
    """Raises ConfigError for an arm that the case does not have, or no Python to run it with."""
    names = [] if text == "none" else text.split(",")
    known = {"packing": [], "grpo": ["default"], "decode": ["default", "steelman", "vllm"]}.get(
        case, ["default", "steelman"]
    )
    if other := [name for name in names if name not in known]:
        raise ConfigError(f"bench: {case} has no arm {other[0]!r}; use --arms {','.join(known)} or none")
    if names and shutil.which(python) is None:
        raise ConfigError(f"bench: no {python}; build it with `bash launch/rollout_env.sh`, or give --python")
    return names


def settings_of(s: Shape) -> dict[str, Any]:
    """What the other side must know of the shape."""
    block = s.spec.blocks[0]
    return {
        "num_batches": NUM_BATCHES,
        "rate": RATE,
        "greedy": GREEDY,
        "ffn": block.ffn.width if block.ffn else 0,
        "num_kv_heads": block.attention.num_kv_heads if block.attention else 0,
        **{name: getattr(s.spec, name) for name in ("d_model", "vocab_size", "num_heads", "head_dim")},
        **{name: getattr(s, name) for name in TOLD},
    }


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, dtype: str, arm: str) -> float:
    """Relative difference of the first losses, or the share of other greedy tokens. Raises ConfigError past the margin."""
    if "tokens" in ours:
        pairs = [
            (a, b) for x, y in zip(ours["tokens"], theirs["tokens"], strict=True) for a, b in zip(x, y, strict=True)
        ]
        off = sum(a != b for a, b in pairs) / len(pairs)
        margins = {"greedy tokens": (off, TOKEN_MARGIN[dtype])}
    else:
        found = {name: abs(theirs[name] / ours[name] - 1) for name in ours}
        margins = {name: (x, LOSS_MARGIN[dtype] * (10 if name == "grad_norm" else 1)) for name, x in found.items()}
        off = found.get("loss", 0.0)
    for name, (found_off, margin) in margins.items():
        if not found_off <= margin:
            raise ConfigError(
                f"bench: {arm} does not do the same work: {name} differs by {found_off:.2g} (at most {margin:g}); "
                f"ours {ours}, theirs {theirs}"
            )
    return off


def timed(run: Callable[[int], Any], k: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(k))
    return time.perf_counter() - start


def gemm_probe(dtype: str) -> Callable[[], float]:
    """() -> FLOP/s of one large product by XLA, in this process, now."""
    size = MATMUL[jax.default_backend()]
    x, run = jax.numpy.ones((size, size), dtype), jax.jit(lambda x: x @ x)
    run(x).block_until_ready()
    return lambda: 2 * size**3 / statistics.median(timed(lambda _: run(x), 0) for _ in range(PROBE_REPEATS))


def compare(
    side: Side, arms: Sequence[Arm], *, w: Work, case: str, name: str, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """One row for each item and arm (one without an arm, where there is none), medians over paired rounds."""
    off = {a.name: difference(side.first, a.first, dtype=w.shape.dtype, arm=a.name) for a in arms}
    probe, rows = gemm_probe(w.shape.dtype), []
    for item, run in side.items.items():
        compile_s = {"ours": timed(run, 0), **{a.name: a.seconds(item, 0)[0] for a in arms}}
        taken: dict[str, list[float]] = {key: [] for key in compile_s}
        peaks: dict[str, int] = {}
        rates = []
        for k in range(1, rounds + 1):
            taken["ours"].append(timed(run, k))
            rates.append(probe())  # a machine's speed changes from minute to minute
            for a in arms:
                seconds, peaks[a.name] = a.seconds(item, k)
                taken[a.name].append(seconds)
            console.print(f"{case} {name} {item}: round {k} of {rounds}, " + ", ".join(
                f"{key} {values[-1]:.3g} s" for key, values in taken.items()), highlight=False)  # fmt: skip
        middle = {key: statistics.median(values) for key, values in taken.items()}
        work = side.flops.get(item, [0.0])
        done = [work[k % len(work)] / t for k, t in enumerate(taken["ours"], 1)]
        flops = statistics.median(done)
        peak = next((x for kind, x in PEAK_FLOPS.items() if jax.devices()[0].device_kind.startswith(kind)), None)
        common = {
            "case": case,
            "shape": name,
            "item": item,
            "device": jax.devices()[0].device_kind,
            "matmul": w.ops.matmul,
            "attention": w.ops.attention,
            "ours_s": middle["ours"],
            "ours_spread": [min(taken["ours"]), max(taken["ours"])],
            "ours_first_s": compile_s["ours"],
            "ours_tokens_per_s": side.tokens.get(item, 0.0) / middle["ours"],
            "ours_flops": flops,
            "of_gemm": statistics.median(d / r for d, r in zip(done, rates, strict=True)),
            "mfu": flops / peak if peak else None,
            "ours_peak_bytes": peak_memory_bytes(),
        }
        for key in [a.name for a in arms] or ["none"]:
            pairs = [b / a for a, b in zip(taken["ours"], taken.get(key, taken["ours"]), strict=True)]
            rows.append(common | {
                "arm": key, "ratio": statistics.median(pairs) if arms else None,
                "ratio_spread": [min(pairs), max(pairs)] if arms else None, "theirs_s": middle.get(key),
                "theirs_first_s": compile_s.get(key), "theirs_peak_bytes": peaks.get(key), "loss_difference": off.get(key),
            })  # fmt: skip
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| case | shape | item | arm | ours, s | theirs, s | ratio (spread) | tok/s | TFLOP/s | of GEMM | MFU |"
    lines = [head, "|" + " --- |" * 11]
    for r in rows:
        low, high = r["ratio_spread"] or (0, 0)
        ratio = f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})" if r["ratio"] else ""
        mfu = f"{r['mfu']:.1%}" if r["mfu"] and r["ours_flops"] else ""
        rate, share = (f"{r['ours_flops'] / 1e12:.3g}", f"{r['of_gemm']:.0%}") if r["ours_flops"] else ("", "")
        theirs = f"{r['theirs_s']:.4g}" if r["theirs_s"] else ""
        speed = f"{r['ours_tokens_per_s']:,.0f}" if r["ours_tokens_per_s"] else ""
        lines.append(
            f"| {r['case']} | {r['shape']} | {r['item']} | {r['arm']} | {r['ours_s']:.4g} | {theirs} | {ratio} | "
            f"{speed} | {rate} | {share} | {mfu} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    rows = [r for r in rows if r["ratio"]]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained")
    names = [f"{r['case']} {r['shape']} {r['item']}, {r['arm']}" for r in rows]
    spread = [[r["ratio"] - r["ratio_spread"][0] for r in rows], [r["ratio_spread"][1] - r["ratio"] for r in rows]]
    axis.barh(names, [r["ratio"] for r in rows], xerr=spread, color="#4477aa", ecolor="#999999")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="their time over ours (right of 1: we are faster)", title=rows[0]["device"] if rows else "")
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 for what the user can fix."""
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--arms", help="some of default, steelman, vllm, or none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matmul", choices=("xla", "fp8", "te"), default="xla")
    parser.add_argument("--attention", choices=("xla", "cudnn", "te"), default="cudnn" if on_gpu else "xla")
    parser.add_argument("--remat", choices=("none", "dots", "full"))
    parser.add_argument("--python", default=".venv-rollout/bin/python", help="of the environment with torch")
    parser.add_argument("--profile", type=Path, help="folder for a trace of one of our steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path, help=".svg or .png")
    options = parser.parse_args(argv)
    console, arms, ours = Console(stderr=True, soft_wrap=True), [], contextlib.ExitStack()
    try:
        names = arm_names(
            options.arms or {"grpo": "default", "packing": "none"}.get(options.case, "default,steelman"),
            case=options.case,
            python=options.python,
        )
        ops = OpsConfig(matmul=options.matmul, attention=options.attention)
        check_ops(ops)
        s = shape(options.shape)
        if names and s.lora_rank:
            raise ConfigError(f"bench: {options.shape} trains adapters, which no arm does; use --arms none")
        if options.remat:
            s = dataclasses.replace(s, remat=options.remat)
        with tempfile.TemporaryDirectory(prefix="lnjax-bench-") as folder, ours:
            w = Work(s, ops, Path(folder), dense=options.case == "sft-dense", shared=bool(names))
            side = CASES[options.case](w)
            ours.callback(side.close)
            for name in names:
                console.print(f"starting {name}")
                arms.append(
                    Arm(name, python=options.python, case=options.case, folder=w.folder, settings=settings_of(s))
                )
            if options.profile:
                for item, run in side.items.items():
                    timed(run, 0)
                    with jax.profiler.trace(str(options.profile / item)):
                        timed(run, 1)
                    console.print(table(options.profile / item))
            rows = compare(
                side, arms, w=w, case=options.case, name=options.shape, rounds=options.rounds, console=console
            )
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    finally:
        for arm in arms:
            arm.close()
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.chart:
        draw(rows, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
