"""Our side of each case: the same programs that the loops run, on the shape's work. Each builder returns a Side."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lnjax import grpo, sft
from lnjax.bench import shapes
from lnjax.bench.shapes import Shape
from lnjax.build import build_model
from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.publish import Publisher
from lnjax.data.packing import microbatches
from lnjax.data.packing import pack as pack_rows
from lnjax.mesh import make_mesh, put_rows
from lnjax.models.decoder import Model
from lnjax.models.hf import hf_config
from lnjax.models.rope import rope_tables
from lnjax.planner.counts import block_params, flops_per_token, matmul_flops_per_token
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.rollout.vllm import VllmEngine
from lnjax.schema import (
    AdvantageConfig,
    EmbeddedConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OpsConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    SftDataConfig,
    VllmConfig,
)
from lnjax.types import Completion, Prompt, Rollout, RolloutEngine, RolloutGroup, Sample, SamplingParams, Score

RATE = 1e-5
GREEDY = 8
"""Tokens compared before decoding is timed."""


@dataclass(frozen=True, slots=True)
class Side:
    """What can be timed, each item by its name."""

    first: Mapping[str, Any]
    """What the arms must agree on before any time is taken."""
    items: Mapping[str, Callable[[int], Any]]
    """item(k) does step k and returns arrays to wait for."""
    tokens: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Real tokens of one step."""
    flops: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    """Of the steps in turn, by the project's convention."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Work:
    shape: Shape
    ops: OpsConfig
    folder: Path
    """Where the other arms find weights and tokens."""
    dense: bool
    shared: bool
    """Whether there are any."""
    seed: int = 0

    def mesh(self) -> Mesh:
        """One GPU, as the other arms have, or a CPU as the shape has it."""
        devices = jax.devices()[: self.shape.cpu_devices if jax.default_backend() == "cpu" else 1]
        return make_mesh(MeshConfig(data=len(devices), fsdp=1), devices=devices)

    def model(self) -> Model:
        s = self.shape
        lora = LoraConfig(rank=s.lora_rank)
        c = ModelConfig(spec=s.spec, compute_dtype=s.dtype, remat=s.remat, lora=lora)
        c = RunConfig(name="bench", model=c, ops=self.ops)
        return build_model(c, spec=self.shape.spec, mesh=self.mesh())

    def params(self, model: Model, *, dtype: str) -> Any:
        """Random weights that the shape's dtype holds exactly, written in it for the other arms."""
        params = model.init_params(jax.random.key(self.seed), dtype=jnp.dtype(self.shape.dtype))
        if self.shared:
            folder = self.folder / "weights"
            save_hf(params, spec=self.shape.spec, folder=folder, dtype=self.shape.dtype, finish=lambda _: None)
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def start(self, model: Model) -> tuple[Any, Any]:
        """(what is trained, in float32; what lies below adapters)."""
        if not model.lora:
            return self.params(model, dtype="float32"), {}
        adapters = model.init_adapters(jax.random.key(self.seed), dtype=jnp.dtype("float32"))
        return adapters, self.params(model, dtype=self.shape.dtype)

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=RATE, b2=0.999)  # as torch.optim.AdamW, without decay


def train(w: Work) -> Side:
    """One SFT update over a batch of conversations, packed. A CPU is two devices: their gradients meet once an update."""
    s = dataclasses.replace(w.shape, cpu_devices=2)
    model = dataclasses.replace(w, shape=s).model()
    pack = PackConfig(row_tokens=s.row_tokens, microbatch_rows=s.microbatch_rows)
    c = SftConfig(
        data=SftDataConfig(source="arithmetic"), steps=10**6, batch_rows=0, pack=pack, optimizer=w.optimizer()
    )
    updater = sft.build_updater(model, c, dtype=jnp.float32)
    batches, tokens, flops = [], [], []
    arrays: dict[str, Any] = {}
    for i, batch in enumerate(shapes.conversations(s, seed=w.seed, dense=w.dense)):
        sizes = np.array([len(x.token_ids) for x in batch], np.float64)
        tokens.append(sizes.sum())
        each = flops_per_token(s.spec, context=(sizes**2).sum() / sizes.sum())
        # A kernel below an adapter has no gradient: a third of its products are not made.
        flops.append(sizes.sum() * (each - (matmul_flops_per_token(s.spec) / 3 if model.lora else 0)))
        rows = shapes.packed(s, batch).batch()
        batches.append(put_rows(model.compute.ops.mesh, microbatches(rows, rows=s.microbatch_rows)))
        arrays |= {f"{f.name}_{i}": getattr(rows, f.name) for f in dataclasses.fields(rows)}
        for j, x in enumerate(batch):
            arrays |= {f"ids_{i}_{j}": np.array(x.token_ids), f"mask_{i}_{j}": np.array(x.loss_mask)}
    np.savez(w.folder / "work.npz", **arrays)
    trained, frozen = w.start(model)
    kept = {"state": updater.init(trained, step=0, rng=jax.random.key(1))}

    def update(k: int) -> Any:
        kept["state"], stats = updater.update(kept["state"], batches[k % len(batches)], frozen)
        return stats

    first = {name: float(x) for name, x in update(0).items() if name in ("loss", "grad_norm")}
    count = len(batches)
    return Side(first, {"step": update}, {"step": sum(tokens) / count}, {"step": flops})


