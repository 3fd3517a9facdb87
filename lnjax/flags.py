"""What the learner's processes are started with: one table of XLA flags and environment variables, for the jaxlib in hand.

XLA ends a process that meets a flag it does not know, and flags come and go between releases. So the table says from which
jaxlib on (and before which) a flag is meant, and what is left is shown to that jaxlib in a process of its own. No figure here
comes from a GPU of this project: the values are those of published training set-ups on H100s.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lnjax.errors import ConfigError

PROBE = "from jaxlib import xla_client; xla_client.make_cpu_client()"
PROBE_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Flag:
    name: str
    value: str
    why: str
    platform: str = "gpu"
    since: tuple[int, ...] = (0, 11)
    """First jaxlib that takes it."""
    before: tuple[int, ...] = (9,)
    """First jaxlib that no longer does."""


XLA_FLAGS = (
    Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "collectives run while matmuls do"),
    Flag("xla_gpu_enable_pipelined_all_gather", "true", "the next layer's parameters are gathered early"),
    Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "the last layer's gradients are still on their way"),
    Flag("xla_gpu_enable_pipelined_all_reduce", "true", "the same for replicated parameters"),
    Flag(
        "xla_gpu_enable_while_loop_double_buffering", "true", "lets a scan over layers overlap with its own next step"
    ),
    Flag("xla_gpu_all_gather_combine_threshold_bytes", "1073741824", "few large messages instead of many small ones"),
    Flag("xla_gpu_all_reduce_combine_threshold_bytes", "1073741824", "the same"),
    Flag(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        "67108864",
        "smaller: they should begin before the backward ends",
    ),
    Flag("xla_gpu_unsupported_use_all_reduce_one_shot_kernel", "false", "it crashed the compiler at 512 devices"),
)

ENVIRONMENT = (
    Flag("JAX_PLATFORMS", "cuda", "no quiet fall-back to the CPU"),
    Flag("JAX_PLATFORMS", "cpu", "no search for GPUs", platform="cpu"),
    Flag("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92", "room for NCCL and cuDNN beside XLA's pool"),
    Flag("CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start in the order in which they were given to the streams"),
)


def jaxlib_version() -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3])


def meant_for(table: Sequence[Flag], *, platform: str, jaxlib: tuple[int, ...]) -> dict[str, str]:
    """{name: value} of the rows for this platform and version."""
    return {f.name: f.value for f in table if f.platform == platform and f.since <= jaxlib < f.before}


def known(flags: Mapping[str, str], *, python: str = sys.executable) -> dict[str, str]:
    """Those that `python`'s jaxlib takes. Raises ConfigError when it cannot be asked."""
    taken = dict(flags)
    while taken:
        environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": as_text(taken)}
        done = subprocess.run(
            [python, "-c", PROBE], env=environ, capture_output=True, text=True, timeout=PROBE_DEADLINE_S
        )
        if done.returncode == 0:
            return taken
        refused = re.findall(r"--(\w+)", done.stderr.partition("Unknown flags in XLA_FLAGS:")[2].partition("\n")[0])
        if not set(refused) & set(taken):
            raise ConfigError(f"{python} cannot say which XLA flags it takes: {' '.join(done.stderr.split())[-300:]}")
        taken = {name: value for name, value in taken.items() if name not in refused}
    return taken


def as_text(flags: Mapping[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in flags.items())
