"""Seconds of each phase of a step, each with the bound that limits it: a model in closed form. Imports no jax."""

from dataclasses import dataclass

from lnjax.planner.counts import (
    block_params,
    flops_per_token,
    kv_bytes_per_token,
    matmul_flops_per_token,
    num_attention,
    num_params,
    parts,
)
from lnjax.planner.hardware import Hardware
from lnjax.planner.layout import ITEMSIZE, Layout, Work
from lnjax.schema import ModelSpec, RunConfig, VllmConfig

SCORE_BYTES = {"forward": 12, "backward": 28}
"""HBM traffic of one attention score under ops.attention=xla: float32 scores written and read, weights in 16 bits."""
RECOMPUTED = {"full": 1.0, "dots": 0.0, "none": 0.0}
"""Forward passes that the backward pass makes again."""
ENGINE_RESERVE = 3 * 2**30
"""Activations, CUDA graphs and NCCL of one rank of a server."""


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float
    bound: str
    """compute, hbm, nvlink, infiniband or disk."""
    note: str = ""


def _phase(name: str, terms: dict[str, float], *, times: float = 1.0, note: str = "") -> Phase:
    """Terms that overlap: the longest counts. `nvlink` does not overlap with compute: its results are waited for."""
    on_chip = max(terms.get("compute", 0.0), terms.get("hbm", 0.0)) + terms.get("nvlink", 0.0)
    bound = max(terms, key=lambda k: terms[k])
    total = max(on_chip, terms.get("infiniband", 0.0), terms.get("disk", 0.0))
    if total == on_chip and bound in ("infiniband", "disk"):
        bound = max((k for k in terms if k in ("compute", "hbm", "nvlink")), key=lambda k: terms[k])
    return Phase(name, times * total, bound, note)


def pass_terms(
    c: RunConfig, spec: ModelSpec, layout: Layout, work: Work, hw: Hardware, *, backward: bool
) -> dict[str, float]:
    """Seconds by bound of one microbatch on one GPU."""
    m, item = layout.mesh, ITEMSIZE[c.model.compute_dtype]
    again = RECOMPUTED[layout.remat] if backward else 0.0
    passes = (3.0 + again) / 3.0 if backward else 1.0 / 3.0
    rows = layout.microbatch_rows / (m.data * m.fsdp)
    tokens = rows * work.row_tokens / (m.context * m.tensor)  # a GPU's share
    matmul = tokens * matmul_flops_per_token(spec) * passes
    head = tokens * 6 * spec.vocab_size * spec.d_model * passes
    attention = tokens * (flops_per_token(spec, context=work.segment_tokens) - matmul_flops_per_token(spec)) * passes
    # Of the row's score tiles those up to the diagonal are made; the last of the context shards has the most.
    unbalanced = (2 * m.context - 1) / m.context
    scores = rows * num_attention(spec) * spec.num_heads / m.tensor * work.row_tokens**2 / 2 / m.context * unbalanced
    traffic = scores * (SCORE_BYTES["forward"] * (1 + again) + SCORE_BYTES["backward"] * backward)
    traffic *= c.ops.attention == "xla"  # of cuDNN's no score leaves the chip
    params = num_params(spec)
    gathered = params * item / m.tensor * (2 + again if backward else 1)
    streamed = 3 * gathered + 10 * tokens * m.tensor * spec.d_model * item * len(spec.blocks)
    group = m.fsdp * m.context
    moved = params * item / m.tensor * (group - 1) / group * (1 + again + 1 if backward else 1)
    residual = tokens * m.tensor * spec.d_model * item * (m.tensor - 1) / m.tensor
    exchanged = residual * parts(spec) * (2 + (2 * again + 3) * backward)
    inside = layout.learner_gpus <= hw.gpus_per_node
    return {
        "compute": (matmul - head) / (hw.bf16_flops if c.ops.matmul == "xla" else hw.fp8_flops)
        + head / hw.bf16_flops
        + attention / hw.attention_flops,
        "hbm": (streamed + traffic) / hw.hbm,
        "nvlink": (exchanged + moved * inside) / hw.nvlink,
        "infiniband": moved * (not inside) / hw.infiniband,
    }