def logprob(w: Work) -> Side:
    """Logprobs of every token of whole rows, as before an update."""
    s, model = w.shape, w.model()
    batch = shapes.conversations(s, seed=w.seed, dense=True)[0]
    rows = shapes.packed(s, batch).batch()
    np.savez(w.folder / "work.npz", tokens=rows.tokens_BT)
    parts = put_rows(model.compute.ops.mesh, microbatches(rows, rows=s.microbatch_rows))
    params = w.params(model, dtype=s.dtype)
    run = jax.jit(lambda p, x: model.logprobs(p, x.tokens_BT, x.positions_BT, x.segment_ids_BT).logprobs_BT)

    def score(k: int) -> Any:
        return [run(params, x) for x in parts]

    tokens = rows.tokens_BT.size
    flops = tokens * flops_per_token(s.spec, context=s.row_tokens) / 3
    mean = float(np.mean([np.asarray(x).mean() for x in score(0)]))
    return Side({"loss": -mean}, {"pass": score}, {"pass": tokens}, {"pass": [flops]})


def _engine(w: Work, model: Model, *, slots: int) -> EmbeddedEngine:
    length = w.shape.prompt_tokens + w.shape.new_tokens
    c = EmbeddedConfig(
        num_slots=slots,
        max_len=-(-length // 64) * 64,
        decode_chunk=32,
        prefill_rows=w.shape.prompts,
        dtype=w.shape.dtype,
    )
    return EmbeddedEngine(model, c=c, key=jax.random.key(w.seed))


def _sampling(new_tokens: int, *, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature, 1.0, 0, new_tokens, ())


def _prompts(w: Work) -> list[Prompt]:
    ids = shapes.prompt_ids(w.shape, seed=w.seed)
    np.savez(w.folder / "work.npz", prompts=np.array(ids))
    return [Prompt(f"bench/{i}", x, "", {}) for i, x in enumerate(ids)]


def decode(w: Work) -> Side:
    """All samples of all prompts at once, to the full length; on a GPU also one sequence alone."""
    s, model, prompts = w.shape, w.model(), _prompts(w)
    params = w.params(model, dtype=s.dtype)
    many, alone = s.prompts * s.samples, jax.default_backend() == "gpu"
    engines = {f"batch {n}": _engine(w, model, slots=n) for n in ((many, 1) if alone else (many,))}
    for engine in engines.values():
        engine.load_weights(0, params)
    del params

    def sample(k: int, *, name: str) -> Any:
        n = (s.prompts, s.samples) if name != "batch 1" else (1, 1)
        engines[name].generate(prompts[: n[0]], num_samples=n[1], sampling=_sampling(s.new_tokens), seed=k)

    items = {name: functools.partial(sample, name=name) for name in engines}
    tokens = {name: s.new_tokens * (many if name != "batch 1" else 1) for name in engines}
    return Side(_greedy(engines[f"batch {many}"], prompts), items, tokens)


def _greedy(engine: RolloutEngine, prompts: list[Prompt]) -> dict[str, Any]:
    found = engine.generate(prompts, num_samples=1, sampling=_sampling(GREEDY, temperature=0.0), seed=0)
    return {"tokens": [list(x.token_ids) for group in found for x in group]}


def reinforce(w: Work) -> Side:
    """One whole GRPO iteration: sample, reward, credit, pack, update, publish."""
    s, model, prompts = w.shape, w.model(), _prompts(w)
    group = s.prompt_tokens + s.samples * (s.new_tokens + 1)  # a row holds a prompt and all its completions
    c = GrpoConfig(
        prompts=PromptConfig(source="bench"),
        prompts_per_step=s.prompts,
        samples_per_prompt=s.samples,
        steps=10**6,
        sampling=SamplingConfig(max_new_tokens=s.new_tokens),
        advantage=AdvantageConfig(baseline="group_mean"),
        pack=PackConfig(row_tokens=-(-group // 8) * 8, microbatch_rows=w.mesh().size),
        optimizer=w.optimizer(),
    )
    engine, updater = _engine(w, model, slots=s.prompts * s.samples), grpo.build_updater(model, c, dtype=jnp.float32)
    trained, frozen = w.start(model)
    kept = {"state": updater.init(trained, step=0, rng=jax.random.key(1))}
    engine.load_weights(0, model.merged(frozen | kept["state"].params))
    first = _greedy(engine, prompts)

    def iteration(k: int) -> Any:
        completions = engine.generate(prompts, num_samples=s.samples, sampling=_sampling(s.new_tokens), seed=k)
        groups = [
            RolloutGroup(p, tuple(Rollout(p, x, reward(x)) for x in group))
            for p, group in zip(prompts, completions, strict=True)
        ]
        rows = put_rows(model.compute.ops.mesh, grpo.pack_part(grpo.credit(groups, c=c), c=c, first=True))
        kept["state"], stats = updater.update(kept["state"], rows, frozen)
        engine.load_weights(k + 1, model.merged(frozen | kept["state"].params))
        return stats

    return Side(first, {"iteration": iteration}, {"iteration": s.prompts * s.samples * s.new_tokens})


def reward(x: Completion) -> Score:
    """Share of even token ids: a rule that costs nothing and tells samples apart."""
    return Score(sum(t % 2 == 0 for t in x.token_ids) / len(x.token_ids))


def sync(w: Work) -> Side:
    """A new policy published, read by a vLLM server, checked, applied and attested."""
    s, model, prompts = w.shape, w.model(), _prompts(w)
    c = VllmConfig(max_len=s.prompt_tokens + s.new_tokens, dtype=s.dtype, max_sequences=s.prompts)
    publisher = Publisher(
        w.folder / "published",
        spec=s.spec,
        mesh=w.mesh(),
        dtype=jnp.dtype(s.dtype),
        keep=c.keep_versions,
        deadline_s=c.swap_deadline_s,
        tensor_parallel=c.tensor_parallel,
    )
    params, change = w.params(model, dtype=s.dtype), jax.jit(lambda p, by: jax.tree.map(lambda x: x * by, p))
    note = functools.partial(print, file=sys.stderr)
    engine = VllmEngine(c, publisher=publisher, model=hf_config(s.spec, dtype=s.dtype), run_dir=w.folder, note=note)

    def policy(k: int) -> None:
        engine.load_weights(k + 1, change(params, jnp.asarray(1 + 1e-3 * k, s.dtype)))

    try:
        policy(0)
        return Side(_greedy(engine, prompts), {"policy": policy}, close=engine.close)
    except BaseException:
        engine.close()
        raise


def packing(w: Work) -> Side:
    """The gradient of the same tokens: conversations packed or one a row, groups that share their prompt or do not.

    A group is a prompt and samples of half its length each. FLOPs are those that are made: the blocks' for whole rows, head and
    attention for what is there.
    """
    s, model = w.shape, w.model()
    params, draw, half = w.params(model, dtype="float32"), np.random.default_rng(w.seed), s.prompt_tokens // 2
    pack = PackConfig(row_tokens=s.row_tokens, microbatch_rows=s.microbatch_rows)
    sums = sft.build_updater(
        model,
        SftConfig(data=SftDataConfig(source="bench"), steps=1, batch_rows=0, pack=pack, optimizer=w.optimizer()),
        dtype=jnp.float32,
    )
    c = GrpoConfig(
        prompts=PromptConfig(source="bench"), prompts_per_step=s.prompts, samples_per_prompt=s.samples, steps=1,
        sampling=SamplingConfig(max_new_tokens=half), pack=pack, optimizer=w.optimizer(),
    )  # fmt: skip
    groups = [
        [
            Sample(p + tuple(draw.integers(0, s.spec.vocab_size, half).tolist()), (0,) * len(p) + (1,) * half,
                   (-8.0,) * (len(p) + half), float(draw.normal()))
            for _ in range(s.samples)
        ]
        for p in shapes.prompt_ids(s, seed=w.seed)
    ]  # fmt: skip
    talks = [[x] for x in shapes.conversations(s, seed=w.seed, dense=False)[0]]
    items, flops, put = {}, {}, functools.partial(put_rows, model.compute.ops.mesh)
    fixed, blocks = matmul_flops_per_token(s.spec), 6 * block_params(s.spec)
    made = [(len(x.token_ids), sum(x.loss_mask)) for (x,) in talks]
    apart = sum(n * (flops_per_token(s.spec, context=n) - fixed) + wanted * (fixed - blocks) for n, wanted in made)
    for name, limit in (("packed", pack.max_segments), ("padded", 1)):
        rows = pack_rows(talks, c=dataclasses.replace(pack, max_segments=limit)).batch()
        batches = put(microbatches(rows, rows=s.microbatch_rows))
        items[name] = functools.partial(lambda b, k: sums.gradient(params, b), batches)
        flops[name] = [int((rows.segment_ids_BT > 0).any(1).sum()) * s.row_tokens * blocks + apart]
    updater = grpo.build_updater(model, c, dtype=jnp.float32)
    for name, share in (("prompts shared", True), ("prompts alone", False)):
        shared = dataclasses.replace(c, pack=dataclasses.replace(pack, share_prompts=share))
        batches = put(grpo.pack_part(groups, c=shared, first=True))
        items[name] = functools.partial(lambda b, k: updater.gradient(params, b), batches)
    tokens: dict[str, float] = dict.fromkeys(("packed", "padded"), sum(len(x.token_ids) for (x,) in talks))
    tokens |= dict.fromkeys(("prompts shared", "prompts alone"), sum(len(x.token_ids) for g in groups for x in g))
    return Side({}, items, tokens, flops)


def kernels(w: Work) -> Side:
    """Forward and backward of one layer, the head, and attention alone."""
    one = dataclasses.replace(w.shape.spec, blocks=w.shape.spec.blocks[:1], num_source_layers=1)
    s = dataclasses.replace(w.shape, spec=one)
    model = dataclasses.replace(w, shape=s).model()
    spec, dtype = s.spec, jnp.dtype(s.dtype)
    keys, tokens = jax.random.split(jax.random.key(w.seed), 8), s.microbatch_rows * s.row_tokens
    heads, kv = spec.num_heads, spec.blocks[0].attention.num_kv_heads if spec.blocks[0].attention else 1
    shape, rows = (s.microbatch_rows, s.row_tokens), w.mesh().size
    x = jax.random.normal(keys[0], (*shape, spec.d_model), dtype)
    ids = jax.random.randint(keys[1], shape, 0, spec.vocab_size)
    table = 0.02 * jax.random.normal(keys[2], (spec.vocab_size, spec.d_model), dtype)
    q, k, v = (
        jax.random.normal(key, (*shape, n, spec.head_dim), dtype)
        for key, n in zip(keys[3:6], (heads, kv, kv), strict=True)
    )
    ones, params = jnp.ones(shape, jnp.int32), model.init_params(keys[6], dtype=dtype)
    ops = model.compute.ops

    def layer(params, x):
        return _one_layer(model, params, x, ones).astype(jnp.float32).mean()

    def head(x, table):
        return ops.head(x, table, ids[:rows], temperature=1.0, wanted_BT=None).logprobs_BT.mean()

    runs = {
        "matmul": (
            jax.jit(lambda x, w: ops.matmul(x, w, ("embed", "ffn"))),
            (x, params["runs"]["0"]["ffn"]["gate"][0]),
        ),
        "attention": (jax.jit(lambda q, k, v: ops.attention(q, k, v, ones)), (q, k, v)),
        "attention both": (
            jax.jit(jax.grad(lambda q, k, v: ops.attention(q, k, v, ones).astype(jnp.float32).sum(), (0, 1, 2))),
            (q, k, v),
        ),
        "head both": (jax.jit(jax.value_and_grad(head, (0, 1))), (x[:rows], table)),
        "layer both": (jax.jit(jax.grad(layer, (0, 1))), (params["runs"], x)),
    }
    ffn = spec.blocks[0].ffn.width if spec.blocks[0].ffn else 0
    scores = 2 * s.microbatch_rows * s.row_tokens**2 * heads * spec.head_dim  # causal: half of 4 T^2
    flops = {
        "matmul": 2 * tokens * spec.d_model * ffn,
        "attention": scores,
        "attention both": 3.5 * scores,
        "head both": 6 * rows * s.row_tokens * spec.d_model * spec.vocab_size,
        "layer both": tokens * (flops_per_token(spec, context=s.row_tokens) - 6 * spec.vocab_size * spec.d_model),
    }
    items = {name: functools.partial(lambda f, a, k: f(*a), f, a) for name, (f, a) in runs.items()}
    return Side({}, items, dict.fromkeys(items, tokens), {name: [x] for name, x in flops.items()})


def _one_layer(model: Model, runs: Any, x: Any, segments: Any) -> Any:
    """The first block on hidden states."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    rope, c = rope_tables(model.spec, positions), model.compute
    block = model.layers({"layers": [jax.tree.map(lambda a: a[0], runs["0"])]})[0]
    return block(x, rope, lambda q, k, v: c.ops.attention(q, k, v, segments), c)


CASES: Mapping[str, Callable[[Work], Side]] = {
    "sft": train,
    "sft-dense": train,
    "logprob": logprob,
    "decode": decode,
    "grpo": reinforce,
    "packing": packing,
    "ops": kernels,
    "sync": sync,
}
