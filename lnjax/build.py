"""What every loop needs, built once from the config: what can fail, fails here, before any training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lnjax.checkpoint.load import load_weights, read_num_scores, read_spec
from lnjax.checkpoint.publish import Publisher
from lnjax.data.tokenizer import Tokenizer, load_tokenizer
from lnjax.environment import Calculator, Environment, TurnEngine
from lnjax.errors import ConfigError
from lnjax.mesh import check_divisible, make_mesh
from lnjax.metrics import MetricsLog
from lnjax.models.decoder import Compute, Model
from lnjax.models.hf import hf_config
from lnjax.models.lora import check_lora
from lnjax.models.reward import RewardModel
from lnjax.ops.cudnn import MAX_DOCUMENTS
from lnjax.ops.select import check_ops, select_ops
from lnjax.record import RolloutRecord
from lnjax.rewards.served import ServedScorer
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.rollout.first import FirstEngine
from lnjax.rollout.vllm import VllmEngine
from lnjax.schema import BlockSpec, EmbeddedConfig, ModelConfig, ModelSpec, PackConfig, RunConfig, SamplingConfig
from lnjax.score import LocalScorer, ModelScores
from lnjax.stages import stages_of
from lnjax.types import RolloutEngine, SamplingParams


@dataclass(frozen=True, slots=True)
class Built:
    """Everything of a run that does not change while it trains."""

    config: RunConfig
    run_dir: Path
    mesh: Mesh
    model: Model
    tokenizer: Tokenizer
    key: Array
    """Base of every random draw: `fold_in` a purpose (KEY_*) and go on from there."""
    environment: Environment | None = None
    """What answers the policy between its turns."""

    @property
    def param_dtype(self) -> Any:
        return jnp.dtype(self.config.model.param_dtype)

    def sampling(self, c: SamplingConfig) -> SamplingParams:
        return SamplingParams(c.temperature, c.top_p, c.top_k, c.max_new_tokens, self.tokenizer.stop_token_ids)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a loop acts on and whoever built it closes."""

    log: MetricsLog
    store: Any
    engine: RolloutEngine
    reward: Any
    publisher: Publisher | None
    """Where a fleet's weights are written; None for an engine in this process."""
    streams: Mapping[str, Any]
    """Data of each stage by its name, and the held-out prompts under `eval`: read and checked before anything is written."""
    record: RolloutRecord
    frozen: dict[str, Any] = field(default_factory=dict)
    """Weights below the adapters of a LoRA run: with the trained ones they are what the model computes with."""
    parity: dict[str, float] = field(default_factory=dict)
    """Agreement of servers and learner over the whole process, for summary.json."""


CHECKPOINT_DECIDES = ("max_position", "bos_token_id", "eos_token_ids", "initializer_range")
"""Of a spec: what no weight depends on. A checkpoint may differ from the config's spec there, and is believed."""
KEY_INIT, KEY_ENGINE, KEY_STATE, KEY_LORA = range(4)
"""Purposes folded into the base key."""


def tokenizer_source(c: ModelConfig) -> str:
    return c.source if c.tokenizer == "same" else c.tokenizer


def model_spec(c: ModelConfig) -> ModelSpec:
    """The architecture. Raises ConfigError where the checkpoint is of another than the config's."""
    if c.source == "random":
        if c.spec is None:
            raise ConfigError("model.source=random needs model.spec; give one in the config or another --model.source")
        return c.spec
    found = read_spec(c.source)
    if c.spec is not None:
        for field in dataclasses.fields(ModelSpec):
            wanted, got = getattr(c.spec, field.name), getattr(found, field.name)
            if wanted != got and field.name not in CHECKPOINT_DECIDES:
                detail = _differ(wanted, got) if field.name == "blocks" else f"{field.name} is {got}, not {wanted}"
                raise ConfigError(
                    f"{c.source} is another model than the config's: {detail}; give the folder of that model "
                    "(--model.source) or use its own config"
                )
    return found


def _differ(wanted: Sequence[BlockSpec], got: Sequence[BlockSpec]) -> str:
    pairs = [(i, w, g) for i, (w, g) in enumerate(zip(wanted, got, strict=False)) if w != g]
    if not pairs:
        return f"it has {len(got)} blocks, not {len(wanted)}"
    i, w, g = pairs[0]
    return f"block {i} is {g}, not {w}"


def build(c: RunConfig, run_dir: Path) -> Built:
    """Mesh, kernels, architecture, tokenizer. Reads no weights."""
    mesh = make_mesh(c.mesh)
    local = "reward.model" if c.reward.model and not c.reward.model.served else ""
    beside = "the embedded engine" if isinstance(c.engine, EmbeddedConfig) else local
    if c.grpo and c.grpo.max_staleness and beside and jax.process_count() > 1:
        raise ConfigError(
            f"grpo.max_staleness={c.grpo.max_staleness}: {beside} cannot run beside updates in a run of "
            f"{jax.process_count()} processes, whose programs must run in one order; use 0, one process, or servers"
        )
    check_ops(c.ops)
    check_lora(c.model.lora)
    if c.model.lora.rank and c.reward_model:
        raise ConfigError(
            f"model.lora.rank={c.model.lora.rank}: reward_model trains all weights below its head; use --model.lora.rank 0"
        )
    spec = model_spec(c.model)
    tokenizer = load_tokenizer(tokenizer_source(c.model))
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer_source(c.model)} has {tokenizer.vocab_size} ids, the model's vocabulary "
            f"{spec.vocab_size}; use the model's own tokenizer (--model.tokenizer same)"
        )
    calculator = Calculator(tokenizer) if c.environment.kind == "calculator" else None
    return Built(c, run_dir, mesh, build_model(c, spec=spec, mesh=mesh), tokenizer, jax.random.key(c.seed), calculator)


