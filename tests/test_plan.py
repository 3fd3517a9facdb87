"""The planner's arithmetic against published numbers, its refusals, and one real compilation."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from lnjax.errors import ConfigError, PlanError
from lnjax.models.family import family
from lnjax.planner import costs
from lnjax.planner.collectives import read_collectives, summarise, unexpected
from lnjax.planner.counts import flops_per_token, kv_bytes_per_token, num_params
from lnjax.planner.hardware import GIB, H100
from lnjax.planner.layout import Layout, impossible, layout_as_written, state_bytes, work_of
from lnjax.planner.report import explain, make_plan, search
from lnjax.schema import (
    GrpoConfig,
    GrpoLossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    SftDataConfig,
    VllmConfig,
)

ROOT = Path(__file__).parent.parent


def grpo_run(name, mesh, *, servers, parallel=8, rows=64, tokens=16_384):
    """The published reasoning run's batch: 72 x 16 rollouts, two updates, a reference."""
    return RunConfig(
        name=name,
        model=ModelConfig(spec=family(name), tokenizer="arithmetic"),
        mesh=mesh,
        engine=VllmConfig(num_servers=servers, tensor_parallel=parallel, max_len=tokens, quantization="fp8"),
        grpo=GrpoConfig(
            prompts=PromptConfig(source="arithmetic", max_prompt_tokens=2048),
            prompts_per_step=72,
            samples_per_prompt=16,
            steps=500,
            updates_per_step=2,
            sampling=SamplingConfig(max_new_tokens=tokens - 2048),
            loss=GrpoLossConfig(kl_coef=0.001),
            pack=PackConfig(row_tokens=tokens, microbatch_rows=rows),
            optimizer=OptimizerConfig(learning_rate=3e-7),
        ),
    )


def sft_run(name, mesh, *, rows, tokens, batch_rows=64):
    return RunConfig(
        name=name,
        model=ModelConfig(spec=family(name), tokenizer="arithmetic"),
        mesh=mesh,
        sft=SftConfig(
            data=SftDataConfig(source="arithmetic", num_examples=8),
            steps=10,
            batch_rows=batch_rows,
            pack=PackConfig(row_tokens=tokens, microbatch_rows=rows),
            optimizer=OptimizerConfig(learning_rate=1e-5),
        ),
    )


ULTRA = grpo_run("ultra253b", MeshConfig(fsdp=64, tensor=8), servers=8)


def test_kv_cache_and_flops_a_token_are_the_published_ones():
    assert kv_bytes_per_token(family("ultra253b")) == 262_144
    assert kv_bytes_per_token(family("super49b")) == 200_704
    assert f"{flops_per_token(family('nano8b'), context=4096):.2e}" == "4.83e+10"
    assert f"{flops_per_token(family('nano8b'), context=8192):.2e}" == "5.15e+10"


def test_parameters_optimizer_gradients_and_reference_take_20_bytes_a_parameter_over_all_shards():
    work = work_of(ULTRA)
    layout = layout_as_written(ULTRA, stage="grpo")
    assert layout and layout.gpus == 576 and layout.shards == 512
    assert state_bytes(ULTRA, ULTRA.model.spec, layout, work) == num_params(ULTRA.model.spec) * 20 / 512
    twice = dataclasses.replace(layout, mesh=MeshConfig(data=2, fsdp=32, tensor=8))
    assert state_bytes(ULTRA, ULTRA.model.spec, twice, work) == num_params(ULTRA.model.spec) * 20 / 256


def test_the_work_of_a_step_is_that_of_the_config():
    work = work_of(ULTRA)
    assert (work.sequences, work.rows, work.updates, work.segment_tokens) == (1152, 576, 2, 16_384)
    short = work_of(ULTRA, mean_tokens=2048)
    assert (short.rows, short.new_tokens) == (144, 2048)


