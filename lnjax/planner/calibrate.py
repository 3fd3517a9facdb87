"""The planner against this machine: predictions for three small learners from two calibrated constants, then their runs.

Memory comes from compiling for abstract arrays, as for GPUs. Time is a step's FLOPs at one rate plus its program's traffic at
another. Both rates are what four reference learners, none of them a checked one, reach: a bare matmul and a bare copy say
little about a step whose arrays partly stay in cache. References and checked runs take turns, so a slow minute meets all.
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
from lnjax.errors import PlanError
from lnjax.mesh import make_mesh, put_rows
from lnjax.planner.collectives import traffic
from lnjax.planner.compiled import Job, compile_job
from lnjax.planner.counts import flops_per_token, num_params
from lnjax.planner.hardware import H100
from lnjax.schema import MeshConfig, RunConfig, uniform_blocks
from lnjax.types import PackedBatch

ROUNDS, SECONDS = 4, 0.5
"""Turns of each learner, and the least time of one."""
MEMORY_MARGIN, TIME_MARGIN = 0.10, 0.25


def quickstart() -> RunConfig:
    return dataclasses.replace(load_config("quickstart"), mesh=MeshConfig(fsdp=1))


def llama(
    name: str, *, layers: int, width: int, heads: int, kv: int, ffn: int, vocab: int, rows: int, row_tokens: int
) -> RunConfig:
    """The quickstart's SFT with another model and batch."""
    quick = quickstart()
    assert quick.sft and quick.model.spec
    spec = dataclasses.replace(
        quick.model.spec,
        vocab_size=vocab,
        d_model=width,
        num_heads=heads,
        head_dim=64,
        blocks=uniform_blocks(num_layers=layers, num_kv_heads=kv, ffn=ffn),
        num_source_layers=layers,
        max_position=row_tokens,
    )
    pack = dataclasses.replace(quick.sft.pack, row_tokens=row_tokens, microbatch_rows=rows)
    part = dataclasses.replace(quick.sft, batch_rows=rows, pack=pack)
    return dataclasses.replace(quick, name=name, model=dataclasses.replace(quick.model, spec=spec), sft=part)


def references() -> list[RunConfig]:
    """One far along each axis that the checked ones differ in."""
    return [
        llama("narrow", layers=4, width=256, heads=4, kv=2, ffn=768, vocab=4096, rows=4, row_tokens=256),
        llama("deep", layers=16, width=320, heads=5, kv=5, ffn=896, vocab=2048, rows=4, row_tokens=128),
        llama("wide", layers=2, width=1024, heads=16, kv=8, ffn=2816, vocab=1024, rows=4, row_tokens=256),
        llama("long", layers=4, width=512, heads=8, kv=4, ffn=1408, vocab=8192, rows=1, row_tokens=1024),
    ]


def checked() -> list[RunConfig]:
    """The quickstart's SFT, a Llama of 13 M parameters and six layers of SmolLM2-135M."""
    return [
        quickstart(),
        llama("llama_13m", layers=6, width=384, heads=6, kv=2, ffn=1024, vocab=8192, rows=2, row_tokens=512),
        llama("smollm2_6layers", layers=6, width=576, heads=9, kv=3, ffn=1536, vocab=49152, rows=1, row_tokens=512),
    ]


def flops(c: RunConfig) -> float:
    """Of a step. Masked scores are made too, hence twice the causal context."""
    assert c.sft and c.model.spec
    tokens = c.sft.pack.microbatch_rows * c.sft.pack.row_tokens
    return tokens * flops_per_token(c.model.spec, context=2 * c.sft.pack.row_tokens)


def predict(c: RunConfig) -> tuple[int, float]:
    """(bytes, traffic) of a step, from compiling for arrays that are not there."""
    assert c.model.spec
    done = compile_job(Job(config=c, stage="sft", spec=c.model.spec, hw=H100, accumulate=False), jax.devices()[:1])
    gradient, apply = done.programs
    peak = max(gradient.peak_bytes + done.state_bytes["optimizer"], apply.peak_bytes)
    return peak, gradient.traffic + apply.traffic


