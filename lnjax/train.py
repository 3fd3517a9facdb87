"""A run: its stages in order, evaluated before the first and after each, resumed from the last checkpoint."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lnjax import grpo, preference, sft
from lnjax.alive import Notice, Watchdog
from lnjax.build import Built, Resources, build, build_engine, build_scores, frozen_params, initial_trained
from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.store import Checkpoints
from lnjax.config import check_run_dir, config_hash, save_config
from lnjax.data.chat import lint_template
from lnjax.data.streams import PromptStream, build_prompt_stream
from lnjax.fit import check_fits
from lnjax.heldout import EvalResult, evaluate
from lnjax.metrics import MetricsLog, peak_memory_bytes, write_json
from lnjax.models.hf import hf_config
from lnjax.profile import Profile, parse_steps
from lnjax.record import RolloutRecord
from lnjax.report.curve import plot_run
from lnjax.report.page import write_page
from lnjax.rewards.first import FirstScores
from lnjax.rewards.pool import build_reward
from lnjax.schema import RunConfig
from lnjax.stage import Position, Stage
from lnjax.stages import stages_of

LOOPS: dict[str, Any] = {"sft": sft, "preference": preference, "grpo": grpo, "reward_model": preference}


def check(c: RunConfig, run_dir: Path) -> str:
    """Validate all that can be without training: files, tokenizer, template, data, mesh, shapes. Returns a report."""
    check_fits(c)
    parse_steps(c.profile)
    b = build(c, run_dir)
    lint_template(b.tokenizer)
    lines = [
        f"model      {_count(b):,} parameters, {len(b.model.spec.blocks)} blocks, vocabulary {b.model.spec.vocab_size}",
        f"tokenizer  {b.tokenizer.vocab_size} ids, stop {list(b.tokenizer.stop_token_ids)}; chat template passes the linter",
        f"mesh       {dict(b.mesh.shape)} on {jax.device_count()} {jax.devices()[0].device_kind} device(s)",
    ]
    _streams(b)
    for name, stage in stages_of(c):
        state = LOOPS[name].build_updater(b.model, stage, dtype=b.param_dtype).abstract_state()
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))
        lines.append(f"{name:10} {stage.steps} steps; parameters and optimizer {size / 1e6:,.1f} MB over all devices")
    return "\n".join(lines)


def run(c: RunConfig, run_dir: Path, *, watchdog: Watchdog, notice: Notice) -> dict[str, Any]:
    """Train; returns what it wrote into summary.json. A folder with checkpoints of the same config is resumed.

    Every process runs this same code; process 0 alone writes what is not a checkpoint, and decides where to begin.
    """
    check_fits(c)
    steps = parse_steps(c.profile)
    first = jax.process_index() == 0
    b = build(c, run_dir)
    lint_template(b.tokenizer)
    streams = _streams(b)
    check_run_dir(c, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    store = Checkpoints(run_dir / "checkpoints", keep=c.checkpoint.keep)
    latest = store.latest()
    if latest is not None:
        with watchdog.phase("verify"):
            store.verify(latest)  # before anything in the folder changes
    if first:
        save_config(c, run_dir)
        (run_dir / "tokenizer").mkdir(exist_ok=True)
        b.tokenizer.save(run_dir / "tokenizer")
    with contextlib.ExitStack() as stack:
        saved = None if latest is None else {"number": latest, **store.read_extra(latest)}
        keep = saved["metrics_lines"] if saved else 0
        log = MetricsLog(run_dir, keep_lines=keep, writes=first, phases=watchdog.phase)
        stack.callback(log.close)
        kept = saved["rollout_lines"] if saved else 0
        record = RolloutRecord(run_dir, c=c.record, tokenizer=b.tokenizer, keep_lines=kept, writes=first)
        stack.callback(record.close)
        stack.callback(store.close)
        pool = stack.enter_context(build_reward(c.reward))
        if first:
            pool.start()
        reward = pool if jax.process_count() == 1 else FirstScores(pool, deadline_s=c.cluster.step_deadline_s)
        reward = build_scores(b, reward)
        engine, publisher = build_engine(b, note=log.note)
        stack.callback(engine.close)
        if saved:
            log.note(f"resuming {run_dir} from checkpoint {latest}: {saved['stage']} step {saved['step']}")
        with log.phase("load"):
            frozen = frozen_params(b)
        r = Resources(log, store, engine, reward, publisher, streams, record, frozen)
        with contextlib.closing(Profile(steps if first else range(0), run_dir / "profile")) as profile:
            params, evals = _run_stages(b, r, saved=saved, watchdog=watchdog, notice=notice, profile=profile)
        store.wait()
        if c.checkpoint.export_hf:
            with watchdog.phase("export"):
                _export(b, b.model.merged(frozen | params))
        summary = _summarize(b, log, evals) | engine.report() | pool.report() | {"parity": r.parity}
    if first:
        write_json(run_dir / "summary.json", summary)
        plot_run(run_dir)
        write_page([run_dir], out=run_dir / "report.html")
    return summary


def _streams(b: Built) -> dict[str, Any]:
    """All data of the run, every row checked. Raises DataError naming the row."""
    c = b.config
    streams = {name: LOOPS[name].build_stream(b, stage) for name, stage in stages_of(c)}
    if c.reward_model:
        streams["heldout"] = preference.build_heldout(b, c.reward_model)
    if c.eval:
        streams["eval"] = build_prompt_stream(c.eval.prompts, b.tokenizer)
    with build_reward(c.reward) as reward:
        for stream in streams.values():
            if isinstance(stream, PromptStream):
                reward.check([p.verifier for p in stream.prompts])
    return streams


def _run_stages(
    b: Built, r: Resources, *, saved: dict[str, Any] | None, watchdog: Watchdog, notice: Notice, profile: Profile
) -> tuple[Any, dict[str, Any]]:
    """(final parameters, evaluations by what they came after)."""
    c, evals = b.config, dict(saved["evals"]) if saved else {}
    stages = stages_of(c)
    names = [name for name, _ in stages]
    first = names.index(saved["stage"]) if saved else 0
    described = hf_config(b.model.spec, dtype=c.model.param_dtype)
    updates, params = 0, None
    if saved:
        config = stages[first][1]
        updates = saved["updates"] - saved["step"] * getattr(config, "updates_per_step", 1)
    else:
        with r.log.phase("load"):
            params = initial_trained(b)
        _keep(evals, "init", evaluate(b, r, after="init", step=0, params=params))
    for index in range(first, len(stages)):
        name, config = stages[index]
        stage = Stage(name, r.store, r.log, r.record, c.checkpoint.every, described, evals, watchdog, notice, profile)
        here = saved if index == first else None
        source = functools.partial(lambda p: p, params)
        start = Position(source, updates, here["step"] if here else 0, here)
        params = LOOPS[name].run(b, r, config, stage=stage, start=start)
        updates += config.steps * getattr(config, "updates_per_step", 1)
        if name == "reward_model":
            if found := preference.measure(b, r, config, params, step=updates):
                evals[name] = found
        else:
            _keep(evals, name, evaluate(b, r, after=name, step=updates, params=params))
    return params, evals


def _keep(evals: dict[str, Any], name: str, result: EvalResult | None) -> None:
    if result is not None:
        evals[name] = {"mean": result.mean, "low": result.low, "high": result.high, "reward": result.reward}


def _export(b: Built, params: Any) -> None:
    folder = b.run_dir / "hf"
    save_hf(params, spec=b.model.spec, folder=folder, dtype=jnp.bfloat16, replace=True, finish=b.tokenizer.save)


def _count(b: Built) -> int:
    return sum(x.size for x in jax.tree.leaves(b.model.abstract_params(dtype=b.param_dtype)))


def _summarize(b: Built, log: MetricsLog, evals: dict[str, Any]) -> dict[str, Any]:
    c = b.config
    return {
        "name": c.name,
        "config_hash": config_hash(c),
        "parameters": _count(b),
        "mesh": dict(b.mesh.shape),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "eval": {k: v["mean"] for k, v in evals.items()},
        "eval_interval": {k: [v["low"], v["high"]] for k, v in evals.items()},
        "eval_reward": {k: v["reward"] for k, v in evals.items()},
        "seconds": {k: round(v, 3) for k, v in log.seconds.items()},
        "tokens": log.tokens,
        "steps": {name: config.steps for name, config in stages_of(c)},
        "peak_memory_bytes": peak_memory_bytes(),
    }