def serving(c: RunConfig, spec: ModelSpec, layout: Layout, hw: Hardware) -> dict[str, float]:
    """A rollout server: bytes of weights and KV cache, sequences at once at full length."""
    e = c.engine
    per_token = kv_bytes_per_token(spec, itemsize=ITEMSIZE[e.dtype])
    if isinstance(e, VllmConfig):
        ranks = layout.tensor_parallel
        weights = num_params(spec) * (1 if e.quantization == "fp8" else ITEMSIZE[e.dtype])
        room = ranks * (hw.memory_bytes * e.gpu_memory - ENGINE_RESERVE) - weights
        most = e.max_sequences
    else:
        ranks, weights = layout.mesh.tensor, num_params(spec) * ITEMSIZE[e.dtype]
        most = e.num_slots * ranks // layout.learner_gpus
        room = most * e.max_len * per_token
    return {
        "ranks": ranks,
        "servers": layout.servers or layout.learner_gpus // ranks,
        "weight_bytes": weights,
        "kv_bytes_per_token": per_token,
        "cached_tokens": max(0.0, room // per_token),
        "concurrency": max(0.0, min(most, room // (per_token * e.max_len))),
    }


def sample_phase(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work, hw: Hardware) -> Phase:
    """Prefill once a prompt, then one pass over weights and cache a token; whatever finds no place waits."""
    s = serving(c, spec, layout, hw)
    if s["concurrency"] < 1:
        return Phase("sample", float("inf"), "hbm", "no sequence fits the KV cache")
    fp8 = isinstance(c.engine, VllmConfig) and c.engine.quantization == "fp8"
    rate = s["ranks"] * (hw.fp8_flops if fp8 else hw.bf16_flops)
    per_server = -(-work.sequences // int(s["servers"]))
    waves = max(1.0, per_server / s["concurrency"])
    at_once = min(per_server, s["concurrency"])
    flops = 2 * (block_params(spec) + spec.vocab_size * spec.d_model)
    cache = (work.prompt_tokens + work.new_tokens / 2) * s["kv_bytes_per_token"]
    terms = {
        "hbm": (s["weight_bytes"] + at_once * cache) / (s["ranks"] * hw.hbm),
        "compute": at_once * flops / rate,
        "nvlink": parts(spec) * hw.collective_s if s["ranks"] > 1 else 0.0,
    }
    decode = _phase("sample", terms, times=waves * work.new_tokens)
    prefill = work.prompts / s["servers"] * work.prompt_tokens * flops / rate
    each = decode.seconds / waves / work.new_tokens * 1e3
    note = f"{per_server} sequences a server, {int(at_once)} at once, {each:.1f} ms a token"
    return Phase("sample", decode.seconds + prefill, decode.bound, note)


def sync_bytes(c: RunConfig, spec: ModelSpec) -> float:
    """One published version."""
    return num_params(spec) * ITEMSIZE[c.engine.dtype]


def phases(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work, hw: Hardware) -> list[Phase]:
    """In the order of the loop. The save is spread over the steps between two checkpoints."""
    params = num_params(spec)
    microbatches = -(-work.rows // layout.microbatch_rows)
    learner_nodes = -(-layout.learner_gpus // hw.gpus_per_node)
    found = []
    forward = pass_terms(c, spec, layout, work, hw, backward=False)
    if work.stage == "grpo":
        found.append(sample_phase(c, spec, layout, work, hw))
        found.append(Phase("score", 0.0, "compute", "verifiers and judge are outside these GPUs: not counted"))
        old = work.updates - 1
        found.append(_phase("logprobs old", forward, times=old * microbatches, note=f"{old} of {work.updates} updates"))
        if work.reference:
            found.append(_phase("logprobs ref", forward, times=work.updates * microbatches))
    both = pass_terms(c, spec, layout, work, hw, backward=True)
    gradient = _phase("update", both, times=work.updates * microbatches)
    item = ITEMSIZE[c.model.param_dtype]
    link = hw.nvlink if layout.learner_gpus <= hw.gpus_per_node else hw.infiniband
    summed = 2 * 4 * (1 - 1 / layout.mesh.data) / link  # of a parameter's gradient, over replicas
    apply = work.updates * params * ((6 * item + 4) / hw.hbm + summed) / layout.shards
    note = f"{work.updates} x {microbatches} microbatches of {layout.microbatch_rows} rows"
    found.append(Phase("update", gradient.seconds + apply, gradient.bound, note))
    if work.stage == "grpo" and layout.servers:
        size = sync_bytes(c, spec)
        nodes = max(1.0, layout.tensor_parallel / hw.gpus_per_node)
        sharing = max(1, min(layout.servers, hw.gpus_per_node // layout.tensor_parallel))
        seconds = size / (learner_nodes * hw.disk) + size * sharing / (nodes * hw.disk)
        found.append(
            Phase("publish", seconds, "disk", f"{size / 1e9:,.0f} GB written once, read by {layout.servers} servers")
        )
    elif work.stage == "grpo":
        found.append(
            _phase("publish", {"hbm": 2 * params * item / layout.shards / hw.hbm, **_gather(c, params, layout, hw)})
        )
    size = checkpoint_bytes(c, spec, work)
    every = min(c.checkpoint.every or work.steps, work.steps)
    note = f"{size / 1e12:.2f} TB every {every} steps"
    found.append(Phase("save", size / (learner_nodes * hw.disk) / every, "disk", note))
    return found


def _gather(c: RunConfig, params: int, layout: Layout, hw: Hardware) -> dict[str, float]:
    """The embedded engine's copy: gathered over fsdp."""
    size = params * ITEMSIZE[c.engine.dtype] / layout.mesh.tensor
    inside = layout.learner_gpus <= hw.gpus_per_node
    return {"nvlink" if inside else "infiniband": size / (hw.nvlink if inside else hw.infiniband)}


def checkpoint_bytes(c: RunConfig, spec: ModelSpec, work: Work) -> float:
    return num_params(spec) * ITEMSIZE[c.model.param_dtype] * (3 + work.reference)


def step_seconds(found: list[Phase], work: Work) -> float:
    """Synchronous: the sum. Asynchronous: sampling and learning run side by side."""
    sampling = sum(p.seconds for p in found if p.name in ("sample", "score"))
    learning = sum(p.seconds for p in found) - sampling
    return max(sampling, learning) if work.asynchronous else sampling + learning
