"""Which GPUs learn and which sample, the learner's mesh, and whether it fits: a model in closed form, for searching.

Imports no jax.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lnjax.errors import ConfigError
from lnjax.planner.counts import kinds, kv_bytes_per_token, num_params
from lnjax.planner.hardware import Hardware
from lnjax.schema import EmbeddedConfig, GrpoConfig, MeshConfig, ModelSpec, RunConfig, SftConfig, VllmConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2}
KEPT = {"full": 0.0, "dots": 1.0, "none": 2.5}
"""Share of what a block's matmuls give (and, without remat, of what lies between) that is kept for the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step of a stage asks for."""

    stage: str
    row_tokens: int
    rows: int
    """Packed rows of one update."""
    updates: int
    segment_tokens: int
    """Length of a sequence inside a row."""
    steps: int
    sequences: int = 0
    """Rollouts of a step; 0 for SFT, as the next three."""
    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reference: bool = False
    asynchronous: bool = False


def work_of(c: RunConfig, *, mean_tokens: int = 0) -> Work:
    """Of the run's last stage. `mean_tokens`: average completion; 0 takes the longest allowed, which is the worst case."""
    if c.grpo is None:
        if c.sft is None:
            raise ConfigError(f"{c.name} has neither an sft nor a grpo stage, and others cannot be planned yet")
        tokens = c.sft.pack.row_tokens
        segment = min(mean_tokens or tokens, tokens)
        return Work(
            stage="sft", row_tokens=tokens, rows=c.sft.batch_rows, updates=1, segment_tokens=segment, steps=c.sft.steps
        )
    g = c.grpo
    prompt, longest = g.prompts.max_prompt_tokens, g.sampling.max_new_tokens
    new = min(mean_tokens or longest, longest)
    per_row = min(g.pack.row_tokens // (prompt + new), g.pack.max_segments)
    sequences = g.prompts_per_step * g.samples_per_prompt
    return Work(
        stage="grpo",
        row_tokens=g.pack.row_tokens,
        rows=-(-sequences // g.updates_per_step // per_row),
        updates=g.updates_per_step,
        segment_tokens=prompt + new,
        steps=g.steps,
        sequences=sequences,
        prompts=g.prompts_per_step,
        prompt_tokens=prompt,
        new_tokens=new,
        reference=g.loss.kl_coef > 0,
        asynchronous=g.max_staleness > 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A complete choice. The mesh has no -1."""

    mesh: MeshConfig
    microbatch_rows: int
    remat: str
    servers: int
    """Of rollouts; 0 where the learner's GPUs sample, or nothing does."""
    tensor_parallel: int

    @property
    def learner_gpus(self) -> int:
        return math.prod(mesh_sizes(self.mesh).values())

    @property
    def shards(self) -> int:
        """Of each parameter, at most."""
        return self.learner_gpus // self.mesh.data

    @property
    def gpus(self) -> int:
        return self.learner_gpus + self.servers * self.tensor_parallel

    def text(self) -> str:
        mesh = " x ".join(f"{a} {n}" for a, n in mesh_sizes(self.mesh).items() if n > 1) or "one GPU"
        return f"{self.learner_gpus} learn ({mesh}), {self.servers * self.tensor_parallel} sample"


def mesh_sizes(m: MeshConfig) -> dict[str, int]:
    return {"data": m.data, "fsdp": m.fsdp, "context": m.context, "tensor": m.tensor}


def stage_config(c: RunConfig, stage: str) -> GrpoConfig | SftConfig:
    found = c.grpo if stage == "grpo" else c.sft
    assert found
    return found


def apply_layout(c: RunConfig, layout: Layout, *, stage: str) -> RunConfig:
    """The config with the learner's part of the layout written into it."""
    part = stage_config(c, stage)
    changed = replace(part, pack=replace(part.pack, microbatch_rows=layout.microbatch_rows))
    return replace(c, mesh=layout.mesh, model=replace(c.model, remat=layout.remat), **{stage: changed})


def layout_as_written(c: RunConfig, *, stage: str, learner_gpus: int = 0) -> Layout | None:
    """What the config says, or None where its mesh leaves an axis open and `learner_gpus` does not close it."""
    sizes = mesh_sizes(c.mesh)
    if -1 in sizes.values():
        rest = math.prod(size for size in sizes.values() if size != -1)
        if not learner_gpus or learner_gpus % rest:
            return None
        sizes = {axis: learner_gpus // rest if n == -1 else n for axis, n in sizes.items()}
    sampling = stage == "grpo" and isinstance(c.engine, VllmConfig)
    servers = len(c.engine.addresses) or c.engine.num_servers if sampling and isinstance(c.engine, VllmConfig) else 0
    return Layout(
        mesh=MeshConfig(**sizes),
        microbatch_rows=stage_config(c, stage).pack.microbatch_rows,
        remat=c.model.remat,
        servers=servers,
        tensor_parallel=c.engine.tensor_parallel if isinstance(c.engine, VllmConfig) else 1,
    )


def impossible(spec: ModelSpec, layout: Layout, work: Work) -> str:
    """Empty, or the dimension that the mesh does not divide."""
    m = layout.mesh
    checks = [("model width (embed)", spec.d_model, m.fsdp * m.context, "fsdp x context")]
    checks += [("vocabulary", spec.vocab_size, m.tensor, "tensor")]
    for (kv_heads, ffn), _ in kinds(spec):
        checks += [("number of kv heads", kv_heads, m.tensor, "tensor"), ("ffn width", ffn, m.tensor, "tensor")]
    checks += [("row of tokens", work.row_tokens, m.context, "context")]
    checks += [("rows of a microbatch", layout.microbatch_rows, m.data * m.fsdp, "data x fsdp")]
    if work.stage == "sft":
        checks += [("rows of an update", work.rows, layout.microbatch_rows, "rows of a microbatch")]
    for what, size, share, axes in checks:
        if size % share:
            return f"the {what}, {size}, does not divide over {share} ({axes})"
    return ""


def state_bytes(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work) -> float:
    """Master weights, AdamW's moments, accumulated gradients and the reference, on one GPU."""
    itemsize = ITEMSIZE[c.model.param_dtype]
    return num_params(spec) * (3 * itemsize + 4 + itemsize * work.reference) / layout.shards


def engine_bytes(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work) -> float:
    """The embedded engine's weights and KV cache on one GPU of the learner."""
    e = c.engine
    if work.stage != "grpo" or not isinstance(e, EmbeddedConfig):
        return 0.0
    cache = e.num_slots * e.max_len * kv_bytes_per_token(spec, itemsize=ITEMSIZE[e.dtype]) / layout.learner_gpus
    return num_params(spec) * ITEMSIZE[e.dtype] / layout.mesh.tensor + cache * layout.mesh.context


def activation_bytes(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work) -> float:
    """What one microbatch's forward and backward pass hold besides the state, on one GPU: the largest moment.

    Kept between the passes: the residual stream at every block (full remat), and what matmuls gave (dots). At work: the
    widest block with its gathered kernels, their gradients and its activations, or the head.
    """
    m, item, d = layout.mesh, ITEMSIZE[c.model.compute_dtype], spec.d_model
    rows = layout.microbatch_rows // (m.data * m.fsdp)
    tokens = rows * work.row_tokens / m.context
    heads = spec.num_heads * spec.head_dim
    kept = len(spec.blocks) * tokens * d * item / m.tensor
    widest = 0.0
    for (kv_heads, ffn), count in kinds(spec):
        attention = (2 * heads + 2 * kv_heads * spec.head_dim) * bool(kv_heads)
        kernels, inside = d * max(attention, 3 * ffn), tokens * (attention + 3 * ffn)
        kept += count * inside * item / m.tensor * KEPT[layout.remat]
        widest = max(widest, 2 * (kernels + inside) * item / m.tensor + 3 * tokens * d * item)
    head = spec.vocab_size * d * (item + 4) / m.tensor + tokens * d * (item + 8)
    gradients = num_params(spec) * 4 / layout.shards
    return kept + max(widest + gradients, head)


def device_bytes(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work) -> float:
    """Everything on the fullest GPU of the learner."""
    return sum(part(c, spec, layout, work) for part in (state_bytes, engine_bytes, activation_bytes))


def candidates(c: RunConfig, spec: ModelSpec, work: Work, *, gpus: int, hw: Hardware) -> Iterator[Layout]:
    """Every layout on at most `gpus` GPUs that the model's dimensions divide."""
    fleet = work.stage == "grpo" and isinstance(c.engine, VllmConfig)
    parallel = c.engine.tensor_parallel if isinstance(c.engine, VllmConfig) else 1
    powers = [2**i for i in range(11)]
    for learner in range(1, gpus + 1):
        if learner > hw.gpus_per_node and learner % hw.gpus_per_node:
            continue
        servers = (gpus - learner) // parallel if fleet else 0
        if fleet and servers < 1:
            continue
        for tensor, context in itertools.product(powers[:4], powers[:4]):
            if tensor * context > hw.gpus_per_node or learner % (tensor * context):
                continue
            outer = learner // (tensor * context)
            for fsdp in (p for p in powers if outer % p == 0):
                for rows, remat in itertools.product((1, 2, 4), ("full", "dots", "none")):
                    layout = Layout(
                        mesh=MeshConfig(data=outer // fsdp, fsdp=fsdp, context=context, tensor=tensor),
                        microbatch_rows=outer * rows,
                        remat=remat,
                        servers=servers,
                        tensor_parallel=parallel,
                    )
                    if outer * rows < 2 * work.rows and not impossible(spec, layout, work):
                        yield layout


def no_layout(gpus: int, spec: ModelSpec, hw: Hardware) -> ConfigError:
    return ConfigError(
        f"{num_params(spec) / 1e9:.1f} B parameters do not train on {gpus} GPUs of {hw.plan_bytes / 2**30:.0f} GiB in any "
        "mesh that divides the model's dimensions and the batch; give --nodes more, or shorter rows"
    )
