"""The learner's real programs, compiled ahead of time for GPUs that are not here; runs in a process of its own.

With jax's CUDA plugin installed, XLA:GPU compiles for the target in `Hardware.target`: buffer assignment, so temporaries are
what they will be. Without it the programs compile for as many virtual CPU devices; then only the arguments are exact.
"""

import contextlib
import importlib.util
import math
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lnjax import grpo, sft
from lnjax.build import build_model
from lnjax.errors import LnjaxError, PlanError
from lnjax.learn.update import Updater
from lnjax.mesh import make_mesh, sharding
from lnjax.models import decoder
from lnjax.ops.cudnn import compile_without_a_gpu
from lnjax.ops.matmul import count_fp8
from lnjax.planner.collectives import Collective, read_collectives, traffic
from lnjax.planner.hardware import Hardware
from lnjax.planner.layout import mesh_sizes
from lnjax.schema import ModelSpec, RunConfig
from lnjax.types import PackedBatch, RlBatch

OPTIONS: dict[str, Any] = {
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,  # its pass crashes beyond some hundred devices
    # Code that never runs need not be fast; buffers do not depend on these.
    "xla_gpu_enable_triton_gemm": False,
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 0,
    "xla_gpu_disable_gpuasm_optimizations": True,
}
REPLICATED = "Involuntary full rematerialization"
"""XLA's warning that it can reshard an array only by making all of it on every device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to compile. `config.mesh` has no -1."""

    config: RunConfig
    stage: str
    spec: ModelSpec
    hw: Hardware
    accumulate: bool
    """More than one microbatch an update: the program that adds to gradients it was given."""

    @property
    def devices(self) -> int:
        return math.prod(mesh_sizes(self.config.mesh).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Bytes are per device."""

    name: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    seconds: float
    collectives: list[Collective]
    traffic: float
    """Bytes of all arrays written and read, in closed form."""
    fp8_products: int
    """Products of two FP8 operands in its text; a loop's body counts once."""
    cudnn_attention: int
    """Calls of cuDNN's attention, forward and backward, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    exact: bool
    """Temporaries are the target's own; else a CPU's."""
    programs: list[Program]
    state_bytes: dict[str, int]
    """One device's parameters, optimizer, gradients and reference."""
    rss_bytes: int
    warnings: list[str]


def has_cuda_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def run_job(job: Job, *, note: Callable[[str], None]) -> Compiled:
    """Compile in a process of its own; `note` gets a line of progress about once a second.

    Raises PlanError where the program does not compile, with the compiler's last words.
    """
    gpus = job.devices
    env = dict(os.environ, JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="1")
    if not has_cuda_plugin():
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={gpus}"
    with tempfile.TemporaryDirectory() as folder:
        task, result, words = (Path(folder) / name for name in ("task", "result", "words"))
        task.write_bytes(pickle.dumps(job))
        with open(words, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(task), str(result)], env=env, stderr=errors
            )
            start = time.monotonic()
            try:
                while process.poll() is None:
                    note(f"compiling the learner for {gpus} GPUs: {time.monotonic() - start:.0f} s")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(1.0)
            finally:
                process.kill()
        said = words.read_text(encoding="utf-8", errors="replace")
        if not result.exists():
            last = [line for line in said.splitlines() if line.strip()][-1:] or [f"exit status {process.returncode}"]
            raise PlanError(f"the learner's program for {gpus} GPUs did not compile: {last[0]}")
        done = pickle.loads(result.read_bytes())
    done.warnings.extend(line.split("] ", 1)[-1] for line in said.splitlines() if REPLICATED in line)
    return done


def target_devices(hw: Hardware, count: int) -> list[Any]:
    """Devices to compile for: the hardware's own, whole nodes of it, or the CPU's virtual ones."""
    if not has_cuda_plugin():
        return jax.devices()[:count]
    nodes, in_node = -(-count // hw.gpus_per_node), min(count, hw.gpus_per_node)
    where = topologies.get_topology_desc(platform="cuda", target_config=hw.target, topology=f"1x{nodes}x{in_node}")
    return list(where.devices)


def abstract_batch(mesh: Any, *, stage: str, rows: int, row_tokens: int) -> Any:
    """One microbatch as put_rows lays it out."""

    def array(dtype: Any, *shape: int) -> Any:
        logical = ("batch",) + (None,) * (len(shape) - 1) if shape else ()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, *logical))

    whole, real = array(jnp.int32, rows, row_tokens), array(jnp.float32, rows, row_tokens)
    packed = PackedBatch(whole, whole, whole, real)
    if stage == "sft":
        return packed
    return RlBatch(packed, real, real, array(jnp.float32, rows), real, real, real, array(jnp.bool_))


def compile_job(job: Job, devices: list[Any]) -> Compiled:
    """The gradient program of one microbatch and the optimizer's, as `Updater` would run them."""
    c = job.config
    mesh = make_mesh(c.mesh, devices=devices)
    if c.ops.attention == "cudnn":
        compile_without_a_gpu()
    model = build_model(c, spec=job.spec, mesh=mesh)
    loop, part = (grpo, c.grpo) if job.stage == "grpo" else (sft, c.sft)
    assert part
    updater: Updater = loop.build_updater(model, part, dtype=jnp.dtype(c.model.param_dtype))
    state = updater.abstract_state()
    batch = abstract_batch(mesh, stage=job.stage, rows=part.pack.microbatch_rows, row_tokens=part.pack.row_tokens)
    frozen = model.abstract_frozen()
    grads = updater.abstract_gradient(batch, frozen)
    options = OPTIONS if has_cuda_plugin() and devices[0].platform != "cpu" else {}
    if c.ops.matmul == "fp8":  # without a GPU to measure on, XLA makes FP8 products by Triton alone
        options = {k: v for k, v in options.items() if k != "xla_gpu_enable_triton_gemm"}
    programs = []
    for name, lowered in updater.lower(state, grads, batch, accumulate=job.accumulate, frozen=frozen).items():
        start = time.monotonic()
        program = lowered.compile(compiler_options=options)
        text = program.as_text()
        memory = program.memory_analysis()
        given, made = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
        programs.append(
            Program(
                name=name,
                argument_bytes=given,
                output_bytes=made,
                temp_bytes=memory.temp_size_in_bytes,
                peak_bytes=given + made + memory.temp_size_in_bytes,
                seconds=time.monotonic() - start,
                collectives=read_collectives(text),
                traffic=traffic(text),
                fp8_products=count_fp8(text),
                cudnn_attention=text.count('custom_call_target="__cudnn$fmha'),
            )
        )
        del program, text
    reference = job.stage == "grpo" and c.grpo is not None and c.grpo.loss.kl_coef > 0
    return Compiled(
        exact=bool(options),
        programs=programs,
        state_bytes={
            "parameters": device_bytes((state.params, frozen)),
            "optimizer": device_bytes(state.opt_state),
            "gradients": device_bytes(grads[0]),
            "reference": device_bytes(state.params) * reference,
        },
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        warnings=[],
    )


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def main(task: Path, result: Path) -> None:
    job: Job = pickle.loads(task.read_bytes())
    decoder.UNROLL["cpu"] = decoder.UNROLL["gpu"]  # a CPU's devices stand for GPUs
    try:
        done: Any = compile_job(job, target_devices(job.hw, job.devices))
    except LnjaxError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    result.write_bytes(pickle.dumps(done))


if __name__ == "__main__":
    # Pickles name classes by their module: this one under its real name, not as __main__.
    from lnjax.planner import compiled

    compiled.main(Path(sys.argv[1]), Path(sys.argv[2]))
