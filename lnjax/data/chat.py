"""Messages to token ids with a loss mask, and the linter that proves a template fit for training."""

from collections.abc import Mapping, Sequence
from typing import Any

from lnjax.data.tokenizer import Tokenizer
from lnjax.errors import DataError, TemplateError
from lnjax.types import Sample

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
PROBE = (
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2=?"},
)


def check_roles(messages: Sequence[Message], *, where: str) -> None:
    """Raises DataError for a role the templates do not know or a content that is not text."""
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            got = message.get("role") if isinstance(message, Mapping) else message
            raise DataError(f"{where}: unknown role {got!r}; expected one of {ROLES}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: content of the {message['role']} message is not a string")


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to where the assistant starts to write."""
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))


def tool_turn(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """What follows the stop token of an assistant's turn when a tool says `text`, up to where the assistant speaks again.

    Special tokens in `text` are recognised: it must not be another's. Raises TemplateError where it does not arrive whole.
    """
    user, assistant, _ = PROBE
    head = supervised(tokenizer, [user], answer=assistant["content"], where="chat template").token_ids
    whole = prompt_ids(tokenizer, [user, assistant, {"role": "tool", "content": text}])
    tail = tuple(whole[len(head) :])
    if tuple(whole[: len(head)]) != head or text not in tokenizer.decode(tail, skip_special=False):
        raise TemplateError(
            "chat template: it shows no message of role tool behind the assistant's; use another, or --environment.kind none"
        )
    return tail


def supervised(tokenizer: Tokenizer, messages: Sequence[Message], *, answer: str, where: str) -> Sample:
    """A sample whose targets are the tokens of `answer` and the stop token that ends the turn.

    The prompt is tokenized as the engine will see it; raises TemplateError when the whole conversation does not start
    with exactly those ids, DataError when there is nothing to learn from.
    """
    prompt = prompt_ids(tokenizer, messages)
    text = tokenizer.render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    ids = tokenizer.encode(text)
    if ids[: len(prompt)] != prompt:
        raise TemplateError(
            f"{where}: the conversation with its answer does not start with the ids of its prompt, so the loss mask would "
            "not match what the policy sees; fix the chat template (generation prompt and assistant turn must agree)"
        )
    stops = [i for i in range(len(prompt), len(ids)) if ids[i] in tokenizer.stop_token_ids]
    if not stops:
        raise TemplateError(
            f"{where}: the template ends the assistant's turn without a stop token {tokenizer.stop_token_ids}, so the "
            "policy would never learn to stop; fix the chat template or the tokenizer's eos_token"
        )
    end = stops[-1] + 1  # templates may add a line break after it
    if not answer.strip() or end - len(prompt) < 2:
        raise DataError(f"{where}: empty loss mask (the answer has no tokens); remove the row")
    return Sample(token_ids=tuple(ids[:end]), loss_mask=(0,) * len(prompt) + (1,) * (end - len(prompt)))


def lint_template(tokenizer: Tokenizer) -> None:
    """Raises TemplateError unless masks, stop tokens, turns and round trips hold for a two-turn conversation."""
    user, assistant, again = PROBE
    sample = supervised(tokenizer, [user], answer=assistant["content"], where="chat template")
    target = [i for i, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m]
    if tokenizer.decode(target).strip() != assistant["content"]:
        raise TemplateError(
            f"chat template: the loss mask covers {tokenizer.decode(target)!r}, expected {assistant['content']!r}; "
            "text between the generation prompt and the answer must belong to the prompt"
        )
    whole = prompt_ids(tokenizer, [user, assistant, again])
    if tuple(whole[: len(sample.token_ids)]) != sample.token_ids:
        raise TemplateError(
            "chat template: an assistant turn changes its tokens once another turn follows; it must be prefix-preserving "
            "for cached prefixes and multi-turn masks to be right"
        )
    back = tokenizer.encode(tokenizer.decode(whole, skip_special=False))
    if back != whole:
        at = next((i for i, (a, b) in enumerate(zip(back, whole, strict=False)) if a != b), min(len(back), len(whole)))
        raise TemplateError(
            f"tokenizer: ids do not survive decode and encode (first difference at token {at} of {len(whole)}); the "
            "tokenizer's decoder does not invert it"
        )
