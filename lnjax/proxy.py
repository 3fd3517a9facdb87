"""The same recipe, small enough to run anywhere: what `--proxy` makes of a config. Imports no jax.

Kept: the model's kinds of blocks (absent, unequal and fused parts) in their order, the mesh axes, the stages, sampling,
advantages and loss, updates per rollout, the curriculum, the format reward and, where there is one, the judge over HTTP.
Replaced: widths, how often a kind of block comes, weights (random), tokenizer and data (generated arithmetic or
instructions), the fleet (by the engine in this process), batch sizes, lengths, steps and learning rates. A run of GRPO alone
gets a short SFT stage, in place of the checkpoint that it starts from; preference and reward-model stages are left out. Every
number below is chosen, for minutes on two CPU cores.
"""

import dataclasses
import math
from dataclasses import replace

from lnjax.errors import ConfigError
from lnjax.schema import (
    AttentionSpec,
    BlockSpec,
    CheckpointConfig,
    EmbeddedConfig,
    FfnSpec,
    GrpoConfig,
    MeshConfig,
    ModelConfig,
    ModelSpec,
    OpsConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RunConfig,
    SftConfig,
    SftDataConfig,
    uniform_blocks,
)

DEVICES = 8
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
"""Of the process, before jax is imported; XLA_FLAGS after those that are set."""
D_MODEL, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 64, 4, 2, 16, 128
LEAST_BLOCKS = 8
"""Every kind of block comes equally often, and all together no fewer times than this where the model has as many."""
WIDTH_MULTIPLE = 4
PROMPTS, SAMPLES, STEPS, NUM_PROMPTS = 8, 8, 20, 240
SFT_STEPS, SFT_RATE, GRPO_RATE = 300, 3e-3, 1e-4
LENGTHS = {"arithmetic": (32, 32), "ifeval": (208, 48)}
"""Longest prompt and completion, in tokens of the built-in tokenizer."""


