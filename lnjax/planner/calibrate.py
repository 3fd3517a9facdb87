"""The planner against this machine: predictions for three small runs from two measured constants, then the runs.

Memory comes from compiling for abstract arrays, as for GPUs. Time is FLOPs at the rate of one measured matmul plus the
program's traffic at the rate of one measured copy; what neither describes (dispatch, exponentials) shows as error.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from lnjax import sft
from lnjax.build import build_model
from lnjax.config import load_config
from lnjax.mesh import make_mesh, put_rows
from lnjax.planner.compiled import Job, compile_job
from lnjax.planner.costs import RECOMPUTED
from lnjax.planner.counts import flops_per_token, num_params
from lnjax.planner.hardware import H100
from lnjax.schema import MeshConfig, ModelSpec, RunConfig, uniform_blocks
from lnjax.types import PackedBatch

MATMUL = 1024
COPY = 2**25
REPEATS = 5
MEMORY_MARGIN, TIME_MARGIN = 0.10, 0.25


def runs() -> list[RunConfig]:
    """A tiny SFT, the quickstart's SFT, and a Llama of 10 M parameters."""
    quick = dataclasses.replace(load_config("quickstart"), grpo=None, eval=None)
    assert quick.sft and quick.model.spec
    spec = dataclasses.replace(
        quick.model.spec,
        d_model=384,
        num_heads=6,
        head_dim=64,
        blocks=uniform_blocks(num_layers=6, num_kv_heads=2, ffn=1024),
        num_source_layers=6,
    )
    rows = dataclasses.replace(quick.sft, batch_rows=8, pack=dataclasses.replace(quick.sft.pack, microbatch_rows=8))
    large = dataclasses.replace(quick, name="llama_10m", model=dataclasses.replace(quick.model, spec=spec), sft=rows)
    return [dataclasses.replace(load_config("tiny_sft"), grpo=None), quick, large]


def calibrate(console: Console) -> dict[str, Any]:
    """Print predicted and measured; `fits` is whether all are within the margins."""
    x = jnp.ones((MATMUL, MATMUL), jnp.float32)
    matmul = 2 * MATMUL**3 / _seconds(jax.jit(lambda x: x @ x), x)
    copy = 2 * 4 * COPY / _seconds(jax.jit(lambda x: x + 1.0), jnp.ones((COPY,), jnp.float32))
    console.print(f"measured: matmul {matmul / 1e9:.1f} GFLOP/s, copy {copy / 1e9:.1f} GB/s", highlight=False)
    table = Table(
        "run", "parameters", "MB predicted", "MB of what ran", "off by", "ms predicted", "ms measured", "off by"
    )
    found = []
    for c in runs():
        row = _compare(c, matmul=matmul, copy=copy)
        found.append(row)
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['predicted_bytes'] / 1e6:.2f} \\[compiled]",
            f"{row['measured_bytes'] / 1e6:.2f}",
            _off(row["predicted_bytes"], row["measured_bytes"], MEMORY_MARGIN),
            f"{row['predicted_seconds'] * 1e3:.1f} \\[modelled]",
            f"{row['measured_seconds'] * 1e3:.1f}",
            _off(row["predicted_seconds"], row["measured_seconds"], TIME_MARGIN),
        )
    console.print(table)
    within = all(
        abs(r[f"predicted_{k}"] / r[f"measured_{k}"] - 1) <= margin
        for r in found
        for k, margin in (("bytes", MEMORY_MARGIN), ("seconds", TIME_MARGIN))
    )
    console.print(
        f"margins: memory {MEMORY_MARGIN:.0%}, step time {TIME_MARGIN:.0%}: {'held' if within else 'not held'}"
    )
    return {"matmul_flops": matmul, "copy_bytes_per_s": copy, "runs": found, "fits": within}


def _off(predicted: float, measured: float, margin: float) -> str:
    off = predicted / measured - 1
    return f"{off:+.0%}" if abs(off) <= margin else f"[bold red]{off:+.0%}[/bold red]"


def _seconds(f: Callable[..., Any], *args: Any) -> float:
    """Median of a few calls after the first."""
    jax.block_until_ready(f(*args))
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _compare(c: RunConfig, *, matmul: float, copy: float) -> dict[str, Any]:
    assert c.sft and c.model.spec
    spec, pack = c.model.spec, c.sft.pack
    c = dataclasses.replace(c, mesh=MeshConfig(fsdp=1))
    done = compile_job(Job(config=c, stage="sft", spec=spec, hw=H100, accumulate=False), jax.devices()[:1])
    gradient, apply = done.programs
    tokens = pack.microbatch_rows * pack.row_tokens
    again = 1 + RECOMPUTED[c.model.remat] / 3
    predicted = (
        tokens * flops_per_token(spec, context=2 * pack.row_tokens) * again / matmul
    )  # masked scores are made too
    predicted += (gradient.traffic + apply.traffic) / copy
    peak = max(gradient.peak_bytes + done.state_bytes["optimizer"], apply.peak_bytes)
    measured, seconds = _run(c, spec)
    return {
        "name": c.name,
        "parameters": num_params(spec),
        "predicted_bytes": peak,
        "measured_bytes": measured,
        "predicted_seconds": predicted,
        "measured_seconds": seconds,
    }


def _run(c: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """(bytes of the arrays that were there and of XLA's temporaries for the programs that ran, seconds of an update)."""
    assert c.sft
    mesh = make_mesh(c.mesh, devices=jax.devices()[:1])
    model = build_model(c, spec=spec, mesh=mesh)
    updater = sft.build_updater(model, c.sft, dtype=jnp.dtype(c.model.param_dtype))
    before = {id(x) for x in jax.live_arrays()}
    params = model.init_params(jax.random.key(0), dtype=jnp.dtype(c.model.param_dtype))
    state = updater.init(params, step=0, rng=jax.random.key(1))
    shape = (c.sft.pack.microbatch_rows, c.sft.pack.row_tokens)
    tokens: Any = np.random.default_rng(0).integers(0, spec.vocab_size, shape).astype(np.int32)
    positions: Any = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones: Any = np.ones_like(tokens)
    mask: Any = (positions > 0).astype(np.float32)
    batch = put_rows(mesh, PackedBatch(tokens, positions, ones, mask))
    gradient = updater.gradient(state.params, [batch])
    resident = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    programs = updater.lower(state, gradient, batch, accumulate=False)
    memory = {name: lowered.compile().memory_analysis() for name, lowered in programs.items()}
    measured = resident + max(m.temp_size_in_bytes for m in memory.values())
    del gradient
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        state, stats = updater.update(state, [batch])
        jax.block_until_ready((state, stats))
        taken.append(time.perf_counter() - start)
    return measured, statistics.median(taken[1:])
