"""The rollout engine inside the learner's process.

Continuous batching: `num_slots` sequences decode together; a slot whose sequence ends is refilled from the queue between
two chunks of tokens. A prompt is prefilled once and its keys and values are copied into the slots of all its samples.
Every program has a static shape (prompt length, cache window: buckets), so after each bucket was seen once nothing
compiles again. A sample depends on (seed, prompt id, sample index) alone, whatever else is in the batch.
"""

import dataclasses
import functools
import threading
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lnjax.errors import RolloutError
from lnjax.mesh import check_divisible, constrain, put_rows, sharding
from lnjax.models.decoder import Model, Params, rope_tables
from lnjax.models.fingerprint import fingerprint
from lnjax.ops.attention import attend_cached
from lnjax.ops.sample import sample
from lnjax.schema import EmbeddedConfig
from lnjax.types import Completion, Prompt, SamplingParams, WeightVersion

Layers = list[tuple[Array, Array]]
"""Keys and values of each layer with attention."""


class Slots(NamedTuple):
    """Decoding state, on the device."""

    cache: Layers
    """Each [S, K, T, H]."""
    hidden_SD: Array
    """Final hidden state that predicts the slot's next token."""
    keys_S: Array
    """One random key a slot."""
    length_S: Array
    """Tokens in the cache."""
    num_new_S: Array
    """Tokens sampled so far."""
    active_S: Array