class Learner:
    """The SFT step of a config on one device, its traffic and its bytes: arrays that are there, XLA's temporaries."""

    def __init__(self, c: RunConfig):
        assert c.sft and c.model.spec
        pack, dtype, mesh = c.sft.pack, jnp.dtype(c.model.param_dtype), make_mesh(c.mesh, devices=jax.devices()[:1])
        model = build_model(c, spec=c.model.spec, mesh=mesh)
        updater = sft.build_updater(model, c.sft, dtype=dtype)
        before = {id(x) for x in jax.live_arrays()}
        self._state = updater.init(model.init_params(jax.random.key(0), dtype=dtype), step=0, rng=jax.random.key(1))
        shape = (pack.microbatch_rows, pack.row_tokens)
        ids: Any = np.random.default_rng(0).integers(0, c.model.spec.vocab_size, shape).astype(np.int32)
        positions: Any = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = PackedBatch(ids, positions, np.ones_like(ids), (positions > 0).astype(np.float32))
        self._batch = put_rows(mesh, batch)
        lowered = updater.lower(
            self._state, updater.abstract_gradient(self._batch), self._batch, accumulate=False
        ).values()
        self._gradient, self._apply = programs = [x.compile() for x in lowered]
        found = self._gradient(self._state.params, self._batch)
        resident = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
        self.bytes = resident + max(x.memory_analysis().temp_size_in_bytes for x in programs)
        del found
        self.traffic = sum(traffic(x.as_text()) for x in programs)
        self._taken: list[float] = []
        self._step()

    def _step(self) -> float:
        start = time.perf_counter()
        found = self._gradient(self._state.params, self._batch)
        self._state, stats = self._apply(self._state, *found)
        jax.block_until_ready((self._state, stats))
        return time.perf_counter() - start

    def turn(self) -> None:
        spent = 0.0
        while spent < SECONDS:
            self._taken.append(self._step())
            spent += self._taken[-1]

    @property
    def seconds(self) -> float:
        return statistics.median(self._taken)


def calibrate(console: Console, *, note: Callable[[str], None]) -> dict[str, Any]:
    """Print predicted and measured; `fits` is whether all are within the margins."""
    known, asked = references(), checked()
    learners: list[Learner] = []
    predicted = []
    for c in [*known, *asked]:
        note(f"compiling {c.name}")
        if c in asked:
            predicted.append(predict(c))
        learners.append(Learner(c))
    for i in range(ROUNDS):
        note(f"timing: round {i + 1} of {ROUNDS}")
        for x in learners:
            x.turn()
    # seconds a FLOP and seconds a byte: least squares of relative errors
    work = [[flops(c) / x.seconds, x.traffic / x.seconds] for c, x in zip(known, learners, strict=False)]
    cost = np.linalg.lstsq(np.array(work), np.ones(len(work)))[0]
    if min(cost) <= 0:
        raise PlanError("the reference learners' times fit no two rates; is the machine busy?")
    gemm, memory = (1 / float(x) for x in cost)
    console.print(
        f"calibrated on {', '.join(c.name for c in known)}: {gemm / 1e9:.0f} GFLOP/s, {memory / 1e9:.1f} GB/s",
        highlight=False,
    )
    table = Table("run", "size", "MB", "ran", "off by", "ms", "measured", "off by")
    runs, within = [], True
    for c, (size, moved), x in zip(asked, predicted, learners[len(known) :], strict=True):
        assert c.model.spec
        row = {
            "name": c.name,
            "parameters": num_params(c.model.spec),
            "predicted_bytes": size,
            "measured_bytes": x.bytes,
            "predicted_seconds": float(cost @ [flops(c), moved]),
            "measured_seconds": x.seconds,
        }
        runs.append(row)
        off = {k: row[f"predicted_{k}"] / row[f"measured_{k}"] - 1 for k in ("bytes", "seconds")}
        within &= abs(off["bytes"]) <= MEMORY_MARGIN and abs(off["seconds"]) <= TIME_MARGIN
        table.add_row(
            c.name,
            f"{row['parameters'] / 1e6:.1f} M",
            f"{size / 1e6:.2f}",
            f"{x.bytes / 1e6:.2f}",
            f"{off['bytes']:+.1%}",
            f"{row['predicted_seconds'] * 1e3:.0f}",
            f"{x.seconds * 1e3:.0f}",
            f"{off['seconds']:+.0%}",
        )
    console.print(table)
    console.print(
        f"margins: memory {MEMORY_MARGIN:.0%}, step time {TIME_MARGIN:.0%}: {'held' if within else 'not held'}"
    )
    return {"gemm_flops": gemm, "memory_bytes_per_s": memory, "runs": runs, "fits": within}