@pytest.mark.parametrize(
    ("mesh", "rows", "words"),
    [
        (MeshConfig(fsdp=72, tensor=8), 72, "model width (embed), 16384, does not divide over 72 (fsdp x context)"),
        (MeshConfig(fsdp=32, tensor=16), 32, "number of kv heads, 8, does not divide over 16 (tensor)"),
        (MeshConfig(fsdp=64, tensor=8), 72, "rows of a microbatch, 72, does not divide over 64 (data x fsdp)"),
        (MeshConfig(fsdp=16, context=3, tensor=8), 16, "16384, does not divide over 48 (fsdp x context)"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error_that_names_the_dimension(mesh, rows, words):
    c = grpo_run("ultra253b", mesh, servers=8, rows=rows)
    layout = layout_as_written(c, stage="grpo")
    assert words in impossible(c.model.spec, layout, work_of(c))
    with pytest.raises(ConfigError, match=r"does not divide over"):
        make_plan(c, c.model.spec, H100, nodes=0, mean_tokens=0, note=lambda text: None)


def test_why_576_gpus_are_not_one_mesh_is_explained():
    text = explain(ULTRA.model.spec, 576, layout_as_written(ULTRA, stage="grpo"), as_written=True)
    assert "576 = 64 x 9, and 9 does not divide the model width 16384" in text
    assert "512 learn, 64 are left for sampling" in text


def test_the_search_finds_a_layout_that_fits_and_is_no_slower_than_the_one_written():
    c = grpo_run("nano8b", MeshConfig(fsdp=4), servers=4, parallel=1, rows=4, tokens=8192)
    work, spec = work_of(c), c.model.spec
    ranked = search(c, spec, work, H100, gpus=8)
    written = layout_as_written(c, stage="grpo")
    assert ranked[0].fits and ranked[0].layout.gpus <= 8
    assert not impossible(spec, ranked[0].layout, work)
    assert ranked[0].seconds <= costs.step_seconds(costs.phases(c, spec, written, work, H100), work)


def test_a_model_that_fits_nowhere_is_an_error_with_a_way_out():
    c = sft_run("ultra253b", MeshConfig(), rows=8, tokens=8192)
    with pytest.raises(ConfigError, match=r"253.4 B parameters do not train on 8 GPUs .* --nodes more"):
        make_plan(c, c.model.spec, H100, nodes=1, mean_tokens=0, note=lambda text: None)


def test_every_phase_has_a_bound_and_asynchronous_steps_overlap():
    layout = layout_as_written(ULTRA, stage="grpo")
    work = work_of(ULTRA)
    found = costs.phases(ULTRA, ULTRA.model.spec, layout, work, H100)
    assert [p.name for p in found] == ["sample", "score", "logprobs old", "logprobs ref", "update", "publish", "save"]
    assert {p.bound for p in found} <= {"compute", "hbm", "nvlink", "infiniband", "disk"}
    total = sum(p.seconds for p in found)
    assert costs.step_seconds(found, work) == pytest.approx(total)
    ahead = costs.step_seconds(found, dataclasses.replace(work, asynchronous=True))
    assert ahead == pytest.approx(max(found[0].seconds, total - found[0].seconds))


HLO = """
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %ag = ((bf16[512,1024]{1,0}), bf16[4096,1024]{1,0}) all-gather-start(%x), replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, \
metadata={op_name="jit(f)/layer/kernel"}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %less = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"32"}}
  %rs = f32[512,256]{1,0} reduce-scatter(%g), replica_groups=[8,4]<=[32], dimensions={0}, to_apply=%add
  %big = f32[1024,1024]{1,0} all-gather(%h), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/params"}
  %same = bf16[8,4]{1,0} collective-permute(%i), source_target_pairs={{0,0},{1,1}}
}
"""


def test_collectives_are_counted_with_the_trips_of_their_loops():
    rows = summarise(read_collectives(HLO))
    assert [(r["kind"], r["group"], r["axes"], r["count"], r["bytes"]) for r in rows] == [
        ("all-gather", 4, "", 1, 4 * 2**20),
        ("all-gather", 8, "fsdp", 32, 32 * 4096 * 1024 * 2),
        ("reduce-scatter", 4, "", 1, 4 * 512 * 256 * 4),
    ]


def test_a_gather_that_no_layout_needs_is_named():
    found = read_collectives(HLO)
    assert unexpected(found, gather_limit=8 * 2**20, compute_dtype="float32") == []
    [problem] = unexpected(found, gather_limit=8 * 2**20, compute_dtype="bfloat16")
    assert problem == "big (jit(f)/params) gathers 4 MiB of f32 over 4 devices: it should move as bf16"
    [problem] = unexpected(found, gather_limit=5 * 2**20, compute_dtype="float32")
    assert problem.startswith("ag (jit(f)/layer/kernel) gathers 8 MiB of bf16 over 8 devices: more than the largest")


NANO8B = """
from lnjax.schema import MeshConfig
from tests.test_plan import sft_run


def config():
    return sft_run("nano8b", MeshConfig(fsdp=8), rows=8, tokens=8192)
"""


@pytest.fixture(scope="module")
def cuda():
    """Plans nano8b's SFT on eight H100s with XLA's CUDA plugin, in an environment apart: nobody else needs 5 GB of CUDA."""
    plugins = {**os.environ, "UV_PROJECT_ENVIRONMENT": ".venv-cuda13"}
    subprocess.run(["uv", "sync", "--quiet", "--extra", "cuda13"], cwd=ROOT, env=plugins, check=True)

    def plan(folder, *words):
        config, out = folder / "nano.py", folder / "plan.json"
        config.write_text(NANO8B)
        command = [ROOT / ".venv-cuda13/bin/python", "-m", "lnjax.plan", "--config", config, "--json", out, *words]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(out.read_text())

    return plan


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_billion_parameters_compile_for_eight_h100s(cuda, tmp_path):
    spec, plan = family("nano8b"), cuda(tmp_path)
    assert {(p["fp8_products"], p["cudnn_attention"]) for p in plan["programs"]} == {(0, 0)}
    device, gib = plan["per_device"], GIB
    assert plan["how"]["per_device.peak_bytes"] == "compiled"
    assert device["parameters_bytes"] == num_params(spec) * 4 / 8 + 4096 * 4 * 65 * 7 / 8  # norms are whole
    assert plan["fits"] and 18 * gib < device["peak_bytes"] < 36 * gib
    gathers = [
        r for p in plan["programs"] for r in p["collectives"] if r["kind"] == "all-gather" and r["axes"] == "fsdp"
    ]
    blocks = 2 * 2 * (num_params(spec) - 2 * 128256 * 4096)  # forward and recomputed, bf16
    head = 2 * 2 * 128256 * 4096
    assert sum(r["bytes"] for r in gathers) == pytest.approx(blocks + head, rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_h100_s_own_kernels_are_in_the_compiled_step_and_take_less_memory(cuda, tmp_path):
    mesh = "--mesh.fsdp", "4", "--mesh.tensor", "2"
    plan = cuda(tmp_path, "--ops.matmul", "fp8", "--ops.attention", "cudnn", *mesh)
    [gradient, _] = plan["programs"]
    # q, k, v, o, gate, up, down: forward, again in the backward pass, and two gradients each; nothing depends on the last
    # product of the recomputed forward pass. XLA makes one product of k and v, forward and again, and one of all three weight
    # gradients.
    assert gradient["fp8_products"] == 7 * 4 - 1 - 4
    assert gradient["cudnn_attention"] == 3  # forward, again, backward
    assert plan["fits"]
    # Partial sums and gradients travel in bfloat16, each device gets its part: nothing large is reduced whole.
    assert max(r["bytes"] for r in gradient["collectives"] if r["kind"] == "all-reduce") < 2**20


def test_a_program_that_moves_too_much_stops_the_plan():
    from lnjax.planner.compiled import Compiled, Program
    from lnjax.planner.report import check_moves

    layout = Layout(mesh=MeshConfig(fsdp=8), microbatch_rows=8, remat="full", servers=0, tensor_parallel=1)
    c = sft_run("nano8b", layout.mesh, rows=8, tokens=8192)
    program = Program(
        name="gradient", argument_bytes=0, output_bytes=0, temp_bytes=0, peak_bytes=0, seconds=0.0, traffic=0.0,
        collectives=read_collectives(HLO), fp8_products=0, cudnn_attention=0,
    )  # fmt: skip
    done = Compiled(exact=True, programs=[program], state_bytes={}, rss_bytes=0, warnings=[])
    with pytest.raises(PlanError, match=r"gradient program: big \(jit\(f\)/params\) gathers 4 MiB of f32"):
        check_moves(c, c.model.spec, layout, work_of(c), done)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_calibration_finds_the_two_rates_and_the_bytes_of_what_ran(monkeypatch):
    """All seven learners compile and run; their times are made up from two rates, since tests run beside one another."""
    from rich.console import Console

    from lnjax.planner import calibrate

    class Timed(calibrate.Learner):
        def __init__(self, c):
            super().__init__(c)
            self.config = c

        def turn(self):
            super().turn()
            assert min(self.taken) > 0
            self.taken[:] = [calibrate.flops(self.config) / 1e11 + self.traffic / 1e10]

    monkeypatch.setattr(calibrate, "Learner", Timed)
    monkeypatch.setattr(calibrate, "SECONDS", 1e-3)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    found = calibrate.calibrate(Console(), note=lambda _: None)
    assert (found["gemm_flops"], found["memory_bytes_per_s"]) == (pytest.approx(1e11), pytest.approx(1e10))
    assert found["fits"] and len(found["runs"]) == 3
    for run in found["runs"]:
        assert run["predicted_bytes"] == pytest.approx(run["measured_bytes"], rel=0.1)
        assert run["predicted_seconds"] == pytest.approx(run["measured_seconds"], rel=0.01)


def test_what_is_checked_is_none_of_what_calibrates():
    from lnjax.planner.calibrate import checked, references

    assert len({c.model.spec.d_model for c in [*references(), *checked()]}) == 7
    assert len({c.model.spec.vocab_size for c in checked()}) == 3
