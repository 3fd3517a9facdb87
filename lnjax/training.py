"""Knobs of a training stage: optimizer, packing, prompts, sampling; preferences between answers and reward models. Configs take
these names from lnjax.schema. No jax."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up."""

    learning_rate: float
    """Peak."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up."""
    min_learning_rate: float = 0.0
    """Where cosine ends."""
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; applied to matrices, not to norms."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    spike_factor: float = 0.0
    """Skip an update whose gradient norm exceeds this many times its running mean; 0 skips only non-finite ones."""
    max_skipped_in_a_row: int = 5
    """Stop the run after this many skipped updates without a good one between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig:
    row_tokens: int
    """T: tokens in a packed row. The longest sequence must fit."""
    microbatch_rows: int
    """Rows of one forward and backward pass, over all devices."""
    max_segments: int = 64
    """Most sequences in one row."""
    share_prompts: bool = True
    """Completions of one prompt stand behind one copy of it in a row (GRPO; preferences always share)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    source: str
    """`arithmetic`, `ifeval` (generated instruction-following prompts), `ifeval_combined` (1 to 10 of all 25 instructions
    each), `reasoning_gym:TASK`, `python:MODULE:FUNCTION` (a generator of your own: lnjax/data/rows.py), or a .jsonl file in
    the Llama-Nemotron RL schema."""
    split: Literal["train", "heldout"] = "train"
    """Disjoint halves of generated sources. A .jsonl file is what it is."""
    num_prompts: int = 0
    """Prompts in the source before it repeats in another order; 0: all of a file."""
    seed: int = 0
    """Of generated sources, and of the order."""
    verifier: str = ""
    """Of every prompt, whatever its row asks for; empty: the row's own."""
    system_prompt: str = ""
    """Sent as the system message where a row has none; empty sends none."""
    tools: Literal["none", "calculator"] = "none"
    """Shown in the system message of rows that bring no `tools`; what answers calls is the run's `environment`."""
    max_prompt_tokens: int = 512
    """A longer prompt is an error that names its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceDataConfig:
    source: str
    """`arithmetic` (generated: right against wrong answers), `python:MODULE:FUNCTION`, or a .jsonl file: HelpSteer2 or
    HelpSteer3 as published, or rows of the SFT schema with `chosen` and `rejected` in place of `output` (and `chosen_reward`,
    `rejected_reward`)."""
    split: Literal["train", "heldout"] = "train"
    """Disjoint halves of the generated source. A .jsonl file is what it is."""
    num_comparisons: int = 0
    """Pairs (rated answers for regression) taken; 0: all of a file."""
    seed: int = 0
    """Of the generated source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineConfig:
    """Answers that the policy itself samples before each update, scored as in GRPO (the run's `reward`). RPO only."""

    prompts: PromptConfig
    samples_per_prompt: int
    """K answers of one comparison. A row must hold them all behind their prompt."""
    sampling: SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig:
    """The policy moves towards answers preferred to others, measured from the weights at the start of this stage."""

    data: PreferenceDataConfig | OnlineConfig
    """Pairs that are there, or answers sampled on the way (online RPO)."""
    loss: Literal["dpo", "rpo_squared", "rpo_forward_kl", "rpo_backward_kl"] = "dpo"
    """DPO (arXiv 2305.18290), or RPO (arXiv 2502.00203) by its distance; the formulas stand in lnjax/learn/preference.py."""
    beta: float
    """Implicit reward of an answer: beta x (its logprob - the reference's). The KL weight of the published recipes."""
    eta: float = 1.0
    """RPO: scale of the given rewards."""
    steps: int
    batch_size: int
    """Pairs, or online prompts, of one update."""
    pack: PackConfig
    """The answers to a prompt share its tokens and lie in one row; max_segments counts prompts."""
    optimizer: OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    """The policy's trunk with a linear head on the last token of an answer, trained on judged answers."""

    data: PreferenceDataConfig
    objective: Literal["bradley_terry", "regression"] = "bradley_terry"
    """One score, of which the preferred answer gets more; or the five HelpSteer2 ratings of each answer by itself."""
    heldout: PreferenceDataConfig | None = None
    """Pairs on which the trained model is measured: how often the preferred answer has the higher (first) score."""
    steps: int
    batch_size: int
    """Pairs (rated answers for regression) of one update."""
    pack: PackConfig
    optimizer: OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerConfig:
    """A trained reward model, in the learner's process or behind a server. It must have the policy's tokenizer."""

    source: str
    """Folder of the run that trained it; or `http://host:port` of a vLLM server of it (`python -m lnjax.convert orbax`, then
    `vllm serve FOLDER --runner pooling`), its key (if any) in $LNJAX_REWARD_KEY. The tokenizer of a server is not checked."""
    weights: tuple[float, ...] = ()
    """Of its scores in their sum; empty: the first alone."""
    pack: PackConfig | None = None
    """Rows of a forward pass in this process; a server needs none."""
    served_name: str = ""
    """Under which a server knows the model; empty: its only one."""
    deadline_s: float = 600.0
    """Seconds for a server's scores of one step, all tries included; past it the run ends. Stay below
    cluster.step_deadline_s."""
    concurrency: int = 16
    """Requests to a server under way at once, of up to 16 sequences each."""

    @property
    def served(self) -> bool:
        return self.source.startswith(("http://", "https://"))
