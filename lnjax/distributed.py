"""Several processes, one run: who they are, how they find each other, and what process 0 tells the others.

Without SLURM's or JAX's variables a run is one process, and nothing here does anything. jax is imported late: the front
door shows the config first.
"""

import itertools
import json
import re
import socket
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnjax.errors import ConfigError, DeadlineExceeded
from lnjax.schema import ClusterConfig

PORTS = range(20_000, 32_000)
"""Below Linux's ephemeral ports, so that no outgoing connection holds one."""
CHUNK_BYTES = 1 << 20
"""One value of the key-value store; gRPC refuses messages of more than 4 MiB."""
CONNECT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of the run."""

    coordinator: str = ""
    """host:port where process 0 listens; empty in a run of one process."""
    rank: int = 0
    count: int = 1
    local_devices: tuple[int, ...] | None = None
    """GPUs of this host that are its own; None: all."""
    attempt: str = ""
    """Differs between two starts of the same job, so that nobody takes an earlier one's signs of life for real."""


def find_place(environ: Mapping[str, str]) -> Place:
    """From JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from the variables of a SLURM step.

    Raises ConfigError for a set that is incomplete or contradicts itself.
    """
    coordinator = environ.get("JAX_COORDINATOR_ADDRESS", "")
    if "JAX_NUM_PROCESSES" in environ or "JAX_PROCESS_ID" in environ:
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if name not in environ:
                raise ConfigError(
                    f"{name} is not set, others of its kind are; set host:port, the count and this number"
                )
        count, rank = _integer(environ, "JAX_NUM_PROCESSES"), _integer(environ, "JAX_PROCESS_ID")
        devices, attempt = None, coordinator
    elif _integer(environ, "SLURM_STEP_NUM_TASKS", "1") > 1:
        count, rank = _integer(environ, "SLURM_STEP_NUM_TASKS"), _integer(environ, "SLURM_PROCID")
        job, restarts = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_RESTART_COUNT", "0")
        coordinator = coordinator or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port_of(job, restarts)}"
        devices, attempt = _local_devices(environ), f"{job}.{environ.get('SLURM_STEP_ID', '')}.{restarts}"
    else:
        return Place()
    if not 0 <= rank < count:
        raise ConfigError(f"process {rank} of {count}: numbers go from 0 to the count minus 1")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={coordinator!r}: expected host:port")
    return Place(coordinator, rank, count, devices, attempt) if count > 1 else Place()


def port_of(job: int, restarts: int) -> int:
    """Of the coordinator: jobs that share a node, and two starts of one job, get different ones."""
    return PORTS[(job * 16 + restarts) % len(PORTS)]


def first_host(nodes: str) -> str:
    """`gpu-[007-009,12],head` -> gpu-007."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)[0])  # type: ignore[index]


def _local_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Its share of the node's GPUs where several processes live there. SLURM must not bind them (--gpus-per-task):
    NCCL needs all GPUs of a node visible to each of its processes."""
    gpus, per_node = _integer(environ, "SLURM_GPUS_ON_NODE", "0"), _integer(environ, "SLURM_NTASKS_PER_NODE", "1")
    if "JAX_LOCAL_DEVICE_IDS" in environ or gpus == 0 or per_node == 1:
        return None
    if gpus % per_node:
        raise ConfigError(f"{gpus} GPUs do not divide over {per_node} processes of a node; change processes_per_node")
    share, place = gpus // per_node, _integer(environ, "SLURM_LOCALID")
    return tuple(range(place * share, (place + 1) * share))


def _integer(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.isdigit():
        raise ConfigError(f"{name}={text!r}: expected a whole number")
    return int(text)


def keep_programs(run_dir: Path) -> None:
    """What takes longer than a second to compile lies in RUN_DIR/compiled, where all processes see it, for the next start of this
    run. JAX_COMPILATION_CACHE_DIR names another place, for several runs."""
    import jax  # noqa: PLC0415

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(run_dir / "compiled"))


def start(place: Place, *, c: ClusterConfig) -> None:
    """Find the others. Raises DeadlineExceeded, or ConfigError for a coordinator whose name nobody knows.

    Process 0 waits for the others inside XLA, which ends the process when the deadline passes; the watchdog names them.
    """
    if place.count == 1:
        return
    host = place.coordinator.rsplit(":", 1)[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            f"coordinator {host}: its name does not resolve ({error}); set JAX_COORDINATOR_ADDRESS=ADDRESS:PORT"
        ) from error
    began = time.monotonic()
    if place.rank > 0:
        _await_coordinator(place, deadline_s=c.start_deadline_s)
    import jax  # noqa: PLC0415

    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.rank,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # JAX's own reading of SLURM gives a process one GPU, whatever it should have
        initialization_timeout=max(1, int(c.start_deadline_s - (time.monotonic() - began))),
        heartbeat_timeout_seconds=int(
            4 * c.heartbeat_s
        ),  # a beat every half of it: the watchdog comes first, and names who is stuck
        shutdown_timeout_seconds=max(1, int(c.step_deadline_s)),
        coordinator_bind_address=place.coordinator if host in ("127.0.0.1", "localhost") else None,
    )


def _await_coordinator(place: Place, *, deadline_s: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_EVERY_S).close()
            return
        except OSError as error:
            if time.monotonic() - began > deadline_s:
                raise DeadlineExceeded(
                    f"process {place.rank} waited {deadline_s:g} s for process 0 at {place.coordinator} ({error}); see "
                    "process 0's log, or raise --cluster.start-deadline-s"
                ) from error
        time.sleep(CONNECT_EVERY_S)


def stop(place: Place) -> None:
    """Part from the others, once all are here."""
    if place.count > 1:
        import jax  # noqa: PLC0415

        jax.distributed.shutdown()


_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)


def from_first(name: str, make: Callable[[], Any], *, deadline_s: float) -> Any:
    """What `make` returns on process 0 (JSON), on every process. Collective; one thread at a time a name.

    It goes over the coordination service, never over devices, so it may run beside the learner's programs. Raises
    DeadlineExceeded when process 0 takes longer than `deadline_s`.
    """
    import jax  # noqa: PLC0415

    if jax.process_count() == 1:
        return make()
    from jax._src.distributed import global_state  # noqa: PLC0415 - the key-value store has no public name

    client: Any = global_state.client
    key, deadline_ms = f"lnjax/{name}/{next(_rounds[name])}", int(1000 * deadline_s)
    try:
        if jax.process_index() == 0:
            body = zlib.compress(json.dumps(make()).encode(), 1)
            chunks = [body[i : i + CHUNK_BYTES] for i in range(0, len(body), CHUNK_BYTES)]
            for i, chunk in enumerate(chunks):
                client.key_value_set_bytes(f"{key}/{i}", chunk)
            client.key_value_set(f"{key}/count", str(len(chunks)))
        else:
            count = int(client.blocking_key_value_get(f"{key}/count", deadline_ms))
            body = b"".join(client.blocking_key_value_get_bytes(f"{key}/{i}", deadline_ms) for i in range(count))
        client.wait_at_barrier(f"{key} read", deadline_ms)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise DeadlineExceeded(
            f"process {jax.process_index()} waited {deadline_s:g} s for process 0's {name}; raise "
            "--cluster.step-deadline-s if it needs longer"
        ) from error
    if jax.process_index() == 0:
        client.key_value_delete(key)
    return json.loads(zlib.decompress(body))
