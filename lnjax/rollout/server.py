"""One vLLM server as a process: its command line, its environment, its end.

The fleet starts it under a guard; `python -m lnjax.serve` becomes it.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lnjax.errors import ConfigError, RolloutError
from lnjax.schema import VllmConfig

KEY = "LNJAX_SERVER_KEY"
"""Environment variable with the bearer key: read by attached fleets, set for local servers."""
ROOT = "LNJAX_PUBLISH_ROOT"
ENTRY = "vllm.entrypoints.launchers.api_server.entry"
LOG_TAIL = 600
MIN_BATCH_TOKENS = 4096


def find_python(c: VllmConfig) -> Path:
    """The rollout environment's interpreter. Raises ConfigError when it was not built."""
    folder = Path(os.environ.get("LNJAX_ROLLOUT_ENV", c.environment)).absolute()
    if not (folder / "complete").exists():
        raise ConfigError(f"{folder}: no complete rollout environment; build it with: bash launch/rollout_env.sh")
    return folder / "bin" / "python"


def serve_command(c: VllmConfig, *, model: Path, port: int) -> list[str]:
    """The command line of a server that starts with weights of zeros and waits for its first version."""
    command = [str(find_python(c)), "-m", ENTRY, "--model", str(model), "--served-model-name", "policy"]
    command += ["--host", c.host, "--port", str(port), "--dtype", c.dtype, "--max-model-len", str(c.max_len)]
    command += ["--max-num-seqs", str(c.max_sequences), "--tensor-parallel-size", str(c.tensor_parallel)]
    command += ["--load-format", "dummy", "--skip-tokenizer-init", "--enable-scale-out"]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    command += ["--weight-transfer-config", json.dumps({"backend": "orbax"})]
    command += ["--worker-extension-cls", "lnjax_vllm.worker.Attest"]
    command += ["--middleware", "lnjax_vllm.middleware.RequireKey"]
    command += ["--disable-uvicorn-access-log"]
    if c.quantization != "none":
        command += ["--quantization", c.quantization]
    if has_gpu():
        command += ["--gpu-memory-utilization", str(c.gpu_memory)]
    else:
        # A prompt that is prefilled in pieces rewinds its seeded generator, which torch's CPU generator cannot.
        whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4 * c.max_len, MIN_BATCH_TOKENS))]
        command += ["--enforce-eager", *whole]
    return command


def serve_environment(c: VllmConfig, *, index: int, root: Path, key: str) -> dict[str, str]:
    """Of server `index` on this host."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS", "JAX_PLATFORMS")
    found = {k: v for k, v in os.environ.items() if k not in dropped}
    found |= {KEY: key, ROOT: str(root), "VLLM_SERVER_DEV_MODE": "1"}
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if has_gpu():
        gpus = c.gpus or tuple(range(c.num_servers * c.tensor_parallel))
        mine = gpus[index * c.tensor_parallel : (index + 1) * c.tensor_parallel]
        if len(mine) < c.tensor_parallel:
            raise ConfigError(f"engine.gpus={gpus}: server {index} needs {c.tensor_parallel} of them")
        return found | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))}
    threads = max(1, (os.cpu_count() or 1) // (max(1, c.num_servers) * c.tensor_parallel))
    found |= {"VLLM_CPU_KVCACHE_SPACE": str(c.cpu_cache_gib)}
    found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    library = find_python(c).parent.parent / "lib" / "libiomp5.so"
    return found | ({"LD_PRELOAD": str(library)} if library.exists() else {})


def model_folder(root: Path) -> Path:
    """Beside the versions, where all hosts see it."""
    return root / "model"


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and not os.environ.get("LNJAX_NO_GPU")


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def new_key() -> str:
    return os.environ.get(KEY) or secrets.token_urlsafe(24)


def write_model(folder: Path, *, config: Mapping[str, Any]) -> None:
    """What a server needs to know of the model before its first version: config.json, whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"config.json.{socket.gethostname()}-{os.getpid()}"
    whole.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(whole, folder / "config.json")


class LocalServer:
    """A server started here. It ends with `stop`, or when this process does, in whatever way."""

    def __init__(self, c: VllmConfig, *, index: int, model: Path, root: Path, key: str, log: Path):
        self._log = log
        port = free_port(c.host)
        self.address = f"http://{c.host}:{port}"
        command = [sys.executable, "-m", "lnjax.rollout.guard", *serve_command(c, model=model, port=port)]
        environment = serve_environment(c, index=index, root=root, key=key)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def ended(self) -> str:
        """Empty while it runs; else how it ended, with the end of its log."""
        if (status := self._process.poll()) is None:
            return ""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return f"ended with status {status}; {self._log}: …{' '.join(text[-LOG_TAIL:].split())}"

    def stop(self, *, deadline_s: float = 20.0) -> None:
        """Ends every process of the server."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            self._process.kill()  # the server's own PDEATHSIG follows
            self._process.wait()
            raise RolloutError(
                f"the server at {self.address} did not end within {deadline_s:.0f} s; killed its guard"
            ) from error
