"""Arithmetic of a config that must close before anything is built. Imports no jax."""

from typing import Any

from lnjax.errors import ConfigError
from lnjax.schema import OnlineConfig, PreferenceConfig, RunConfig, VllmConfig
from lnjax.stages import check_stages


def validate(c: RunConfig) -> None:
    """Arithmetic that must close before anything is built. Raises ConfigError naming the keys."""
    check_stages(c)
    if c.model.source == "random" and c.model.tokenizer == "same":
        raise ConfigError("model.source=random brings no tokenizer; set model.tokenizer")
    _positive(c, {"engine.max_len", "reward.num_workers", "reward.deadline_s", "checkpoint.keep"})
    _positive(c, {"record.groups", "record.samples", "record.tokens"})
    if c.reward.judge:
        _positive(c, {"reward.judge.deadline_s", "reward.judge.concurrency"})
        address = c.reward.judge.address
        if c.reward.judge.retries < 0 or not (address.startswith(("http://", "https://")) or address == "rule"):
            raise ConfigError(
                f"reward.judge.address={address!r}, retries={c.reward.judge.retries}; expected "
                "http://host:port or `rule`, and no negative number"
            )
    if c.reward.model:
        _positive(c, {"reward.model.deadline_s", "reward.model.concurrency"})
    _positive(c, {"cluster.start_deadline_s", "cluster.heartbeat_s", "cluster.step_deadline_s"})
    if isinstance(c.engine, VllmConfig):
        _validate_vllm(c, c.engine)
    else:
        _positive(c, {"engine.num_slots", "engine.decode_chunk", "engine.prefill_rows", "engine.prefill_multiple"})
    if c.sft:
        _positive(c, {"sft.steps", "sft.batch_rows", "sft.pack.row_tokens", "sft.pack.microbatch_rows"})
        _positive(c, {"sft.pack.max_segments", "sft.optimizer.learning_rate"})
        _divides("sft.pack.microbatch_rows", c.sft.pack.microbatch_rows, "sft.batch_rows", c.sft.batch_rows)
    for name in ("preference", "reward_model"):
        if getattr(c, name):
            keys = ("steps", "batch_size", "pack.row_tokens", "pack.microbatch_rows", "optimizer.learning_rate")
            _positive(c, {f"{name}.{key}" for key in keys})
    if c.preference:
        _positive(c, {"preference.beta", "preference.eta"})
        if isinstance(c.preference.data, OnlineConfig):
            _validate_online(c, c.preference, c.preference.data)
    if c.grpo:
        _validate_grpo(c)
    if c.eval:
        _positive(c, {"eval.num_samples", "eval.sampling.max_new_tokens"})
        if c.eval.prompts.num_prompts < 1:
            raise ConfigError("eval.prompts.num_prompts must be at least 1: how many held-out prompts are scored")
        _fits_engine(c, "eval", c.eval.prompts.max_prompt_tokens + _room(c, "eval", c.eval.sampling))
        _sampling("eval.sampling", c.eval.sampling)


def _validate_vllm(c: RunConfig, e: VllmConfig) -> None:
    _positive(c, {"engine.tensor_parallel", "engine.max_sequences", "engine.keep_versions", "engine.max_restarts"})
    _positive(c, {f"engine.{name}_deadline_s" for name in ("start", "swap", "request", "probe")})
    if bool(e.addresses) == bool(e.num_servers):
        raise ConfigError(
            f"engine.num_servers={e.num_servers} with {len(e.addresses)} engine.addresses; either start servers here "
            "(num_servers) or attach to running ones (addresses, num_servers 0)"
        )
    if e.addresses and not e.publish_dir:
        raise ConfigError("engine.publish_dir is needed with engine.addresses: the folder their servers were given")
    if e.parity_limit <= 1:
        raise ConfigError(f"engine.parity_limit={e.parity_limit} must be above 1, which is exact agreement")


