"""Every knob of a run: typed, frozen, documented. Imports no jax.

A config is complete: `configs/NAME.py` returns a `RunConfig`, the command line may override any leaf
(`--grpo.steps 10`), and what is derived is a property, never stored.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lnjax.architecture import AttentionSpec as AttentionSpec
from lnjax.architecture import BlockSpec as BlockSpec
from lnjax.architecture import FfnSpec as FfnSpec
from lnjax.architecture import ModelSpec as ModelSpec
from lnjax.architecture import RopeSpec as RopeSpec
from lnjax.architecture import uniform_blocks as uniform_blocks
from lnjax.training import OnlineConfig as OnlineConfig
from lnjax.training import OptimizerConfig as OptimizerConfig
from lnjax.training import PackConfig as PackConfig
from lnjax.training import PreferenceConfig as PreferenceConfig
from lnjax.training import PreferenceDataConfig as PreferenceDataConfig
from lnjax.training import PromptConfig as PromptConfig
from lnjax.training import RewardModelConfig as RewardModelConfig
from lnjax.training import SamplingConfig as SamplingConfig
from lnjax.training import ScorerConfig as ScorerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in place of full training: they alone are trained, checkpointed and handed from
    stage to stage, over the weights of `source`. What samples, and the exported weights, have them merged in."""

    rank: int = 0
    """Of each adapter; 0 trains all weights."""
    alpha: float = 32.0
    """An adapter's product counts alpha / rank times."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Kernels that get one, in every block that has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    source: str = "random"
    """Weights: `random` (needs spec), a folder in Hugging Face format, the folder of an earlier run, a .gguf file, or
    `package:NAME/FILE.gguf` for a file that an installed Python package ships."""
    spec: Annotated[ModelSpec | None, tyro.conf.Suppress] = None
    """Architecture: needed for source=random, else what the checkpoint must have. None: whatever it has."""
    tokenizer: str = "same"
    """`same` as source, another folder or .gguf, or `arithmetic` (built in: single characters with Llama-3 headers)."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Master weights (adapters, where they are trained) and optimizer state."""
    lora: LoraConfig = LoraConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Activations, matmul operands and the weights below adapters; logits, norms and losses stay in float32."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matmul outputs, or whole blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    data: int = 1
    """Replicas of the parameters; batch rows are split over them."""
    fsdp: int = -1
    """Shards of parameters and optimizer, rows split too. -1: all devices the other axes leave."""
    context: int = 1
    """Splits the positions of a row, and shards parameters and optimizer as fsdp does; attention gathers keys and values."""
    tensor: int = 1
    """Splits heads, ffn width and vocabulary; between blocks also the positions of a row, where it divides them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsConfig:
    matmul: Literal["xla", "fp8", "te"] = "xla"
    """Products of the blocks: in compute_dtype, or with both operands in FP8 (current scaling, forward and backward; GPUs
    of compute capability 8.9 and later) by XLA or by Transformer Engine. Embedding and head stay in compute_dtype."""
    attention: Literal["xla", "cudnn", "te"] = "xla"
    """Blocks of queries against blocks of keys, causal inside a segment; or cuDNN's kernel over packed rows (Hopper and later,
    bfloat16), which knows no shared prompts (pack.share_prompts) and no mesh.context, by JAX or by Transformer Engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedConfig:
    """The rollout engine in the learner's own process (JAX, static KV cache, continuous batching)."""

    num_slots: int = 64
    """Sequences decoded at once, over all devices."""
    max_len: int = 1024
    """Prompt plus completion, in tokens: the length of the KV cache."""
    decode_chunk: int = 16
    """Tokens decoded between two looks of the scheduler."""
    prefill_rows: int = 8
    """Prompts prefilled in one pass."""
    prefill_multiple: int = 64
    """Prompt and cache lengths are bucketed to this many tokens times a power of two; one program a bucket."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights, KV cache and activations."""
    speculate: int = 0
    """Draft tokens checked in one decoding step, looked up in the sequence itself; the samples stay the same. 0: off."""
    ngram: int = 2
    """Drafts are what followed the last earlier place of so many final tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """A fleet of vLLM servers, started and watched here or already running elsewhere."""

    max_len: int = 1024
    """Prompt plus completion, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Published weights, and weights, activations and KV cache of the servers."""
    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: the servers quantise each published version as they load it (GPU only)."""
    num_servers: int = 1
    """Started on this host. 0 where `addresses` are given."""
    addresses: tuple[str, ...] = ()
    """`http://host:port` of servers that launch/serve.sh started; they read the same publish folder."""
    tensor_parallel: int = 1
    """Ranks of one server."""
    gpus: tuple[int, ...] = ()
    """GPUs of this host that its servers share out, tensor_parallel each; empty: the first ones."""
    max_sequences: int = 256
    """Sequences a server decodes at once."""
    gpu_memory: float = 0.9
    """Share of a GPU's memory that a server takes."""
    cpu_cache_gib: int = 1
    """KV cache of a server on a CPU machine, in GiB."""
    environment: str = ".venv-rollout"
    """Virtual environment with vLLM and the plugin (launch/rollout_env.sh)."""
    host: str = "127.0.0.1"
    """Address that local servers bind to. Every route but /health asks for the bearer key."""
    publish_dir: str = ""
    """Folder of the published versions, on a file system that all servers see; empty: RUN_DIR/weights."""
    keep_versions: int = 2
    """Newest versions kept; one that a server reads stays longer."""
    swap: Literal["together", "rolling"] = "together"
    """All servers change weights at once, or one after the other."""
    start_deadline_s: float = 900.0
    """From the start of a server to its first answer."""
    swap_deadline_s: float = 600.0
    """One server's change of weights."""
    request_deadline_s: float = 1800.0
    """One prompt's completions."""
    probe_deadline_s: float = 30.0
    """A server that does not answer a probe for so long is taken for hung and started again."""
    max_restarts: int = 20
    """A server that needs more is dropped; without any server the run stops."""
    parity_samples: int = 4
    """Completions a step whose logprobs the learner computes again, under the weights that produced each token."""
    parity_limit: float = 1.05
    """The run stops when the mean over their tokens of exp|learner - server logprob| is above this."""


