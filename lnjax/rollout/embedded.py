"""The rollout engine inside the learner's process.

Continuous batching: `num_slots` sequences decode together; a slot whose sequence ends is refilled from the queue between
two chunks of tokens. A prompt is prefilled once and its keys and values are copied into the slots of all its samples.
Every program has a static shape (prompt length, cache window: buckets), so after each bucket was seen once nothing
compiles again. A sample depends on (seed, prompt id, sample index) alone, whatever else is in the batch.

With `speculate`, a step runs the newest token and K drafts; their logits say at the next step how many drafts stand.
"""

import dataclasses
import functools
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lnjax.errors import ConfigError, RolloutError
from lnjax.mesh import check_divisible, constrain, put_rows, sharding
from lnjax.metrics import progress
from lnjax.models.decoder import Model, Params
from lnjax.models.fingerprint import fingerprint
from lnjax.models.rope import rope_tables
from lnjax.ops.attention import attend_cached
from lnjax.ops.sample import sample
from lnjax.rollout.speculate import accept, cut, propose
from lnjax.schema import EmbeddedConfig
from lnjax.types import Completion, Prompt, SamplingParams, WeightVersion

Layers = list[tuple[Array, Array]]
"""Keys [S, K, H, T] and values [S, K, T, H] of each layer with attention: as a CPU multiplies them without moving them first."""
TIME = (3, 2)
"""Dim T of keys and of values."""


