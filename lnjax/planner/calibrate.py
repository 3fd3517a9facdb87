"""The planner against this machine: predictions for three small learners from two calibrated constants, then their runs.

Memory comes from compiling for abstract arrays, as for GPUs. Time is a step's FLOPs at one rate plus its program's traffic at
another. Both rates are what four reference learners, none of them a checked one, reach: a bare matmul and a bare copy say
little about a step whose arrays partly stay in cache. References and checked runs take turns, so a slow minute meets all.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
from lnjax.models.decoder import UNROLL
from lnjax.ops.attention import BLOCK_SERIAL
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
    return replace(load_config("quickstart"), mesh=MeshConfig(fsdp=1))


def llama(name: str, *, shape: tuple[int, int, int, int, int], vocab: int, rows: tuple[int, int]) -> RunConfig:
    """The quickstart's SFT with another model and batch. Shape: layers, width, heads, kv heads, ffn. Rows: how many, tokens."""
    quick, (layers, width, heads, kv, ffn) = quickstart(), shape
    assert quick.sft and quick.model.spec
    blocks = uniform_blocks(num_layers=layers, num_kv_heads=kv, ffn=ffn)
    spec = replace(
        quick.model.spec, vocab_size=vocab, d_model=width, num_heads=heads, head_dim=width // heads, blocks=blocks
    )
    spec = replace(spec, num_source_layers=layers, max_position=rows[1])
    pack = replace(quick.sft.pack, microbatch_rows=rows[0], row_tokens=rows[1])
    part = replace(quick.sft, batch_rows=rows[0], pack=pack)
    return replace(quick, name=name, model=replace(quick.model, spec=spec), sft=part)


def references() -> list[RunConfig]:
    """One far along each axis that the checked ones differ in."""
    return [
        llama("narrow", shape=(4, 192, 6, 3, 512), vocab=512, rows=(16, 128)),
        llama("deep", shape=(16, 320, 5, 5, 896), vocab=2048, rows=(4, 128)),
        llama("wide", shape=(2, 1024, 16, 8, 2816), vocab=1024, rows=(4, 256)),
        llama("long", shape=(4, 512, 8, 4, 1408), vocab=8192, rows=(1, 1024)),
    ]


def checked() -> list[RunConfig]:
    """The quickstart's SFT, a Llama of 13 M parameters and six layers of SmolLM2-135M."""
    return [
        quickstart(),
        llama("llama_13m", shape=(6, 384, 6, 2, 1024), vocab=8192, rows=(2, 512)),
        llama("smollm2_6layers", shape=(6, 576, 9, 3, 1536), vocab=49152, rows=(1, 512)),
    ]


def flops(c: RunConfig) -> float:
    """Of a step. Every query meets the keys of its own tile and of those before."""
    assert c.sft and c.model.spec
    tokens = c.sft.pack.microbatch_rows * c.sft.pack.row_tokens
    return tokens * flops_per_token(c.model.spec, context=c.sft.pack.row_tokens + BLOCK_SERIAL)


def predict(c: RunConfig) -> tuple[int, float]:
    """(bytes, traffic) of a step, from compiling for arrays that are not there."""
    assert c.model.spec
    done = compile_job(Job(config=c, stage="sft", spec=c.model.spec, hw=H100, accumulate=False), jax.devices()[:1])
    gradient, apply = done.programs
    view = done.state_bytes["parameters"] if UNROLL["cpu"] > 1 else 0
    peak = max(gradient.peak_bytes + done.state_bytes["optimizer"] + view, apply.peak_bytes)
    return peak, gradient.traffic + apply.traffic + 2 * view


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
        so_far = updater.abstract_gradient(self._batch)
        lowered = updater.lower(self._state, so_far, self._batch, accumulate=False)
        self._gradient, self._apply = programs = [x.compile() for x in lowered.values()]
        self._view, resident = updater.view, []
        given = self._view(self._state.params)
        found = self._gradient(given, {}, self._batch)
        for _ in programs:
            resident.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
            given = None  # before the second one
        temporary = [x.memory_analysis().temp_size_in_bytes for x in programs]
        self.bytes = max(map(sum, zip(resident, temporary, strict=True)))
        view = resident[0] - resident[1]
        self.traffic = sum(traffic(x.as_text()) for x in programs) + 2 * view
        del found
        self.taken: list[float] = []

    def turn(self) -> None:
        """Steps for a while, their seconds at the end of `taken`."""
        end = time.perf_counter() + SECONDS
        while (start := time.perf_counter()) < end:
            found = self._gradient(self._view(self._state.params), {}, self._batch)
            self._state, stats = self._apply(self._state, *found)
            jax.block_until_ready((self._state, stats))
            self.taken.append(time.perf_counter() - start)


def calibrate(console: Console, *, note: Callable[[str], None]) -> dict[str, Any]:
    """Print predicted and measured; `fits` is whether all are within the margins."""
    known, asked = references(), checked()
    learners, predicted = [], []
    for c in [*known, *asked]:
        note(f"compiling {c.name}")
        predicted += [predict(c)] * (c in asked)
        learners.append(Learner(c))
        learners[-1].turn()
        learners[-1].taken.clear()
    for i in range(ROUNDS):
        note(f"timing: round {i + 1} of {ROUNDS}")
        for x in learners:
            x.turn()
    took = [statistics.median(x.taken) for x in learners]
    # seconds a FLOP and seconds a byte: least squares of relative errors
    work = [[flops(c) / t, x.traffic / t] for c, x, t in zip(known, learners, took, strict=False)]
    cost = np.linalg.lstsq(np.array(work), np.ones(len(work)))[0]
    if min(cost) <= 0:
        raise PlanError("the reference learners' times fit no two rates; is the machine busy?")
    gemm, memory = (1 / float(x) for x in cost)
    names = ", ".join(c.name for c in known)
    console.print(f"calibrated on {names}: {gemm / 1e9:.0f} GFLOP/s, {memory / 1e9:.1f} GB/s", highlight=False)
    # narrow enough for 80 columns, whose last one is what was asked
    table = Table("run", "size", "MB planned", "ran", "off by", "ms modelled", "ran", "off by", box=None)
    runs, within = [], True
    for c, (size, moved), x, t in zip(asked, predicted, learners[len(known) :], took[len(known) :], strict=True):
        assert c.model.spec
        run: dict[str, Any] = {"name": c.name, "parameters": num_params(c.model.spec)}
        run |= {"predicted_bytes": size, "measured_bytes": x.bytes}
        run |= {"predicted_seconds": float(cost @ [flops(c), moved]), "measured_seconds": t}
        runs.append(run)
        cells = [c.name, f"{run['parameters'] / 1e6:.1f} M"]
        for key, unit, margin in (("bytes", 1e-6, MEMORY_MARGIN), ("seconds", 1e3, TIME_MARGIN)):
            said, found = run[f"predicted_{key}"], run[f"measured_{key}"]
            within &= abs(said / found - 1) <= margin
            cells += [f"{said * unit:,.0f}", f"{found * unit:,.0f}", f"{said / found - 1:+.1%}"]
        table.add_row(*cells)
    console.print(table)
    held = "held" if within else "not held"
    console.print(f"margins: memory {MEMORY_MARGIN:.0%}, step time {TIME_MARGIN:.0%}: {held}")
    return {"gemm_flops": gemm, "memory_bytes_per_s": memory, "runs": runs, "fits": within}
