"""Real vLLM servers for tests, and the learner's opinion on what they say."""

import dataclasses
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np

from lnjax.checkpoint.publish import Publisher
from lnjax.models.hf import hf_config
from lnjax.rollout.server import ENTRY, find_python, free_port, serve_environment
from lnjax.rollout.vllm import VllmEngine
from lnjax.schema import VllmConfig
from lnjax.types import Prompt, SamplingParams
from tests.specs import llama, nemotron

ROOT = Path(__file__).parent.parent
START_S = 300.0


def build_environment() -> None:
    subprocess.run(["bash", "launch/rollout_env.sh"], cwd=ROOT, check=True)


@contextmanager
def serving(model: Path, *words: str):
    """Address of a plain vLLM server of a folder in Hugging Face format, which it knows as `judge`."""
    c, port = VllmConfig(num_servers=1), free_port("127.0.0.1")
    command = [str(find_python(c)), "-m", ENTRY, "--model", str(model), "--served-model-name", "judge"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *words]
    environment = serve_environment(c, index=0, root=model, key="unused") | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    address, end, log = f"http://127.0.0.1:{port}", time.monotonic() + START_S, model.with_suffix(".log")
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while True:
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, "the server did not start"
                try:
                    if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1.0)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def served_llama(**changes):
    """Widths that vLLM's CPU kernels take; every matrix divides over eight ranks' chunks."""
    return llama(**{"vocab_size": 128, "d_model": 64, "head_dim": 32, "max_position": 1024, **changes})


def served_nemotron(**changes):
    """Absent attention, absent FFN and an empty layer; FFN widths that no ffn_mult gives."""
    return nemotron(**{"vocab_size": 128, "d_model": 64, "head_dim": 32, "max_position": 1024, **changes})


class Fleet:
    """An engine with its publisher, and a model that scores what it says."""

    def __init__(self, model, folder: Path, **changes):
        c = VllmConfig(**{"max_len": 512, "dtype": "float32", "max_sequences": 32, **changes})
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.folder, self.notes, self.max_len = model, folder, [], c.max_len
        self.publisher = Publisher(
            folder / "weights",
            spec=model.spec,
            mesh=model.compute.ops.mesh,
            dtype=jnp.dtype(c.dtype),
            keep=c.keep_versions,
            deadline_s=30.0,
            tensor_parallel=c.tensor_parallel,
        )
        config = hf_config(model.spec, dtype=c.dtype)
        self.engine = VllmEngine(c, publisher=self.publisher, model=config, run_dir=folder, note=self.notes.append)
        self._logits = jax.jit(model.logits)

    def params(self, seed):
        """Weights with opinions: logits far apart."""
        spec = dataclasses.replace(self.model.spec, initializer_range=0.15)
        return dataclasses.replace(self.model, spec=spec).init_params(jax.random.key(seed), dtype=jnp.float32)

    def learner_logprobs(self, params, prompt, completion, *, temperature=1.0):
        """Of the completion's tokens, in float64 from float32 logits."""
        tokens = prompt.token_ids + completion.token_ids
        row = np.zeros((1, self.max_len), np.int32)
        row[0, : len(tokens)] = tokens
        logits = np.asarray(self._logits(params, row))[0].astype(np.float64) / temperature
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        first = len(prompt.token_ids)
        return np.array([logprobs[first + i - 1, t] for i, t in enumerate(completion.token_ids)])

    def prob_error(self, params, prompts, groups, **kwargs):
        gaps = [
            self.learner_logprobs(params, p, c, **kwargs) - np.array(c.logprobs)
            for p, group in zip(prompts, groups, strict=True)
            for c in group
        ]
        return float(np.exp(np.abs(np.concatenate(gaps))).mean())

    def faults(self):
        return (self.folder / "faults.jsonl").read_text().splitlines()


def prompts(count, *, length=12, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(f"p{seed}/{i}", tuple(rng.integers(6, 128, length).tolist()), "none", {}) for i in range(count)]


def sampling(max_new_tokens=24, **changes):
    return SamplingParams(
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop_token_ids": (2, 5), **changes},
        max_new_tokens=max_new_tokens,
    )


def processes_of(folder: Path) -> list[int]:
    """Living processes whose environment names this publish root: servers of that run."""
    mark = f"LNJAX_PUBLISH_ROOT={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended, or is not ours
    return found


def wait_until(condition, *, seconds, what):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.1)
