"""Whether a job can run on the devices that are here: asked before any file is read, answered with what to do instead."""

import dataclasses
import math

import jax
import psutil

from lnjax.errors import ConfigError
from lnjax.models.hf import tensor_map
from lnjax.schema import RunConfig, VllmConfig

GPUS_PER_NODE = 8
SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


def needed_devices(c: RunConfig) -> int:
    """Fewest devices the learner's mesh fits on: an axis of -1 takes at least one."""
    return math.prod(max(1, getattr(c.mesh, f.name)) for f in dataclasses.fields(c.mesh))


def server_gpus(c: RunConfig) -> int:
    """GPUs of the servers that the job itself brings up."""
    return c.engine.num_servers * c.engine.tensor_parallel if isinstance(c.engine, VllmConfig) else 0


def state_bytes(c: RunConfig) -> int:
    """Trained parameters, AdamW's two moments, gradients, a reference, and the weights below adapters, over all devices; 0 where
    the config has no spec."""
    if c.model.spec is None:
        return 0
    entries, lora, frozen = tensor_map(c.model.spec), c.model.lora, 0
    count = sum(math.prod(entry.shape) for entry in entries)
    if lora.rank:
        frozen = count * SIZES[c.model.compute_dtype]
        kernels = [entry.shape for entry in entries if entry.path[-1] in lora.targets]
        count = sum(n * lora.rank * (d_in + d_out) for n, d_in, d_out in kernels)
    copies = 4 + bool(c.preference or (c.grpo and c.grpo.loss.kl_coef > 0))
    return frozen + count * copies * SIZES[c.model.param_dtype]


def check_fits(c: RunConfig) -> None:
    """Raises ConfigError when the mesh has more devices than there are, or the train state more bytes than their memory."""
    devices, memory, state = jax.device_count(), _memory(), state_bytes(c)
    if needed_devices(c) <= devices and state <= memory:
        return
    servers = server_gpus(c)
    nodes = f"nodes={-(-needed_devices(c) // GPUS_PER_NODE)}"
    nodes += f" rollout_nodes={-(-servers // GPUS_PER_NODE)}" if servers else ""
    mesh = " x ".join(f"{f.name}={getattr(c.mesh, f.name)}" for f in dataclasses.fields(c.mesh))
    raise ConfigError(
        f"{c.name} cannot run here: it needs {needed_devices(c):,} devices (mesh {mesh})"
        + (f" and {servers} GPUs for its servers" if servers else "")
        + (f", and {state / 1e9:,.1f} GB for parameters, optimizer and gradients" if state else "")
        + f"; here are {devices} ({jax.devices()[0].device_kind}) with {memory / 1e9:,.1f} GB. Ways on: plan it "
        f"(python -m lnjax.plan --config {c.name}), run the same recipe small (python -m lnjax.launch --config {c.name} "
        f"--proxy), write its cluster job (python -m lnjax.launch --config {c.name} --slurm {nodes}), or choose "
        "another --mesh.*"
    )


def _memory() -> int:
    """Bytes of all devices; CPU devices share their host's."""
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()]
    return sum(limits) * jax.process_count() or psutil.virtual_memory().total * jax.process_count()
