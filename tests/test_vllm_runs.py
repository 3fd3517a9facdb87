"""Runs through the front door with real vLLM servers: what they leave in files, and that they leave nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from lnjax.rollout.server import free_port
from tests import fleet

pytestmark = pytest.mark.slow

FLAGS = "--xla_backend_optimization_level=0"
KEY = "a long random text"


@pytest.fixture(scope="module", autouse=True)
def environment():
    fleet.build_environment()


def start(folder, *words, config="tiny_grpo_vllm", **changes):
    command = [
        sys.executable,
        "-m",
        "lnjax.launch",
        "--config",
        str(config),
        "--run-dir",
        str(folder),
        *map(str, words),
    ]
    folder.parent.mkdir(exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            command,
            cwd=fleet.ROOT,
            env={**os.environ, "XLA_FLAGS": FLAGS, **changes},
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )


def said(folder):
    return Path(f"{folder}.log").read_text()[-2000:]


def lines(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder, process, step):
    fleet.wait_until(
        lambda: process.poll() is not None or len(lines(folder)) >= step, seconds=400, what=f"step {step} of {folder}"
    )
    assert process.poll() is None, said(folder)


def nothing_is_left(folder):
    fleet.wait_until(lambda: fleet.processes_of(folder / "weights") == [], seconds=30, what="the servers end")


def test_twenty_steps_twenty_swaps_each_attested_and_no_process_left(tmp_path):
    folder = tmp_path / "run"
    assert start(folder).wait(600) == 0, said(folder)
    nothing_is_left(folder)
    assert [x["step"] for x in lines(folder)] == list(range(1, 21))
    assert [x["version"] for x in lines(folder)] == list(range(20))
    assert max(x["parity_prob_error"] for x in lines(folder)) <= 1.001
    assert max(x["staleness_max"] for x in lines(folder)) == 0
    summary = json.loads((folder / "summary.json").read_text())
    sync = summary["sync"]
    assert sync["swaps"] == sync["attested"] == 21  # the first weights, and after each of twenty updates
    assert sync["bytes_written"] == sync["bytes_read"] == 21 * sync["version_bytes"]
    assert sync["seconds"] > 0
    assert [r["number"] for r in sync["last"]] == [20]
    assert summary["parity"]["prob_error_max"] <= 1.001
    assert summary["fleet"]["refused_tokens"] == 0
    assert sorted(p.name for p in (folder / "weights").iterdir() if p.name.isdigit()) == ["19", "20"]


NEMOTRON = """
import dataclasses

from configs import tiny_grpo_vllm
from tests.fleet import served_nemotron


def config():
    tiny = tiny_grpo_vllm.config()
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, spec=served_nemotron(eos_token_ids=(2, 5))))
"""


def test_a_nemotron_nas_with_absent_blocks_is_trained_published_and_served(tmp_path):
    (tmp_path / "nemotron.py").write_text(NEMOTRON)
    folder = tmp_path / "run"
    assert start(folder, "--grpo.steps", 3, config=tmp_path / "nemotron.py").wait(400) == 0, said(folder)
    assert [x["version"] for x in lines(folder)] == [0, 1, 2]
    assert max(x["parity_prob_error"] for x in lines(folder)) <= 1.001
    assert json.loads((folder / "weights" / "model" / "config.json").read_text())["model_type"] == "nemotron-nas"


def test_ctrl_c_ends_the_servers_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "run"
    words = ("--checkpoint.every", 1, "--grpo.steps", 5)
    process = start(folder, *words)
    wait_for_step(folder, process, 2)
    assert fleet.processes_of(folder / "weights") != []
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    nothing_is_left(folder)
    process = start(folder, *words)
    wait_for_step(folder, process, 3)
    process.kill()
    process.wait()
    nothing_is_left(folder)
    assert start(folder, *words).wait(400) == 0
    nothing_is_left(folder)
    assert [x["step"] for x in lines(folder)] == list(range(1, 6))


def test_a_server_started_by_hand_is_locked_and_serves_a_learner_that_attaches(tmp_path):
    root, port = tmp_path / "shared", free_port("127.0.0.1")
    words = ["--engine.publish-dir", str(root)]
    serve = ["bash", "launch/serve.sh", "--config", "tiny_grpo_vllm", "--port", str(port), *words]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            serve, cwd=fleet.ROOT, env={**os.environ, "LNJAX_SERVER_KEY": KEY}, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=address, trust_env=False) as anyone:
            fleet.wait_until(lambda: _healthy(anyone), seconds=300, what="the server")
            for method, path in ROUTES:
                assert anyone.request(method, path, json={}).status_code == 401, path
                assert anyone.request(method, path, headers={"Authorization": "Bearer x"}).status_code == 401, path
        with httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60
        ) as owner:
            for path in ("/init_weight_transfer_engine", "/start_weight_update"):
                assert owner.post(path, json={"init_info": {}}).status_code == 200
            outside = {"number": 1, "digest": "0" * 64, "path": str(tmp_path)}
            reply = owner.post("/update_weights", json={"update_info": outside})
            assert reply.status_code == 500
            assert "does not lie in the publish root" in (tmp_path / "server.log").read_text()
        attach = [*words, "--engine.num-servers", "0", "--engine.addresses", address, "--grpo.steps", "3"]
        folder = tmp_path / "run"
        assert start(folder, *attach, LNJAX_SERVER_KEY=KEY).wait(400) == 0, said(folder)
        assert [x["step"] for x in lines(folder)] == [1, 2, 3]
        assert max(x["parity_prob_error"] for x in lines(folder)) <= 1.001
        assert server.poll() is None  # it is not the learner's to end
    finally:
        server.terminate()
        server.wait(30)


ROUTES = [
    ("GET", "/weight_info"),
    ("GET", "/is_paused"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/v1/completions"),
]


def _healthy(client):
    time.sleep(0.5)
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "tiny_grpo", "--port", "1"), "samples with the embedded engine"),
        (("--config", "tiny_grpo_vllm", "--port", "1"), "engine.publish_dir is empty"),
        (("--config", "tiny_grpo_vllm", "--port", "1", "--engine.publish-dir", "x"), "LNJAX_SERVER_KEY is not set"),
        (("--config", "tiny_grpo_vllm"), "--port is missing"),
    ],
)
def test_a_server_that_cannot_be_started_says_why_in_one_line(words, message):
    environment = {k: v for k, v in os.environ.items() if k != "LNJAX_SERVER_KEY"}
    done = subprocess.run(
        [sys.executable, "-m", "lnjax.serve", *words], cwd=fleet.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