def _validate_grpo(c: RunConfig) -> None:
    g = c.grpo
    assert g
    _positive(c, {"grpo.steps", "grpo.prompts_per_step", "grpo.updates_per_step", "grpo.sampling.max_new_tokens"})
    _positive(c, {"grpo.pack.row_tokens", "grpo.pack.microbatch_rows", "grpo.pack.max_segments"})
    _positive(c, {"grpo.optimizer.learning_rate", "grpo.sampling.temperature"})
    _divides("grpo.updates_per_step", g.updates_per_step, "grpo.prompts_per_step", g.prompts_per_step)
    if g.max_staleness < 0 or (g.max_staleness > 0 and g.loss.importance_cap <= 0):
        raise ConfigError(
            f"grpo.max_staleness={g.max_staleness}, grpo.loss.importance_cap={g.loss.importance_cap:g}; stale tokens need a "
            "positive cap on their importance weights (2 is usual)"
        )
    if g.curriculum:
        _positive(c, {"grpo.curriculum.sigma", "grpo.curriculum.bins", "grpo.curriculum.drop_at"})
        if g.curriculum.batches < 0:
            raise ConfigError(f"grpo.curriculum.batches={g.curriculum.batches} must be positive, or 0 for all prompts")
    if g.samples_per_prompt < 2:
        raise ConfigError("grpo.samples_per_prompt must be at least 2: advantages compare the samples of a prompt")
    longest = g.prompts.max_prompt_tokens + _room(c, "grpo", g.sampling)
    _fits_engine(c, "grpo", longest)
    if longest > g.pack.row_tokens:
        raise ConfigError(
            f"grpo.prompts.max_prompt_tokens + grpo.sampling.max_new_tokens (or environment.max_tokens) = {longest}, but "
            f"grpo.pack.row_tokens is {g.pack.row_tokens}; the longest sequence must fit a row"
        )
    _sampling("grpo.sampling", g.sampling)
    if g.sampling.top_p < 1 or g.sampling.top_k > 0:
        raise ConfigError(
            "grpo.sampling.top_p must be 1 and top_k 0: the learner scores tokens under the whole distribution, so a "
            "truncated sampler would be another policy"
        )


def _validate_online(c: RunConfig, p: PreferenceConfig, online: OnlineConfig) -> None:
    """Of preferences whose answers the policy samples."""
    _positive(c, {"preference.data.sampling.max_new_tokens"})
    _sampling("preference.data.sampling", online.sampling)
    asked, new = online.prompts.max_prompt_tokens, _room(c, "preference.data", online.sampling)
    _fits_engine(c, "preference.data", asked + new)
    if p.loss == "dpo" or online.samples_per_prompt < 2:
        raise ConfigError(
            f"preference.loss={p.loss} with {online.samples_per_prompt} samples a prompt; answers sampled on the way need "
            "an rpo loss and at least 2"
        )
    if (size := asked - 1 + online.samples_per_prompt * (new + 1)) > p.pack.row_tokens:
        raise ConfigError(
            f"preference.pack.row_tokens={p.pack.row_tokens}: the longest prompt and its {online.samples_per_prompt} "
            f"answers have {size} tokens and must fit a row"
        )


def _sampling(name: str, s: Any) -> None:
    if s.temperature < 0 or not 0 < s.top_p <= 1 or s.top_k < 0:
        raise ConfigError(
            f"{name}: temperature={s.temperature}, top_p={s.top_p}, top_k={s.top_k}; expected temperature >= 0, "
            "0 < top_p <= 1, top_k >= 0"
        )


def _room(c: RunConfig, stage: str, s: Any) -> int:
    """Tokens behind a prompt: of one completion, or of all turns where there is an environment."""
    if (e := c.environment).kind == "none":
        return s.max_new_tokens
    if e.max_turns < 1 or e.max_tokens < s.max_new_tokens:
        raise ConfigError(
            f"environment: max_turns={e.max_turns}, max_tokens={e.max_tokens}; needs 1, {stage}.sampling.max_new_tokens or more"
        )
    return e.max_tokens


def _fits_engine(c: RunConfig, stage: str, longest: int) -> None:
    if longest > c.engine.max_len:
        raise ConfigError(
            f"{stage}.prompts.max_prompt_tokens + {stage}.sampling.max_new_tokens (or environment.max_tokens) = {longest}, but "
            f"engine.max_len is {c.engine.max_len}; raise --engine.max-len"
        )


def _positive(c: RunConfig, keys: set[str]) -> None:
    for key in sorted(keys):
        value: Any = c
        for part in key.split("."):
            value = getattr(value, part)
        if value <= 0:
            raise ConfigError(f"{key}={value} must be positive")


def _divides(name: str, value: int, whole: str, total: int) -> None:
    if total % value:
        raise ConfigError(f"{name}={value} does not divide {whole}={total}")