@dataclass(slots=True)
class Sequence:
    """One sample on its way."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Prefix:
    """Prompts prefilled together, and the samples still waiting for a slot."""

    layers: Layers
    hidden_RD: Array
    lengths: list[int]
    waiting: deque[tuple[int, Sequence]]
    """(row, sequence)."""


class EmbeddedEngine:
    """Implements RolloutEngine. `model` is the learner's; the engine computes in `c.dtype`."""

    def __init__(self, model: Model, *, c: EmbeddedConfig, key: Array):
        compute = dataclasses.replace(model.compute, dtype=jnp.dtype(c.dtype), remat="none")
        self._model = dataclasses.replace(model, compute=compute)
        self._mesh, self._c, self._key = compute.ops.mesh, c, key
        for name, rows in (("engine.num_slots", c.num_slots), ("engine.prefill_rows", c.prefill_rows)):
            check_divisible(self._mesh, name=name, shape=(rows,), logical=("batch",))
        self._version: WeightVersion | None = None
        self._lock, self._swaps = threading.Lock(), 0
        self._weights: Params = None
        self._cache: Layers | None = None
        self._load = jax.jit(self._cast, out_shardings=self._model.unstacked_shardings())
        self._prefill = jax.jit(self._run_prefill)
        self._admit = jax.jit(self._run_admit, donate_argnums=(0,))
        self._decode = jax.jit(self._run_decode, static_argnames=("window", "sampling"), donate_argnums=(1,))

    def load_weights(self, number: int, params: Params) -> WeightVersion:
        """Copy `params` (gathered over fsdp, cast) and stamp later tokens with `number`. Waits for a running `generate`."""
        version = WeightVersion(number, fingerprint(params), "")
        weights = self._load(params)
        with self._lock:
            self._weights, self._version = weights, version
        self._swaps += 1
        return version

    def report(self) -> dict[str, Any]:
        return {"sync": {"swaps": self._swaps}}

    def close(self) -> None:
        self._weights = self._cache = None

    @property
    def num_programs(self) -> int:
        """Compiled so far; constant after warm-up."""
        programs: list[Any] = [self._load, self._prefill, self._admit, self._decode]
        return sum(p._cache_size() for p in programs)

    def generate(
        self, prompts: list[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """P x G completions. Raises RolloutError for a prompt that leaves no room, or before any weights."""
        if self._version is None:
            raise RolloutError("engine.generate was called before load_weights; load a weight version first")
        for prompt in prompts:
            need = len(prompt.token_ids) + sampling.max_new_tokens
            if not prompt.token_ids or need > self._c.max_len:
                raise RolloutError(
                    f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {sampling.max_new_tokens} new ones make "
                    f"{need}, the cache holds {self._c.max_len}; raise --engine.max-len or shorten the prompt"
                )
        batch = [[Sequence(i, j) for j in range(num_samples)] for i in range(len(prompts))]
        with self._lock:
            self._drain(prompts, batch, sampling, seed)
            number = self._version.number
        return [
            [
                Completion(
                    token_ids=tuple(s.tokens),
                    logprobs=tuple(s.logprobs),
                    versions=(number,) * len(s.tokens),
                    finished=s.tokens[-1] in sampling.stop_token_ids,
                )
                for s in group
            ]
            for group in batch
        ]

    # Scheduling, on the host.

    def _drain(self, prompts: list[Prompt], batch: list[list[Sequence]], sampling: SamplingParams, seed: int) -> None:
        slots = self._empty_slots()
        running: dict[int, Sequence] = {}
        queue = deque(range(len(prompts)))
        prefix: Prefix | None = None
        while queue or running or (prefix and prefix.waiting):
            while len(running) < self._c.num_slots:
                if not (prefix and prefix.waiting):
                    if not queue:
                        break
                    rows = [queue.popleft() for _ in range(min(self._c.prefill_rows, len(queue)))]
                    prefix = self._prefill_rows([prompts[i] for i in rows], [batch[i] for i in rows])
                slots = self._fill(slots, prefix, running, prompts, seed)
            longest = max(len(prompts[s.prompt].token_ids) + len(s.tokens) for s in running.values())
            window = self._bucket(min(longest + self._c.decode_chunk, self._c.max_len))
            slots, tokens, logprobs, counts, active = self._decode(
                self._weights, slots, window=window, sampling=sampling
            )
            tokens, logprobs, counts, active = jax.device_get((tokens, logprobs, counts, active))
            for slot, sequence in list(running.items()):
                sequence.tokens += tokens[slot, : counts[slot]].tolist()
                sequence.logprobs += logprobs[slot, : counts[slot]].tolist()
                if not active[slot]:
                    del running[slot]
        self._cache = slots.cache

    def _bucket(self, length: int) -> int:
        size = self._c.prefill_multiple
        while size < length:
            size *= 2
        return min(size, self._c.max_len)

    def _prefill_rows(self, prompts: list[Prompt], groups: list[list[Sequence]]) -> Prefix:
        width = self._bucket(max(len(p.token_ids) for p in prompts))
        tokens = np.zeros((self._c.prefill_rows, width), np.int32)
        lengths = np.zeros((self._c.prefill_rows,), np.int32)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt.token_ids)
            tokens[row, : lengths[row]] = prompt.token_ids
        layers, hidden = self._prefill(self._weights, *put_rows(self._mesh, (tokens, lengths)))
        waiting = deque((row, s) for row, group in enumerate(groups) for s in group)
        return Prefix(layers, hidden, lengths.tolist(), waiting)

    def _fill(
        self, slots: Slots, prefix: Prefix, running: dict[int, Sequence], prompts: list[Prompt], seed: int
    ) -> Slots:
        """Give free slots to waiting samples of `prefix`."""
        size = self._c.num_slots
        row, length = np.full((size,), -1, np.int32), np.zeros((size,), np.int32)
        identity = np.zeros((size, 2), np.uint32)
        for slot in range(size):
            if slot in running or not prefix.waiting:
                continue
            row[slot], sequence = prefix.waiting.popleft()
            length[slot] = prefix.lengths[row[slot]]
            identity[slot] = zlib.crc32(prompts[sequence.prompt].id.encode()), sequence.sample
            running[slot] = sequence
        rows = put_rows(self._mesh, (row, length, identity))
        return self._admit(slots, prefix.layers, prefix.hidden_RD, jax.random.fold_in(self._key, seed), *rows)

    def _empty_slots(self) -> Slots:
        spec, size, dtype = self._model.spec, self._c.num_slots, self._model.compute.dtype
        if self._cache is None:
            where = sharding(self._mesh, *CACHE_LOGICAL)
            self._cache = []
            for block in spec.blocks:
                if block.attention:
                    shape = (size, block.attention.num_kv_heads, self._c.max_len, spec.head_dim)
                    keys, values = (jnp.zeros(shape, dtype, device=where) for _ in range(2))
                    self._cache.append((keys, values))
        cache, self._cache = self._cache, None  # donated to the first admission
        zero, hidden = np.zeros((size,), np.int32), np.zeros((size, spec.d_model), dtype)
        hidden, length, num_new, active = put_rows(self._mesh, (hidden, zero, zero.copy(), zero.astype(bool)))
        keys = jax.random.wrap_key_data(put_rows(self._mesh, np.zeros((size, 2), np.uint32)))
        return Slots(cache, hidden, keys, length, num_new, active)

    # Programs, on the device.

    def _cast(self, params: Params) -> Params:
        dtype = self._model.compute.dtype
        return self._model.unstack(jax.tree.map(lambda x: jnp.copy(x.astype(dtype)), params))

    def _run_prefill(self, weights: Params, tokens_RT: Array, length_R: Array) -> tuple[Layers, Array]:
        """Keys and values of whole prompts, and the hidden state after each one's last token."""
        model, compute = self._model, self._model.compute
        positions = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1])[None], tokens_RT.shape)
        segments = (positions < length_R[:, None]).astype(jnp.int32)
        rope, layers = rope_tables(model.spec, positions), []

        def attend(q, k, v):
            layers.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
            return compute.ops.attention(q, k, v, segments)

        x = model.embed(weights, tokens_RT)
        for layer in model.layers(weights):
            x = layer(x, rope, attend, compute)
        last = jnp.maximum(length_R - 1, 0)[:, None, None]
        x = jnp.take_along_axis(x, jnp.broadcast_to(last, (x.shape[0], 1, x.shape[2])), axis=1)
        return layers, model.final_norm(weights, x)[:, 0]

    def _run_admit(
        self,
        slots: Slots,
        layers: Layers,
        hidden_RD: Array,
        key: Array,
        row_S: Array,
        length_S: Array,
        identity_S2: Array,
    ) -> Slots:
        """Slots whose row is >= 0 start on that prefilled prompt; the others go on."""
        new, row = row_S >= 0, jnp.maximum(row_S, 0)

        def copy(cache, prefix):
            width = min(prefix.shape[2], cache.shape[2])
            merged = jnp.where(new[:, None, None, None], prefix[row, :, :width], cache[:, :, :width])
            return jax.lax.dynamic_update_slice(cache, merged, (0, 0, 0, 0))

        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i[0]), i[1]))(identity_S2)
        data = jnp.where(new[:, None], jax.random.key_data(keys), jax.random.key_data(slots.keys_S))
        return Slots(
            cache=[(copy(k, pk), copy(v, pv)) for (k, v), (pk, pv) in zip(slots.cache, layers, strict=True)],
            hidden_SD=jnp.where(new[:, None], hidden_RD[row], slots.hidden_SD),
            keys_S=jax.random.wrap_key_data(data),
            length_S=jnp.where(new, length_S, slots.length_S),
            num_new_S=jnp.where(new, 0, slots.num_new_S),
            active_S=new | slots.active_S,
        )

    def _run_decode(self, weights: Params, slots: Slots, *, window: int, sampling: SamplingParams):
        """Up to `decode_chunk` tokens a slot -> (slots, tokens [S, C], logprobs [S, C], counts [S], active [S])."""
        chunk, size = self._c.decode_chunk, self._c.num_slots
        modules, head = self._model.layers(weights), self._model.head_weight(weights)
        stops = jnp.asarray(sampling.stop_token_ids or (-1,), jnp.int32)

        def body(carry):
            i, slots, tokens, logprobs = carry
            logits = jnp.einsum("sd,vd->sv", slots.hidden_SD, head, preferred_element_type=jnp.float32)
            keys = jax.vmap(jax.random.fold_in)(slots.keys_S, slots.num_new_S)
            token, logprob = sample(logits, keys, sampling=sampling)
            num_new = slots.num_new_S + slots.active_S
            stopped = (token[:, None] == stops[None]).any(-1) | (num_new >= sampling.max_new_tokens)
            cache, hidden = self._step(weights, modules, slots, token, window=window)
            after = Slots(
                cache, hidden, slots.keys_S, slots.length_S + slots.active_S, num_new, slots.active_S & ~stopped
            )
            return i + 1, after, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

        def unfinished(carry):
            return (carry[0] < chunk) & carry[1].active_S.any()

        before = slots.num_new_S
        init = (0, slots, jnp.zeros((size, chunk), jnp.int32), jnp.zeros((size, chunk), jnp.float32))
        _, slots, tokens, logprobs = jax.lax.while_loop(unfinished, body, init)
        whole = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(self._mesh, PartitionSpec())
        )
        return slots, whole(tokens), whole(logprobs), whole(slots.num_new_S - before), whole(slots.active_S)

    def _step(self, weights: Params, modules: list[Any], slots: Slots, token_S: Array, *, window: int):
        """Run one token a slot through the decoder; (cache, hidden [S, D])."""
        model, compute = self._model, self._model.compute
        position = jnp.minimum(slots.length_S, window - 1)  # an idle slot writes where nobody reads
        rope, old, new = rope_tables(model.spec, position[:, None]), iter(slots.cache), []
        rows = jnp.arange(self._c.num_slots)

        def attend(q, k, v):
            keys, values = next(old)
            keys = constrain(keys.at[rows, :, position].set(k[:, 0]), self._mesh, *CACHE_LOGICAL)
            values = constrain(values.at[rows, :, position].set(v[:, 0]), self._mesh, *CACHE_LOGICAL)
            new.append((keys, values))
            return attend_cached(q[:, 0], keys[:, :, :window], values[:, :, :window], position + 1)[:, None]

        x = model.embed(weights, token_S[:, None])
        for layer in modules:
            x = layer(x, rope, attend, compute)
        return new, model.final_norm(weights, x)[:, 0]


CACHE_LOGICAL = ("batch", "heads", None, None)
