"""Prompts with 1 to 10 of the 25 IFEval instructions each, as the report's instruction-following stage has them (arXiv
2505.00949, section 6). Chosen: topics, parameters, wording, and what goes together, so that every prompt can be followed."""

import hashlib
import random
from typing import Any

from lnjax.data.ifeval_prompts import KEYWORDS, REQUESTS, TOPICS
from lnjax.errors import DataError

MAX_INSTRUCTIONS = 10
END = "Is there anything else I can help with?"
AT = ("less than", "at least")
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "keywords:existence": ({"keywords": [[w] for w in KEYWORDS[:6]]}, 'Include the word "{keywords[0]}".'),
    "keywords:frequency": (
        {"keyword": KEYWORDS[6:9], "frequency": (2, 3), "relation": AT[1:]},
        'Use the word "{keyword}" at least {frequency} times.',
    ),
    "keywords:forbidden_words": ({"forbidden_words": [[w] for w in KEYWORDS[9:]]}, "Never say {forbidden_words[0]}."),
    "keywords:letter_frequency": (
        {"letter": tuple("aeiot"), "let_frequency": (4, 8), "let_relation": AT[1:]},
        "The letter {letter} should appear at least {let_frequency} times.",
    ),
    "language:response_language": (
        {"language": ("de", "es", "fr")},
        "Answer in the language whose code is {language}.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": (5, 9), "relation": AT},
        "Use {relation} {num_sentences} sentences.",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": (2, 3)},
        "Write {num_paragraphs} paragraphs, with *** between them.",
    ),
    "length_constraints:number_words": ({"num_words": (60, 100), "relation": AT}, "Use {relation} {num_words} words."),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": (2, 3), "nth_paragraph": (1, 2), "first_word": ("sometimes", "often", "people")},
        "Write {num_paragraphs} paragraphs with an empty line between them; number {nth_paragraph} starts with {first_word}.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": (1, 2)},
        "Put at least {num_placeholders} placeholders in square brackets, such as [name].",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": ("P.S.",)},
        "Add a postscript that starts with {postscript_marker}",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": (2, 3)},
        "Have exactly {num_bullets} bullet points that start with *.",
    ),
    "detectable_format:constrained_response": (
        {},
        "Answer with one of these: My answer is yes. My answer is no. My answer is maybe.",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": (1, 2)},
        "Mark at least {num_highlights} *parts* so.",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": ("Section",), "num_sections": (2, 3)},
        "Have {num_sections} sections, headed {section_spliter} 1, {section_spliter} 2 and so on.",
    ),
    "detectable_format:json_format": ({}, "The whole answer should be JSON."),
    "detectable_format:title": ({}, "Give it a title in double angular brackets, such as <<A title>>."),
    "combination:two_responses": ({}, "Give two different answers with ****** between them."),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": ()},
        "First repeat the sentence before this one, word for word.",
    ),
    "startend:end_checker": ({"end_phrase": (END,)}, "End with exactly: {end_phrase}"),
    "startend:quotation": ({}, "Wrap the whole answer in double quotation marks."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": (1, 2), "capital_relation": AT[1:]},
        "Write at least {capital_frequency} words in capital letters only.",
    ),
    "change_case:english_capital": ({}, "Write in English and in capital letters only."),
    "change_case:english_lowercase": ({}, "Write in English and in small letters only."),
    "punctuation:no_comma": ({}, "Use no commas."),
}
"""{instruction: (choices of its parameters, the sentence that asks for it)}."""
ALONE = {"language:response_language", "detectable_format:constrained_response", "detectable_format:json_format"}
ALONE |= {"combination:repeat_prompt"}
"""These go with no other."""
APART = (
    {k for k in KINDS if "paragraph" in k} | {"detectable_format:multiple_sections", "combination:two_responses"},
    {k for k in KINDS if k.startswith("change_case")} | {"detectable_format:multiple_sections"},
    {k for k in KINDS if k.startswith("startend")},
)
"""One of each set at most."""


def combined_prompts(num_prompts: int, *, seed: int, split: str) -> list[dict[str, Any]]:
    """Distinct rows of the RL schema; the same for the same arguments. One in ten is heldout, by hash of what it asks."""
    rng, rows = random.Random(f"ifeval_combined/{split}/{seed}"), {}
    for _ in range(100 * num_prompts + 1000):
        if len(rows) == num_prompts:
            return list(rows.values())
        request = rng.choice(REQUESTS).format(topic=rng.choice(TOPICS))
        names, kwargs = _choose(rng), []
        for name in names:
            kwargs.append({k: rng.choice(values) if values else request for k, values in KINDS[name][0].items()})
        asks = [KINDS[name][1].format(**given) for name, given in zip(names, kwargs, strict=True)]
        text = " ".join([request, *asks])
        if (hashlib.sha256(text.encode()).digest()[0] < 26) == (split == "heldout"):
            args = {"instruction_id_list": names, "instruction_kwargs": kwargs}
            rows[text] = {"input": text, "args": args, "category": "instruction_following"}
    raise DataError(
        f"ifeval_combined: only {len(rows)} of {num_prompts} distinct prompts in {split!r}; lower num_prompts"
    )


def _choose(rng: random.Random) -> list[str]:
    """1 to 10 instructions that can be followed together."""
    wanted, found = rng.randint(1, MAX_INSTRUCTIONS), []
    for name in rng.sample(sorted(KINDS), len(KINDS)):
        clash = name in ALONE or any(name in group and group & set(found) for group in APART)
        if not found or not clash:
            found.append(name)
        if len(found) == wanted or found[0] in ALONE:
            break
    return found