def build_model(c: RunConfig, *, spec: ModelSpec, mesh: Mesh) -> Model:
    """The architecture with its kernels on a mesh. Raises ConfigError naming a dimension that the mesh does not divide."""
    compute = Compute(select_ops(c.ops, mesh=mesh), jnp.dtype(c.model.compute_dtype), c.model.remat)
    model = Model(spec, compute, c.model.lora if c.model.lora.rank else None)
    model.abstract_params(dtype=jnp.dtype(c.model.param_dtype))
    for name, stage in stages_of(c):
        rows = (stage.pack.microbatch_rows, stage.pack.row_tokens)
        check_divisible(mesh, name=f"{name}.pack", shape=rows, logical=("batch", "positions"))
        if c.ops.attention != "xla":
            _check_documents(name, stage.pack, kernel=f"ops.attention={c.ops.attention}")
    return model


def _check_documents(stage: str, c: PackConfig, *, kernel: str) -> None:
    if stage != "sft" and (stage != "grpo" or c.share_prompts):
        way = "use --grpo.pack.share-prompts false" if stage == "grpo" else "use --ops.attention xla"
        raise ConfigError(f"{kernel} knows no shared prompts, which the rows of {stage} have; {way}")
    if c.max_segments > MAX_DOCUMENTS:
        raise ConfigError(
            f"{kernel} takes {MAX_DOCUMENTS} sequences a row; use --{stage}.pack.max-segments {MAX_DOCUMENTS}"
        )


def initial_params(b: Built, *, dtype: Any) -> Any:
    """Random or loaded weights, sharded."""
    if b.config.model.source == "random":
        return b.model.init_params(jax.random.fold_in(b.key, KEY_INIT), dtype=dtype)
    return load_weights(b.config.model.source, spec=b.model.spec, dtype=dtype, shardings=b.model.shardings())


def initial_trained(b: Built) -> Any:
    """What the first stage begins with: master weights, or new adapters."""
    if b.model.lora:
        return b.model.init_adapters(jax.random.fold_in(b.key, KEY_LORA), dtype=b.param_dtype)
    return initial_params(b, dtype=b.param_dtype)


def frozen_params(b: Built) -> Any:
    """The weights below adapters, in the dtype that the model casts them to anyway; `{}` where all are trained."""
    return initial_params(b, dtype=b.model.compute.dtype) if b.model.lora else {}


def build_scores(b: Built, inner: Any) -> Any:
    """`inner`, and the config's reward model where it has one. Raises ConfigError for a folder without, or other tokens;
    RolloutError for a server that gives no scores. Collective."""
    c = b.config.reward.model
    if c is None:
        return inner
    served = ServedScorer(c, step_deadline_s=b.config.cluster.step_deadline_s) if c.served else None
    num_scores = served.check() if served else read_num_scores(c.source)
    if not num_scores:
        raise ConfigError(f"{c.source}: no reward model; give the folder of a run whose last stage is reward_model")
    if c.weights and len(c.weights) != num_scores:
        raise ConfigError(f"reward.model.weights has {len(c.weights)} numbers, the model {num_scores} scores")
    scorer = served or _local_scorer(b, c.source, num_scores=num_scores, pack=c.pack)
    return ModelScores(inner, scorer, weights=c.weights or (1.0, *(0.0,) * (num_scores - 1)))


def _local_scorer(b: Built, source: str, *, num_scores: int, pack: PackConfig | None) -> LocalScorer:
    if pack is None:
        raise ConfigError(f"reward.model.source={source} runs in this process and needs reward.model.pack; add one")
    spec = read_spec(source)
    if load_tokenizer(source).backend.get_vocab() != b.tokenizer.backend.get_vocab():
        raise ConfigError(
            f"reward.model.source={source}: its tokenizer is not the policy's; train one over these tokens"
        )
    model = RewardModel(dataclasses.replace(b.model, spec=spec), num_scores)
    params = load_weights(source, spec=spec, dtype=b.model.compute.dtype, shardings=model.shardings())
    return LocalScorer(model, params, pack=pack)


def build_engine(b: Built, *, note: Callable[[str], None]) -> tuple[RolloutEngine, Publisher | None]:
    """What the config's engine and environment sections ask for, and where its weights are written. Servers start in the
    background."""
    engine, publisher = _single_turn_engine(b, note=note)
    return TurnEngine(engine, b.environment, c=b.config.environment) if b.environment else engine, publisher


def _single_turn_engine(b: Built, *, note: Callable[[str], None]) -> tuple[RolloutEngine, Publisher | None]:
    c = b.config.engine
    if isinstance(c, EmbeddedConfig):
        return EmbeddedEngine(b.model, c=c, key=jax.random.fold_in(b.key, KEY_ENGINE)), None
    publisher = Publisher(
        Path(c.publish_dir) if c.publish_dir else b.run_dir / "weights",
        spec=b.model.spec,
        mesh=b.mesh,
        dtype=jnp.dtype(c.dtype),
        keep=c.keep_versions + (b.config.grpo.max_staleness if b.config.grpo else 0),
        deadline_s=c.swap_deadline_s,
        tensor_parallel=c.tensor_parallel,
    )
    engine = None
    if jax.process_index() == 0:
        config = hf_config(b.model.spec, dtype=c.dtype)
        engine = VllmEngine(c, publisher=publisher, model=config, run_dir=b.run_dir, note=note)
        if jax.process_count() == 1:
            return engine, publisher
    return FirstEngine(engine, publisher=publisher, deadline_s=b.config.cluster.step_deadline_s), publisher