class Slots(NamedTuple):
    """Decoding state, on the device."""

    cache: Layers
    history_ST: Array
    """The slot's own tokens, where drafts are looked up."""
    draft_SK: Array
    """Tokens in the cache behind the slot's own, not accepted yet; -1: none."""
    hidden_SJD: Array
    """Final hidden states that predict the slot's next token and those after each draft."""
    keys_S: Array
    """One random key a slot."""
    length_S: Array
    """Tokens in the cache, drafts aside. What lies behind is overwritten before anything reads it."""
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

    tokens_RT: Array
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
        for name, got, least in (("speculate", c.speculate, 0), ("ngram", c.ngram, 1)):
            if got < least:
                raise ConfigError(f"engine.{name} is {got}, expected at least {least}; set --engine.{name}")
        for name, rows in (("engine.num_slots", c.num_slots), ("engine.prefill_rows", c.prefill_rows)):
            check_divisible(self._mesh, name=name, shape=(rows,), logical=("batch",))
        self._version: WeightVersion | None = None
        self._lock, self._swaps = threading.Lock(), 0
        self._tokens = self._steps = 0
        self._weights: Params = None
        self._load = jax.jit(self._cast, out_shardings=self._model.unstacked_shardings())
        self._prefill = jax.jit(self._run_prefill)
        self._admit = jax.jit(self._run_admit, donate_argnums=(0,))
        self._decode = jax.jit(self._run_decode, static_argnames="sampling", donate_argnums=(1,))
        self._resize = jax.jit(
            _resized, static_argnames=("axis", "width"), out_shardings=sharding(self._mesh, *CACHE_LOGICAL)
        )

    def load_weights(self, number: int, params: Params) -> WeightVersion:
        """Copy `params` (gathered over fsdp, cast) and stamp later tokens with `number`. Waits for a running `generate`."""
        version = WeightVersion(number, fingerprint(params), "")
        weights = self._load(params)
        with self._lock:
            self._weights, self._version = weights, version
        self._swaps += 1
        return version

    def report(self) -> dict[str, Any]:
        """Accepted drafts a step and slot, over all `generate` calls, where it speculates."""
        accepted = self._tokens / self._steps - 1 if self._steps else 0.0
        speculation = {"speculation": {"accepted_per_step": accepted}} if self._c.speculate else {}
        return {"sync": {"swaps": self._swaps}} | speculation

    def close(self) -> None:
        self._weights = None

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
        total = len(prompts) * num_samples
        with self._lock, progress(f"sampling for {len(prompts)} prompts", total=total, unit="completions") as advance:
            self._drain(prompts, batch, sampling, seed, advance)
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

    def _drain(
        self,
        prompts: list[Prompt],
        batch: list[list[Sequence]],
        sampling: SamplingParams,
        seed: int,
        advance: Callable[[int], None],
    ) -> None:
        slots = self._empty_slots(self._bucket(1))
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
                slots = self._sized(slots, prefix.tokens_RT.shape[1], shrink=False)
                slots = self._fill(slots, prefix, running, prompts, seed)
            longest = max(len(prompts[s.prompt].token_ids) + len(s.tokens) for s in running.values())
            window = self._bucket(min(longest + self._c.decode_chunk + 2 * self._c.speculate, self._c.max_len))
            slots, *out = self._decode(self._weights, self._sized(slots, window, shrink=True), sampling=sampling)
            tokens, logprobs, counts, active, steps = jax.device_get(out)
            self._tokens, self._steps = self._tokens + int(counts.sum()), self._steps + int(steps)
            size = len(running)
            for slot, sequence in list(running.items()):
                sequence.tokens += tokens[slot, : counts[slot]].tolist()
                sequence.logprobs += logprobs[slot, : counts[slot]].tolist()
                if not active[slot]:
                    del running[slot]
            advance(size - len(running))

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
        on_device, length = put_rows(self._mesh, (tokens, lengths))
        layers, hidden = self._prefill(self._weights, on_device, length)
        waiting = deque((row, s) for row, group in enumerate(groups) for s in group)
        return Prefix(on_device, layers, hidden, lengths.tolist(), waiting)

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
        key = jax.random.fold_in(self._key, seed)
        return self._admit(slots, prefix.tokens_RT, prefix.layers, prefix.hidden_RD, key, *rows)

    def _sized(self, slots: Slots, width: int, *, shrink: bool) -> Slots:
        """The slots, their cache of so many positions (or more), one layer after the other. Attention reads a cache whole: a
        part of it would be copied at every step."""
        for i, (keys, values) in enumerate(slots.cache):
            if keys.shape[TIME[0]] < width or (shrink and keys.shape[TIME[0]] > width):
                slots.cache[i] = (
                    self._resize(keys, axis=TIME[0], width=width),
                    self._resize(values, axis=TIME[1], width=width),
                )
        return slots

    def _empty_slots(self, width: int) -> Slots:
        spec, size, dtype = self._model.spec, self._c.num_slots, self._model.compute.dtype
        where, cache = sharding(self._mesh, *CACHE_LOGICAL), []
        for block in spec.blocks:
            if block.attention:
                heads = size, block.attention.num_kv_heads
                shapes = (*heads, spec.head_dim, width), (*heads, width, spec.head_dim)
                cache.append(tuple(jnp.zeros(shape, dtype, device=where) for shape in shapes))
        drafts = self._c.speculate
        rows = [((size, self._c.max_len), np.int32), ((size, drafts), np.int32)]
        rows += [((size, drafts + 1, spec.d_model), dtype), ((size, 2), np.uint32)]
        rows += [((size,), np.int32), ((size,), np.int32), ((size,), np.bool_)]
        history, draft, hidden, keys, *rest = put_rows(self._mesh, [np.zeros(*x) for x in rows])
        return Slots(cache, history, draft, hidden, jax.random.wrap_key_data(keys), *rest)

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
            layers.append((k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
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
        tokens_RT: Array,
        layers: Layers,
        hidden_RD: Array,
        key: Array,
        row_S: Array,
        length_S: Array,
        identity_S2: Array,
    ) -> Slots:
        """Slots whose row is >= 0 start on that prefilled prompt; the others go on."""
        new, row, pairs = row_S >= 0, jnp.maximum(row_S, 0), zip(slots.cache, layers, strict=True)

        def copy(cache, prefix, time):
            width = min(prefix.shape[time], cache.shape[time])
            started, old = (jax.lax.slice_in_dim(x, 0, width, axis=time) for x in (prefix, cache))
            merged = jnp.where(new[:, None, None, None], started[row], old)
            return jax.lax.dynamic_update_slice(cache, merged, (0, 0, 0, 0))

        tokens = jnp.where(new[:, None], tokens_RT[row], slots.history_ST[:, : tokens_RT.shape[1]])
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i[0]), i[1]))(identity_S2)
        data = jnp.where(new[:, None], jax.random.key_data(keys), jax.random.key_data(slots.keys_S))
        return Slots(
            cache=[(copy(k, pk, TIME[0]), copy(v, pv, TIME[1])) for (k, v), (pk, pv) in pairs],
            history_ST=jax.lax.dynamic_update_slice(slots.history_ST, tokens, (0, 0)),
            draft_SK=jnp.where(new[:, None], -1, slots.draft_SK),
            hidden_SJD=jnp.where(new[:, None, None], hidden_RD[row][:, None], slots.hidden_SJD),
            keys_S=jax.random.wrap_key_data(data),
            length_S=jnp.where(new, length_S, slots.length_S),
            num_new_S=jnp.where(new, 0, slots.num_new_S),
            active_S=new | slots.active_S,
        )

    def _run_decode(self, weights: Params, slots: Slots, *, sampling: SamplingParams):
        """Steps until a slot has `decode_chunk` tokens more -> (slots, tokens [S, C + K], logprobs [S, C + K], counts [S],
        active [S], steps of all slots)."""
        chunk, size, drafts = self._c.decode_chunk, self._c.num_slots, self._c.speculate
        modules, head = self._model.layers(weights), self._model.head_weight(weights)
        stops = jnp.asarray(sampling.stop_token_ids or (-1,), jnp.int32)
        ahead, before = jnp.arange(drafts + 1)[None], slots.num_new_S
        # A slot's own update under vmap: with the slot as an index its devices would gather each other's.
        put = jax.vmap(lambda x_T, at_J, new_J: x_T.at[at_J].set(new_J, mode="drop"))

        def body(carry):
            slots, tokens, logprobs, steps_S = carry
            logits = jnp.einsum("sjd,vd->sjv", slots.hidden_SJD, head, preferred_element_type=jnp.float32)
            keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(slots.keys_S, slots.num_new_S[:, None] + ahead)
            drawn = sample(logits.reshape(size * (drafts + 1), -1), keys.reshape(-1), sampling=sampling)
            token, logprob = (x.reshape(size, drafts + 1) for x in drawn)
            left = sampling.max_new_tokens - slots.num_new_S
            kept, ended = cut(token, accept(token, slots.draft_SK) + 1, stops=stops, left_S=left)
            kept *= slots.active_S
            at = (slots.num_new_S - before)[:, None] + ahead  # what is not kept lies behind the count
            tokens, logprobs = put(tokens, at, token), put(logprobs, at, logprob)
            newest, history, draft = token[:, :1], slots.history_ST, slots.draft_SK
            length = slots.length_S + kept
            if drafts:
                newest = jnp.take_along_axis(token, jnp.maximum(kept - 1, 0)[:, None], axis=1)
                history = put(history, slots.length_S[:, None] + ahead, token)
                draft = propose(history, length, count=drafts, ngram=self._c.ngram)
            position = jnp.maximum(length - 1, 0)[:, None] + ahead
            run = jnp.concatenate([newest, draft], axis=1)
            cache, hidden = self._step(weights, modules, slots.cache, run, position)
            num_new, active = slots.num_new_S + kept, slots.active_S & ~ended
            after = Slots(cache, history, draft, hidden, slots.keys_S, length, num_new, active)
            return after, tokens, logprobs, steps_S + slots.active_S

        def unfinished(carry):
            """Some slot is active and none is done with its chunk: one number of each device a step."""
            now = carry[0]
            return jnp.where(now.num_new_S - before >= chunk, 2, now.active_S.astype(jnp.int32)).max() == 1

        shape = (size, chunk + drafts)
        init = (slots, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros_like(before))
        slots, tokens, logprobs, steps_S = jax.lax.while_loop(unfinished, body, init)
        whole = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(self._mesh, PartitionSpec())
        )
        return slots, *map(whole, (tokens, logprobs, slots.num_new_S - before, slots.active_S, steps_S.sum()))

    def _step(self, weights: Params, modules: list[Any], cache: Layers, token_SJ: Array, position_SJ: Array):
        """Run J tokens a slot through the decoder; (cache, hidden [S, J, D]). What lies beyond the cache is not kept: drafts
        of a slot whose budget ends before them."""
        model, compute = self._model, self._model.compute
        rope, old, new = rope_tables(model.spec, position_SJ), iter(cache), []
        put_keys = jax.vmap(
            lambda x_KHT, at_J, new_JKH: x_KHT.at[..., at_J].set(jnp.moveaxis(new_JKH, 0, 2), mode="drop")
        )
        put_values = jax.vmap(lambda x_KTH, at_J, new_JKH: x_KTH.at[:, at_J].set(new_JKH.swapaxes(0, 1), mode="drop"))

        def attend(q, k, v):
            keys, values = next(old)
            keys = constrain(put_keys(keys, position_SJ, k), self._mesh, *CACHE_LOGICAL)
            values = constrain(put_values(values, position_SJ, v), self._mesh, *CACHE_LOGICAL)
            new.append((keys, values))
            return attend_cached(q, keys, values, position_SJ + 1)

        x = model.embed(weights, token_SJ)
        for layer in modules:
            x = layer(x, rope, attend, compute)
        return new, model.final_norm(weights, x)


CACHE_LOGICAL = ("batch", "heads", None, None)


def _resized(x: Array, *, axis: int, width: int) -> Array:
    """Dim `axis` cut, or filled up with zeros, to `width`."""
    kept = jax.lax.slice_in_dim(x, 0, min(width, x.shape[axis]), axis=axis)
    return jnp.pad(kept, [(0, width - kept.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])