def proxy(c: RunConfig) -> RunConfig:
    """A run of minutes on 8 virtual CPU devices. Its name, and so its run folder, ends in `_proxy`."""
    mesh, source = _mesh(c.mesh), "arithmetic"
    if c.grpo and ("instruction" in c.grpo.prompts.source or c.grpo.prompts.source == "ifeval"):
        source = "ifeval"
    engine = EmbeddedConfig(
        num_slots=PROMPTS * SAMPLES,
        max_len=sum(LENGTHS[source]),
        decode_chunk=8,
        prefill_rows=PROMPTS,
        prefill_multiple=32,
        dtype="float32",
    )
    held_out = None
    if c.eval:
        prompts = _prompts(c.eval.prompts, source=source, num_prompts=16 * PROMPTS)
        sampling = replace(c.eval.sampling, max_new_tokens=LENGTHS[source][1])
        held_out = replace(c.eval, prompts=replace(prompts, split="heldout"), num_samples=1, sampling=sampling)
    judge = replace(c.reward.judge, address="rule") if c.reward.judge else None
    model = ModelConfig(spec=_spec(c.model.spec), tokenizer="arithmetic", compute_dtype="float32", remat=c.model.remat)
    model = replace(model, lora=c.model.lora)
    return replace(
        c,
        name=f"{c.name}_proxy",
        model=model,
        mesh=mesh,
        ops=OpsConfig(),
        engine=engine,
        reward=replace(c.reward, num_workers=1, judge=judge),
        environment=replace(c.environment, kind="none"),  # its prompts bring no tools
        sft=_sft(c, mesh=mesh),
        preference=None,
        reward_model=None,
        stages=(),
        grpo=_grpo(c.grpo, source=source, mesh=mesh) if c.grpo else None,
        eval=held_out,
        checkpoint=CheckpointConfig(every=STEPS // 2, keep=1),
    )


def _mesh(c: MeshConfig) -> MeshConfig:
    """2 for every axis but fsdp that the config splits, and what is left of the devices for fsdp."""
    axes = {f.name: 2 if getattr(c, f.name) > 1 else 1 for f in dataclasses.fields(c) if f.name != "fsdp"}
    return replace(c, **axes, fsdp=DEVICES // math.prod(axes.values()))


def _spec(c: ModelSpec | None) -> ModelSpec:
    """Some blocks of each kind, narrow. Widths keep their ratios, so unequal ones stay unequal. No spec: a small Llama."""
    if c is None:
        blocks, layers = uniform_blocks(num_layers=4, num_kv_heads=NUM_KV_HEADS, ffn=3 * D_MODEL), 4
    else:
        layers = c.num_source_layers
        blocks = tuple(
            replace(
                b,
                attention=b.attention and AttentionSpec(NUM_KV_HEADS),
                ffn=b.ffn and FfnSpec(-(-b.ffn.width * D_MODEL // c.d_model // WIDTH_MULTIPLE) * WIDTH_MULTIPLE),
            )
            for b in _some(c.blocks)
        )
    return ModelSpec(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        blocks=blocks,
        num_source_layers=layers,
        tied_embeddings=c.tied_embeddings if c else True,
        max_position=1024,
        bos_token_id=1,
        eos_token_ids=(2, 5),  # of the arithmetic tokenizer
    )


def _some(blocks: tuple[BlockSpec, ...]) -> list[BlockSpec]:
    """The first of each kind."""
    kinds = [(b.attention, b.ffn) for b in blocks]
    each = -(-LEAST_BLOCKS // len(set(kinds)))
    return [b for i, b in enumerate(blocks) if kinds[:i].count(kinds[i]) < each]


def _pack(c: PackConfig, *, source: str, mesh: MeshConfig) -> PackConfig:
    """Rows of two of the longest sequences, two a shard in a microbatch."""
    return replace(c, row_tokens=2 * sum(LENGTHS[source]), microbatch_rows=2 * mesh.data * mesh.fsdp)


def _optimizer(c: OptimizerConfig, *, rate: float, warmup_steps: int) -> OptimizerConfig:
    low = rate * c.min_learning_rate / c.learning_rate
    return replace(c, learning_rate=rate, min_learning_rate=low, warmup_steps=warmup_steps)


def _prompts(c: PromptConfig, *, source: str, num_prompts: int) -> PromptConfig:
    return replace(c, source=source, num_prompts=num_prompts, max_prompt_tokens=LENGTHS[source][0])


def _sft(c: RunConfig, *, mesh: MeshConfig) -> SftConfig:
    """The SFT stage, small; or the one that stands for a checkpoint."""
    given = c.sft or c.grpo
    if given is None:
        raise ConfigError(
            f"{c.name} has neither an sft nor a grpo stage, and others have no proxy; see configs/tiny_rpo.py"
        )
    pack = _pack(given.pack, source="arithmetic", mesh=mesh)
    steps = STEPS if c.sft else SFT_STEPS
    return SftConfig(
        data=SftDataConfig(source="arithmetic", num_examples=4000),
        steps=steps,
        batch_rows=2 * pack.microbatch_rows,
        pack=pack,
        optimizer=_optimizer(given.optimizer, rate=SFT_RATE, warmup_steps=steps // 10),
    )


def _grpo(c: GrpoConfig, *, source: str, mesh: MeshConfig) -> GrpoConfig:
    prompts_per_step = -(-PROMPTS // c.updates_per_step) * c.updates_per_step
    return replace(
        c,
        prompts=_prompts(c.prompts, source=source, num_prompts=NUM_PROMPTS),
        curriculum=c.curriculum and replace(c.curriculum, batches=STEPS),
        prompts_per_step=prompts_per_step,
        samples_per_prompt=SAMPLES,
        steps=STEPS,
        sampling=replace(c.sampling, max_new_tokens=LENGTHS[source][1]),
        pack=_pack(c.pack, source=source, mesh=mesh),
        optimizer=_optimizer(c.optimizer, rate=GRPO_RATE, warmup_steps=STEPS // 10),
    )
