"""Prompts with 1 to 10 of the 25 IFEval instructions each, as the report's instruction-following stage has them (arXiv
2505.00949, section 6). Chosen: topics, parameters, wording, and what goes together, so that every prompt can be followed."""

import hashlib
import random
from typing import Any

from lnjax.data.ifeval_prompts import KEYWORDS, REQUESTS, TOPICS
from lnjax.errors import DataError

MAX_INSTRUCTIONS = 10
AT = ("less than", "at least")
_LENGTH, _FORMAT, _COUNTS = "length_constraints", "detectable_format", (2, 3)
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "keywords:existence": ({"keywords": [[w] for w in KEYWORDS[:6]]}, "Include the word {keywords[0]}."),
    "keywords:frequency": (
        {"keyword": KEYWORDS[6:9], "frequency": _COUNTS, "relation": AT[1:]}, "Say {keyword} {frequency} times."
    ),
    "keywords:forbidden_words": ({"forbidden_words": [[w] for w in KEYWORDS[9:]]}, "Never say {forbidden_words[0]}."),
    "keywords:letter_frequency": (
        {"letter": tuple("aeiot"), "let_frequency": (4, 8), "let_relation": AT[1:]},
        "Have the letter {letter} {let_frequency} times.",
    ),
    "language:response_language": ({"language": ("de", "es", "fr")}, "Answer in the language whose code is {language}."),
    f"{_LENGTH}:number_sentences": ({"num_sentences": (5, 9), "relation": AT}, "Use {relation} {num_sentences} sentences."),
    f"{_LENGTH}:number_paragraphs": ({"num_paragraphs": _COUNTS}, "Write {num_paragraphs} paragraphs, with *** between them."),
    f"{_LENGTH}:number_words": ({"num_words": (60, 100), "relation": AT}, "Use {relation} {num_words} words."),
    f"{_LENGTH}:nth_paragraph_first_word": (
        {"num_paragraphs": _COUNTS, "nth_paragraph": (1, 2), "first_word": ("sometimes", "often", "people")},
        "Write {num_paragraphs} paragraphs with an empty line between them; number {nth_paragraph} starts with {first_word}.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": _COUNTS}, "Have {num_placeholders} gaps such as [name]."),
    "detectable_content:postscript": ({"postscript_marker": ("P.S.",)}, "Add a postscript that starts with {postscript_marker}"),
    f"{_FORMAT}:number_bullet_lists": ({"num_bullets": _COUNTS}, "Have exactly {num_bullets} bullet points that start with *."),
    f"{_FORMAT}:constrained_response": ({}, "Answer one of: My answer is yes. My answer is no. My answer is maybe."),
    f"{_FORMAT}:number_highlighted_sections": ({"num_highlights": _COUNTS}, "Mark {num_highlights} parts *like this*."),
    f"{_FORMAT}:multiple_sections": (
        {"section_spliter": ("Section",), "num_sections": _COUNTS},
        "Have {num_sections} parts, headed {section_spliter} 1 and so on.",
    ),
    f"{_FORMAT}:json_format": ({}, "The whole answer should be JSON."),
    f"{_FORMAT}:title": ({}, "Give it a title in double angular brackets, such as <<A title>>."),
    "combination:two_responses": ({}, "Give two different answers with ****** between them."),
    "combination:repeat_prompt": ({"prompt_to_repeat": ()}, "First repeat the sentence before this one, word for word."),
    "startend:end_checker": ({"end_phrase": ("Is there anything else I can help with?",)}, "End with exactly: {end_phrase}"),
    "startend:quotation": ({}, "Wrap the whole answer in double quotation marks."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": _COUNTS, "capital_relation": AT[1:]}, "Write {capital_frequency} words in capital letters only."
    ),
    "change_case:english_capital": ({}, "Write in English and in capital letters only."),
    "change_case:english_lowercase": ({}, "Write in English and in small letters only."),
    "punctuation:no_comma": ({}, "Use no commas."),
}  # fmt: skip
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
