"""The nouns that flow through every loop.

Legend: P prompts, G completions per prompt, B rows, T positions, S key positions, D model width,
N query heads, K kv heads, H head dim, F ffn width, V vocabulary. Of preferences: P comparisons, K answers, A scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jax import Array


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the policy, already tokenized, with what its verifier needs."""

    id: str
    """Unique and stable name, for example `arithmetic/train/17`."""
    token_ids: tuple[int, ...]
    """Rendered through the chat template, ending where the assistant starts to write."""
    verifier: str
    """Name of the verifier in `lnjax.rewards`."""
    args: Mapping[str, Any]
    """What that verifier checks against (answer, instruction ids, …). Plain JSON values."""
    text: str = ""
    """The last user message, for judges and for people."""
    reasoning: bool = False
    """True where the system prompt switched thinking on."""
    pass_rate: float | None = None
    """Share of a reference model's samples that were right, where it was measured."""


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """Which weights an engine serves."""

    number: int
    """The learner's optimizer step that produced them."""
    digest: str
    """Hex digest of the tensors."""
    path: str
    """Folder of the published checkpoint; empty for an engine inside the learner's process."""

    @property
    def label(self) -> str:
        """How a server names it on every span of tokens."""
        return f"{self.number}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled for one prompt, and what an environment said between two turns. Includes the stop token of each
    turn; of the last one when `finished`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log, of the distribution sampled from (after temperature, top-p, top-k). One a token."""
    versions: tuple[int, ...]
    """`WeightVersion.number` that produced each token. One a token."""
    finished: bool
    """True when a stop token ended it; False when the budget of tokens or of turns did."""
    spoken: tuple[int, ...] = ()
    """One a token: 1 the policy's, 0 an environment's (logprob 0, the version of the turn before). Empty: all the policy's."""

    def __post_init__(self):
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions) == len(self.mask):
            raise ValueError(
                f"Completion: {len(self.token_ids)} tokens, {len(self.logprobs)} logprobs, {len(self.versions)} versions "
                f"and {len(self.mask)} of the mask; every token needs one of each"
            )

    @property
    def mask(self) -> tuple[int, ...]:
        """1 where the policy spoke, else 0. One a token."""
        return self.spoken or (1,) * len(self.token_ids)

    @property
    def last_turn(self) -> tuple[int, ...]:
        """The policy's tokens since the environment last spoke: its answer."""
        return self.token_ids[max((i for i, m in enumerate(self.mask, 1) if not m), default=0) :]


@dataclass(frozen=True, slots=True)
class Score:
    """A verifier's verdict on one completion."""

    reward: float
    """In [0, 1]."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The factors behind the reward, for example {"accuracy": 1.0, "format": 0.0}."""
    failure: str = ""
    """Empty, or why the verifier gave no verdict ("deadline", "raised ValueError: …"); the reward is then 0."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its score."""

    prompt: Prompt
    completion: Completion
    score: Score


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt: the unit inside which advantages are taken."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence for the learner: prompt and completion tokens with credit."""

    token_ids: tuple[int, ...]
    """Prompt followed by completion."""
    loss_mask: tuple[int, ...]
    """1 where the token is a target of the loss, else 0. One a token; the first is always 0."""
    sampler_logprobs: tuple[float, ...] = ()
    """Empty (SFT), or one a token, 0 on the prompt."""
    advantage: float = 0.0


BRANCH = 1 << 16
"""A segment id is segment + branch * BRANCH. Branch 0 is the trunk; a token sees its own branch and its segment's trunk, so
completions of one prompt share the prompt's tokens in a row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed into rows of static shape; serves SFT and RL alike."""

    tokens_BT: Array
    """int32; padding is 0."""
    positions_BT: Array
    """int32; position inside the segment."""
    segment_ids_BT: Array
    """int32; 1, 2, … inside a row, 0 is padding; branches of a segment as BRANCH says."""
    loss_mask_BT: Array
    """float32; 1 where this token is a target (predicted from the one before it), else 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RlBatch:
    """A packed batch with everything the policy-gradient loss reads."""

    packed: PackedBatch
    advantages_BT: Array
    """float32; the rollout's advantage on each of its loss tokens, else 0."""
    weights_BT: Array
    """float32; weight of each token's loss in the sum (0 where masked)."""
    count_B: Array
    """float32; each row's share of the denominator. The loss is sum(weights * loss) / sum(count)."""
    sampler_logprobs_BT: Array
    """float32; from the engine."""
    old_logprobs_BT: Array
    """float32; from the learner before this cycle's first update. Not read when `on_policy`."""
    ref_logprobs_BT: Array
    """float32; from the reference policy. Not read when the KL term is off."""
    on_policy: Array
    """bool, scalar: True on the first update after sampling, where old logprobs are the current ones."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """K answers to one prompt, the best first, with what is known of each."""

    samples: tuple[Sample, ...]
    scores: tuple[tuple[float, ...], ...]
    """[K][A]: rewards or ratings."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Comparisons packed into rows, whole ones. P of a row, K answers each, A scores an answer."""

    packed: PackedBatch
    answer_BT: Array
    """int32; on a loss token 1 + comparison * K + answer of its row, else 0."""
    last_BPK: Array
    """int32; position of the answer's last token in its row."""
    scores_BPKA: Array
    """float32."""
    real_BP: Array
    """float32; 1 where there is a comparison, else 0."""
    ref_logprobs_BT: Array
    """float32; from the reference policy. Not read for reward models."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class GuardState:
    """Running state of the NaN and spike guard; all scalars on the device."""

    grad_norm_mean: Array
    """float32; exponential mean of accepted gradient norms, 0 before the first."""
    num_skipped: Array
    """int32; skipped updates since the run began."""
    num_skipped_in_a_row: Array
    """int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TrainState:
    """All that an update changes. Data only."""

    step: Array
    """int32; optimizer updates done, skipped ones included."""
    params: Any
    """Nested dict of master weights."""
    opt_state: Any
    """optax state."""
    guard: GuardState
    rng: Array
    """Base key of the run; consumers fold in what they need and never write it back."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn."""

    temperature: float
    top_p: float
    top_k: int
    """0 keeps all."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


class RolloutEngine(Protocol):
    """Collective: every process calls, every process gets the same result."""

    def load_weights(self, number: int, params: Any) -> WeightVersion:
        """Serve `params` as version `number` from the next token on; returns once every replica does, else raises."""
        ...

    def generate(
        self, prompts: list[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """P x G completions, in order. The same (seed, prompt id, sample index) gives the same tokens.

        May run in another thread than `load_weights`.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Totals for summary.json, by section."""
        ...

    def close(self) -> None: ...
