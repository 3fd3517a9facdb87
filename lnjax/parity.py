"""Do servers and learner agree? Random completions are scored again by the learner, under the weights of each token.

A server may be wrong in ways that no error shows: stale weights, a stale KV cache, raw logprobs, another rope. All of
them make its logprobs differ from the learner's. Above the limit the run stops, names what it takes for the cause, and
leaves a file with everything that is needed to look again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lnjax.build import Built, Resources
from lnjax.checkpoint.load import assemble
from lnjax.checkpoint.version import PublishedVersion
from lnjax.data.packing import microbatches, pack
from lnjax.errors import CheckpointError, RolloutError
from lnjax.mesh import fetch, put_rows
from lnjax.metrics import write_json
from lnjax.schema import GrpoConfig, VllmConfig
from lnjax.types import Rollout, RolloutGroup, Sample

EXPLAINED = 0.5
"""A cause is named when, were it so, less than this share of the mean difference would be left."""


class Parity:
    """`check` each step. Engines inside the learner's process have nothing to disagree with; then it does nothing."""

    def __init__(self, b: Built, r: Resources, c: GrpoConfig, *, logprobs: Any):
        """`logprobs(params, packed, temperature) -> [B, T]`."""
        self._b, self._r, self._c, self._logprobs = b, r, c, logprobs

    def check(self, groups: Sequence[RolloutGroup], *, rl_step: int, params: Any, updates: int) -> dict[str, float]:
        """Metrics of this step. Raises RolloutError above `engine.parity_limit`."""
        engine = self._b.config.engine
        if not isinstance(engine, VllmConfig) or engine.parity_samples < 1:
            return {}
        rollouts = [x for g in groups for x in g.rollouts]
        rng = np.random.default_rng([self._b.config.seed, rl_step])
        chosen = [rollouts[i] for i in sorted(rng.permutation(len(rollouts))[: engine.parity_samples])]
        ours = self._score_by_version(chosen, params=params, updates=updates)
        theirs = [np.asarray(x.completion.logprobs) for x in chosen]
        gap = np.concatenate(ours) - np.concatenate(theirs)
        seen = ~np.isnan(gap)
        gap = gap[seen]
        values = {
            "parity_prob_error": float(np.exp(np.abs(gap)).mean()) if len(gap) else 1.0,
            "parity_prob_error_max": float(np.exp(np.abs(gap)).max()) if len(gap) else 1.0,
            "parity_kl": float((np.exp(gap) - 1 - gap).mean()) if len(gap) else 0.0,
            "parity_tokens_checked": int(seen.sum()),
        }
        totals = self._r.parity
        totals["prob_error_max"] = max(totals.get("prob_error_max", 1.0), values["parity_prob_error"])
        totals["kl_max"] = max(totals.get("kl_max", 0.0), values["parity_kl"])
        totals["tokens_checked"] = totals.get("tokens_checked", 0) + int(seen.sum())
        if values["parity_prob_error"] > engine.parity_limit:
            self._stop(chosen, ours, theirs, values, rl_step=rl_step, params=params, updates=updates)
        return values

    def _score_by_version(self, chosen: Sequence[Rollout], *, params: Any, updates: int) -> list[np.ndarray]:
        """Logprobs of each completion's tokens; NaN where a version is no longer there, or an environment spoke."""
        found = [np.full(len(x.completion.token_ids), np.nan) for x in chosen]
        for number in sorted({v for x in chosen for v in x.completion.versions}):
            weights = params if number == updates else self._old_weights(number)
            if weights is None:
                continue
            for out, rollout, scored in zip(found, chosen, self._score(chosen, weights), strict=True):
                mine = np.asarray(rollout.completion.versions) == number
                out[mine] = scored[mine]
        return found

    def _old_weights(self, number: int) -> Any:
        """As published, or None when they are gone."""
        publisher = self._r.publisher
        assert publisher
        try:
            version = PublishedVersion(publisher.root / str(number))
        except CheckpointError:
            return None  # pruned: a completion outlived its version
        return assemble(
            version, spec=self._b.model.spec, dtype=self._b.param_dtype, shardings=self._b.model.shardings()
        )

    def _score(self, chosen: Sequence[Rollout], params: Any, *, temperature: float | None = None) -> list[np.ndarray]:
        if temperature is None:
            temperature = self._c.sampling.temperature
        pairs = [(x.prompt.token_ids, x.completion) for x in chosen]
        samples = [Sample(p + a.token_ids, (0,) * len(p) + a.mask) for p, a in pairs]
        packing = pack([[s] for s in samples], c=self._c.pack)
        rows = microbatches(packing.batch(), rows=self._c.pack.microbatch_rows)
        scored = np.concatenate(
            [fetch(self._logprobs(params, put_rows(self._b.mesh, x), temperature=temperature)) for x in rows]
        )
        found = []
        for rollout, place in zip(chosen, packing.places, strict=True):
            columns = place.columns[len(rollout.prompt.token_ids) :]
            found.append(np.where(rollout.completion.mask, scored[place.row, columns].astype(np.float64), np.nan))
        return found

    def _stop(
        self,
        chosen: Sequence[Rollout],
        ours: list[np.ndarray],
        theirs: list[np.ndarray],
        values: dict[str, float],
        *,
        rl_step: int,
        params: Any,
        updates: int,
    ) -> None:
        engine = self._b.config.engine
        assert isinstance(engine, VllmConfig)
        cause = self._likely_cause(chosen, ours, theirs, params=params, updates=updates)
        path: Path = self._b.run_dir / f"parity-{rl_step}.json"
        samples = [
            {
                "prompt": x.prompt.id,
                "prompt_token_ids": list(x.prompt.token_ids),
                "token_ids": list(x.completion.token_ids),
                "versions": list(x.completion.versions),
                "server_logprobs": [float(v) for v in b],
                "learner_logprobs": [None if np.isnan(v) else float(v) for v in a],
            }
            for x, a, b in zip(chosen, ours, theirs, strict=True)
        ]
        sampling = {"temperature": self._c.sampling.temperature, "top_p": self._c.sampling.top_p}
        body = {"rl_step": rl_step, "updates": updates, "cause": cause, "values": values, "sampling": sampling}
        if jax.process_index() == 0:
            write_json(path, body | {"engine": self._r.engine.report(), "samples": samples})
        raise RolloutError(
            f"step {rl_step}: servers and learner disagree: mean exp|difference of logprobs| is "
            f"{values['parity_prob_error']:.4g}, allowed {engine.parity_limit:g}. Likely cause: {cause}. Tokens, logprobs and "
            f"versions are in {path}"
        )

    def _likely_cause(
        self, chosen: Sequence[Rollout], ours: list[np.ndarray], theirs: list[np.ndarray], *, params: Any, updates: int
    ) -> str:
        """The explanation under which the difference (nearly) vanishes."""

        def error(candidate: Sequence[np.ndarray]) -> float:
            gaps = np.abs(np.concatenate([a - b for a, b in zip(candidate, theirs, strict=True)]))
            return float(np.nanmean(gaps))

        base = error(ours)
        shifted = [np.concatenate([x[1:], x[-1:]]) for x in ours], [np.concatenate([x[:1], x[:-1]]) for x in ours]
        if min(map(error, shifted)) < EXPLAINED * base:
            return "token ids differ: the server's logprobs belong to the neighbouring tokens"
        if (
            self._c.sampling.temperature != 1.0
            and error(self._score(chosen, params, temperature=1.0)) < EXPLAINED * base
        ):
            return "logprob mode: they are of temperature 1; start the server with --logprobs-mode processed_logprobs"
        for number in range(updates - 1, max(-1, updates - 4), -1):
            old = self._old_weights(number)
            if old is not None and error(self._score(chosen, old)) < EXPLAINED * base:
                return f"digest differs: the tokens are of version {number}'s weights, the server says {updates}"
        first = float(np.nanmean([abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]))
        if first < EXPLAINED * base:
            return "a stale KV cache, or positions (rope): first tokens agree, later ones do not"
        return "a layer: all tokens are off, so weights or a kernel differ (dtype, quantisation, a tensor that was not reloaded)"
