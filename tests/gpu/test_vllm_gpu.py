"""What only a GPU can show of the fleet: FP8 serving, and tensor parallelism over NCCL."""

import pytest

from tests import fleet
from tests.fleet import Fleet, prompts, sampling

WIDE = {"d_model": 256, "head_dim": 64}
"""FP8 kernels take dims in multiples of 16; attention kernels heads of 64."""


@pytest.fixture(scope="module", autouse=True)
def environment():
    fleet.build_environment()


CASES = {
    "bfloat16": (fleet.served_llama, {"dtype": "bfloat16"}, 1.02),
    "fp8": (fleet.served_llama, {"dtype": "bfloat16", "quantization": "fp8"}, 1.1),
    "nemotron-nas, bfloat16": (fleet.served_nemotron, {"dtype": "bfloat16"}, 1.02),
}


def check(make_model, folder, spec, changes, limit):
    """Two swaps, each attested and in agreement with the learner."""
    model = make_model(spec)
    ours = Fleet(model, folder, **changes)
    try:
        asked = prompts(6)
        for number in range(2):
            params = ours.params(number)
            version = ours.engine.load_weights(number, params)
            groups = ours.engine.generate(asked, num_samples=4, sampling=sampling(), seed=number)
            assert ours.prob_error(params, asked, groups) <= limit
            last = ours.engine.report()["sync"]["last"]
            assert {(r["number"], r["digest"]) for r in last} == {(number, version.digest)}
            assert len(last) == changes.get("tensor_parallel", 1)
        return ours.engine.report()["sync"]
    finally:
        ours.engine.close()


@pytest.mark.gpus(1)
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_server_agrees_with_the_learner_after_every_swap(make_model, tmp_path, case):
    make, changes, limit = CASES[case]
    sync = check(make_model, tmp_path, make(**WIDE), changes, limit)
    last = sync["last"][0]
    if changes.get("quantization"):
        assert last["staged_only"] > 0  # quantised layers cannot be read back, and it says so
    else:
        assert last["staged_only"] == 0
        assert last["read_back"] > 0


@pytest.mark.gpus(2)
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_two_ranks_over_nccl_read_each_matrix_once_and_agree(make_model, tmp_path, quantization):
    changes = {"dtype": "bfloat16", "tensor_parallel": 2, "quantization": quantization}
    sync = check(make_model, tmp_path, fleet.served_llama(**WIDE), changes, 1.1 if quantization == "fp8" else 1.02)
    assert sync["bytes_read"] == sync["bytes_needed"]