EngineConfig = EmbeddedConfig | VllmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A language model behind an OpenAI-compatible server that says whether an answer agrees with the reference."""

    address: str
    """`http://host:port`, its key (if any) in $LNJAX_JUDGE_KEY; or `rule`: a stand-in that is started in this process and
    compares the last numbers."""
    model: str = ""
    """Name under which the server knows the model."""
    deadline_s: float = 60.0
    """Seconds for one answer's verdict, all tries included; past it the sample scores 0."""
    concurrency: int = 64
    """Requests under way at once."""
    retries: int = 4
    """Further tries, with growing pauses, after no reply, a server error or a reply that is no verdict."""
    rule_first: bool = True
    """Expressions that math-verify finds equal are right without asking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    num_workers: int = 2
    """Processes that run verifiers."""
    deadline_s: float = 10.0
    """Seconds one completion's verifier may take; past it the worker is killed and the sample scores 0."""
    format: Literal["none", "think"] = "none"
    """`think` multiplies by the think-tag check: reasoning on needs exactly one <think>…</think>, off none."""
    judge: JudgeConfig | None = None
    """Behind the verifier `judge`; None where no prompt asks for it."""
    model: ScorerConfig | None = None
    """Behind the verifier `reward_model`; None where no prompt asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig:
    """Answers the policy between its turns. `sampling.max_new_tokens` is then one turn's."""

    kind: Literal["none", "calculator"] = "none"
    """`calculator` evaluates `<TOOLCALL>[{"name": "calculator", "arguments": {"expression": "..."}}]</TOOLCALL>`."""
    max_turns: int = 4
    """Of the policy; an episode that asks for more is unfinished."""
    max_tokens: int = 1024
    """Of all turns and replies after the prompt. A turn begins only where its max_new_tokens fit in, else the episode is
    unfinished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumConfig:
    """Prompts from easy to hard by their measured pass rates; the algorithm stands in lnjax/data/curriculum.py."""

    order: Literal["easy_to_hard", "random"] = "easy_to_hard"
    """`random`: the same prompts without a target, to compare with."""
    drop_at: float = 0.75
    """Prompts of this pass rate and above are left out."""
    start: float = 0.625
    """Centre of the first batch's target over pass rates."""
    end: float = 0.0
    """Centre of the last batch's."""
    sigma: float = 0.125
    """Width of the target, in pass rate."""
    bins: int = 8
    """Steps between pass rates 0 and 1; as many as samples measured each."""
    batches: int = 0
    """Batches over which the centre moves; 0: as many as the prompts fill. With more prompts it stays at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    prompts: PromptConfig
    num_samples: int = 1
    """Completions per prompt; the mean reward is reported with a 95 % interval over prompts."""
    sampling: SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; the last step of a stage is always kept. 0: only that."""
    keep: int = 2
    """Newest checkpoints kept."""
    export_hf: bool = True
    """Write the final weights in Hugging Face format (bfloat16) into RUN_DIR/hf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftDataConfig:
    source: str
    """`arithmetic`, `python:MODULE:FUNCTION` or a .jsonl file in the Llama-Nemotron SFT schema."""
    more: tuple[str, ...] = ()
    """Further sources of a blend."""
    weights: tuple[float, ...] = ()
    """Of `source` and each of `more`: their shares of the examples, whatever their sizes (a small one comes around more often).
    Empty: all examples alike."""
    num_examples: int = 0
    """Of each generated source; 0: all of a file."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning: token-level cross-entropy on assistant tokens of packed rows."""

    data: SftDataConfig
    steps: int
    batch_rows: int
    """Packed rows of one update, over all devices."""
    pack: PackConfig
    optimizer: OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoLossConfig:
    """GRPO (arXiv 2402.03300) and the variants in use since."""

    clip_low: float = 0.2
    """Ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above 1 + clip_high (clip-higher: DAPO, arXiv 2503.14476)."""
    dual_clip: float = 0.0
    """Bound on the loss of negative advantages, c in arXiv 1912.09729; 0 turns it off."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference (the weights at the start of this stage); 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of KL(current || reference)."""
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    """Mean over tokens; mean over sequences of token means; or sum over tokens divided by sequences times
    max_new_tokens (arXiv 2503.20783)."""
    importance_cap: float = 0.0
    """Truncated importance sampling: each token's loss is weighted by min(cap, exp(old - sampler)); 0 turns it off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageConfig:
    baseline: Literal["group_mean", "leave_one_out"] = "leave_one_out"
    normalize_std: bool = True
    """Divide by the group's standard deviation where it is positive."""
    overlong_filter: bool = False
    """Leave completions that ran out of tokens out of the loss and the baseline; else they score 0 and stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimization with a rollout engine and verifiers."""

    prompts: PromptConfig
    curriculum: CurriculumConfig | None = None
    """Order of the prompts; None: a new random one every epoch."""
    prompts_per_step: int
    """P: prompts of one rl_step."""
    samples_per_prompt: int
    """G: completions of each."""
    steps: int
    """Cycles of sample, score, update, publish."""
    updates_per_step: int = 1
    """Optimizer updates a cycle; the rollouts are split into this many batches."""
    max_staleness: int = 0
    """Steps by which the weights that sampled a token may be behind the learner. 0: sample, then update; N: sampling goes
    on during N updates (loss.importance_cap must then be positive)."""
    sampling: SamplingConfig
    advantage: AdvantageConfig = AdvantageConfig()
    loss: GrpoLossConfig = GrpoLossConfig()
    pack: PackConfig
    optimizer: OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How long the processes of a run wait for each other before one of them is taken for dead or stuck."""

    start_deadline_s: float = 900.0
    """From a process's start until all have found each other. Cold nodes that import from a shared file system are slow."""
    heartbeat_s: float = 15.0
    """A process that gives no sign of life for so long is taken for dead; the others name it and end."""
    step_deadline_s: float = 3600.0
    """A process that stays in one phase (sample, update, save, evaluate, …) for longer is stuck. Compiling counts, and a
    rollout may wait for servers to start: stay above engine.request_deadline_s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """Which rollouts RUN_DIR/rollouts.jsonl keeps for people to read; `python -m lnjax.report` shows them."""

    per_doubling: int = 8
    """Steps recorded while their number doubles (every step up to twice as many): 55 of 500, 89 of 10,000. 0: none."""
    groups: int = 2
    """Groups of such a step, drawn at random."""
    samples: int = 8
    """Completions of a group, the first ones."""
    tokens: int = 512
    """Tokens of a completion or a prompt; of longer ones the first and the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: a model, then its training stages in order."""

    name: str
    seed: int = 0
    """Base of every random draw."""
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    ops: OpsConfig = OpsConfig()
    engine: EngineConfig = EmbeddedConfig()
    """What samples, for GRPO and for evaluation."""
    reward: RewardConfig = RewardConfig()
    """What scores, for GRPO and for evaluation."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """What answers the policy's tool calls, for GRPO and for evaluation."""
    sft: SftConfig | None = None
    preference: PreferenceConfig | None = None
    grpo: GrpoConfig | None = None
    reward_model: RewardModelConfig | None = None
    """Makes another model of the policy, so it is the last stage."""
    stages: tuple[str, ...] = ()
    """Their order; empty: those that are there, in the order above."""
    eval: EvalConfig | None = None
    """Held-out evaluation before the first stage and after each."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    cluster: ClusterConfig = ClusterConfig()
    """Deadlines between processes."""
    profile: str = ""
    """`steps=5..8`: trace these steps of every stage (process 0) into RUN_DIR/profile and print where their time went."""
