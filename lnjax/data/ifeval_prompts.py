"""Generated instruction-following prompts in the published RL schema, short enough for a small model to have signal."""

import hashlib
import random
from collections.abc import Callable
from typing import Any

from lnjax.errors import DataError

REQUESTS = (
    "Write about {topic}.",
    "Tell me something about {topic}.",
    "Describe {topic}.",
    "Explain why people like {topic}.",
    "Give some advice about {topic}.",
    "Write a short text about {topic}.",
    "What should a beginner know about {topic}?",
    "Write a note to a friend about {topic}.",
)
TOPICS = (
    "baking bread", "riding a bicycle", "growing tomatoes", "keeping a cat", "learning the piano", "a rainy day",
    "the ocean", "morning coffee", "reading books", "walking in a forest", "cooking soup", "playing chess",
    "a train journey", "birds in winter", "drinking tea", "painting a room", "swimming in a lake", "a snowy mountain",
    "saving money", "sleeping well", "a busy market", "making friends", "the night sky", "running in the park",
    "an old house", "taking photographs", "summer holidays", "fixing a chair", "writing letters", "a small garden",
    "public libraries", "honey bees", "learning a language", "a football match", "camping with children", "city buses",
    "fresh fruit", "telling stories", "music at home", "a visit to a museum",
)  # fmt: skip
KEYWORDS = (
    "light",
    "water",
    "simple",
    "happy",
    "quiet",
    "time",
    "strong",
    "home",
    "green",
    "slow",
    "careful",
    "bright",
)

Constraint = tuple[str, dict[str, Any], str]
"""(instruction id, its arguments, the sentence that asks for it)."""


def ifeval_prompts(num_prompts: int, *, seed: int, split: str) -> list[dict[str, Any]]:
    """Distinct rows of the RL schema; the same for the same arguments.

    One in ten combinations of topic and constraints is heldout, by hash, so the splits share none whatever the seeds.
    """
    rng = random.Random(f"ifeval/{split}/{seed}")
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(100 * num_prompts + 1000):
        if len(rows) == num_prompts:
            return list(rows.values())
        topic, request = rng.choice(TOPICS), rng.choice(REQUESTS)
        pair = rng.random() < 0.2
        makers = [rng.choice(STYLE), rng.choice(SHAPE)] if pair else [rng.choice(STYLE + SHAPE)]
        constraints = [make(rng) for make in makers]
        identity = f"{topic}/{[(name, kwargs) for name, kwargs, _ in constraints]}"
        held_out = hashlib.sha256(identity.encode()).digest()[0] < 26
        if held_out != (split == "heldout") or identity in rows:
            continue
        text = " ".join([request.format(topic=topic), *(sentence for _, _, sentence in constraints)])
        rows[identity] = {
            "input": [{"role": "user", "content": text}],
            "args": {
                "instruction_id_list": [name for name, _, _ in constraints],
                "instruction_kwargs": [kwargs for _, kwargs, _ in constraints],
            },
            "category": "instruction_following",
        }
    raise DataError(
        f"ifeval: only {len(rows)} distinct prompts in split {split!r}, {num_prompts} asked for; lower num_prompts"
    )


def _no_comma(rng: random.Random) -> Constraint:
    asks = ("Do not use any commas.", "Your answer must not contain commas.", "Avoid commas in your whole response.")
    return "punctuation:no_comma", {}, rng.choice(asks)


def _keyword(rng: random.Random) -> Constraint:
    word = rng.choice(KEYWORDS)
    asks = (f'Include the word "{word}".', f'Use the word "{word}" in your answer.', f"Mention the keyword {word}.")
    return "keywords:existence", {"keywords": [word]}, rng.choice(asks)


def _bullets(rng: random.Random) -> Constraint:
    count = rng.choice((2, 3, 4))
    asks = (
        f"Answer with exactly {count} bullet points that start with *.",
        f"Your answer must be exactly {count} bullet points, each starting with *.",
    )
    return "detectable_format:number_bullet_lists", {"num_bullets": count}, rng.choice(asks)


def _at_most(rng: random.Random) -> Constraint:
    limit = rng.choice((15, 20, 25))
    asks = (f"Use less than {limit} words.", f"Keep your answer under {limit} words.")
    return "length_constraints:number_words", {"num_words": limit, "relation": "less than"}, rng.choice(asks)


def _at_least(rng: random.Random) -> Constraint:
    limit = rng.choice((30, 40))
    asks = (f"Answer with at least {limit} words.", f"Your answer should have {limit} words or more.")
    return "length_constraints:number_words", {"num_words": limit, "relation": "at least"}, rng.choice(asks)


def _one_sentence(rng: random.Random) -> Constraint:
    asks = ("Answer with less than 2 sentences.", "Answer in one sentence only.")
    return "length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, rng.choice(asks)


def _quotation(rng: random.Random) -> Constraint:
    asks = (
        "Wrap your entire response in double quotation marks.",
        "Put double quotation marks around your whole answer.",
    )
    return "startend:quotation", {}, rng.choice(asks)


def _lowercase(rng: random.Random) -> Constraint:
    asks = ("Write in English and only in lowercase letters.", "Use lowercase letters only. No capital letters.")
    return "change_case:english_lowercase", {}, rng.choice(asks)


STYLE: tuple[Callable[[random.Random], Constraint], ...] = (_no_comma, _keyword, _lowercase)
SHAPE: tuple[Callable[[random.Random], Constraint], ...] = (_bullets, _at_most, _at_least, _one_sentence, _quotation)
"""A prompt has one constraint, or one of each kind: any two of different kinds can be met together."""
