"""The IFEval checkers against those of lm-eval, on generated responses; and prompts that combine many instructions.

lm-eval needs nltk's English punkt model, which is a download. It gets nltk's punkt without the trained model and nltk's own word
tokenizer instead. So the two differ where sentences are counted and where words are split, and nowhere else:

- length_constraints:number_sentences. Ours are the rules that the benchmark itself carries (split_into_sentences), which know
  titles, abbreviations and decimals; untrained punkt ends a sentence at `Dr.`, `P.S.` and `p.m.` A trained one knows those.
- change_case:capital_word_frequency. nltk splits contractions (`DON'T` is `DO` and `N'T`, two capital words) and keeps `A/B`
  whole; ours counts `DON'T` once, as a reader does, and splits at slashes and full stops.
"""

import importlib
import importlib.util
import random
import sys
import types

import nltk
import pytest

from lnjax.data.ifeval_combined import ALONE, KINDS, combined_prompts
from lnjax.rewards.ifeval import CHECKERS, followed

WORDS = ("the", "river", "runs", "past", "quiet", "houses", "and", "people", "walk", "there", "when", "rain", "nobody")
PIECES = (
    "Dr. Smith left at 5 p.m. on Monday.",
    "It cost 3.5 dollars, more or less!",
    "DON'T LOOK NOW.",
    "The U.S. AND A/B tests are HERE.",
    "Why not? Ask e.g. your friend.",
    "* a first point\n* a second point\n* a third point",
    "- one\n- two",
    "<<A Title>>",
    "*emphasis* and **strong words** stay",
    "SECTION 1\nSome text.\nSECTION 2\nMore text.",
    "P.S. remember me",
    "[name] lives at [address]",
    "***\nanother paragraph\n***",
    "First answer.\n******\nSecond answer.",
    "My answer is yes.",
    '{"key": ["value", 1]}',
    '```json\n{"a": 1}\n```',
    "Der Hund schläft heute lange im Garten und träumt.",
    "ALL OF THIS IS WRITTEN IN CAPITAL LETTERS FOR YOU.",
    "all of this is written in small letters for you.",
    "Is there anything else I can help with?",
    "Write about rivers.",
)
NUMBERS = (1, 2, 3)
KWARGS = {
    "keywords:existence": [{"keywords": ["river", "rain"]}, {"keywords": ["letter"]}],
    "keywords:frequency": [
        {"keyword": "the", "frequency": n, "relation": r} for n in NUMBERS for r in ("less than", "at least")
    ],
    "keywords:forbidden_words": [{"forbidden_words": ["houses"]}, {"forbidden_words": ["ask", "dr"]}],
    "keywords:letter_frequency": [{"letter": "e", "let_frequency": n, "let_relation": "at least"} for n in (1, 10, 30)],
    "language:response_language": [{"language": "en"}, {"language": "de"}],
    "length_constraints:number_sentences": [
        {"num_sentences": n, "relation": r} for n in (2, 4, 6) for r in ("less than", "at least")
    ],
    "length_constraints:number_paragraphs": [{"num_paragraphs": n} for n in NUMBERS],
    "length_constraints:number_words": [{"num_words": n, "relation": "less than"} for n in (10, 20, 40)],
    "length_constraints:nth_paragraph_first_word": [
        {"num_paragraphs": n, "nth_paragraph": 1, "first_word": w} for n in NUMBERS for w in ("the", "all")
    ],
    "detectable_content:number_placeholders": [{"num_placeholders": n} for n in NUMBERS],
    "detectable_content:postscript": [{"postscript_marker": "P.S."}, {"postscript_marker": "P.P.S"}],
    "detectable_format:number_bullet_lists": [{"num_bullets": n} for n in NUMBERS],
    "detectable_format:number_highlighted_sections": [{"num_highlights": n} for n in NUMBERS],
    "detectable_format:multiple_sections": [{"section_spliter": "SECTION", "num_sections": n} for n in NUMBERS],
    "combination:repeat_prompt": [{"prompt_to_repeat": "Write about rivers."}],
    "startend:end_checker": [{"end_phrase": "Is there anything else I can help with?"}],
    "change_case:capital_word_frequency": [
        {"capital_frequency": n, "capital_relation": r} for n in (1, 3, 6) for r in ("less than", "at least")
    ],
}
"""The other eight take none."""


HOLDS = {
    "length_constraints:nth_paragraph_first_word": (
        "The first.\n\nAll of the second.",
        "All.\n\nOf.\n\nIt.",
        "The river.",
    ),
    "detectable_format:number_highlighted_sections": ("*one* and *two* and *three words*", "**bold** only"),
    "detectable_format:multiple_sections": ("SECTION 1\nText.\nSECTION 2\nMore.\nSECTION 3\nEnd.", "SECTION 1 text"),
    "startend:end_checker": ("The river. Is there anything else I can help with?",),
    "detectable_content:postscript": ("The river.\n\nP.S. remember", "The river.\n\nP.P.S remember"),
    "combination:repeat_prompt": ("Write about rivers. They run.", "Rivers run."),
    "change_case:english_capital": ("ALL OF THIS IS WRITTEN IN CAPITAL LETTERS FOR YOU.",),
}
"""Responses to instructions that chance seldom follows."""


def response(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 5)):
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + rng.choice(".!?.")
        parts.append(rng.choice((sentence, rng.choice(PIECES))))
    text = rng.choice((" ", "\n", "\n\n", "\n\n")).join(parts)
    return rng.choice((str, str, str, str, str.upper, str.lower, lambda t: f'"{t}"', lambda t: t.replace(",", "")))(
        text
    )


@pytest.fixture(scope="module")
def reference():
    """lm-eval's checkers by id, without the package's own imports."""
    patch = pytest.MonkeyPatch()
    folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        module = types.ModuleType(name)
        module.__path__ = ["/".join([folder, *name.split(".")[1:]])]
        patch.setitem(sys.modules, name, module)
    patch.setattr(nltk.data, "find", lambda name: name)
    found = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT
    tools = sys.modules["lm_eval.tasks.ifeval.instructions_util"]
    sentences, words = nltk.tokenize.punkt.PunktSentenceTokenizer(), nltk.tokenize.NLTKWordTokenizer()
    tools.count_sentences = lambda text: len(sentences.tokenize(text))
    tools.nltk = types.SimpleNamespace(
        tokenize=nltk.tokenize,
        word_tokenize=lambda text: [w for s in sentences.tokenize(text) for w in words.tokenize(s)],
    )
    yield found
    patch.undo()


def by_reference(checkers, text, name, kwargs) -> bool:
    """As lm-eval's test_instruction_following_strict does."""
    checker = checkers[name](name)
    checker.build_description(**kwargs)
    return bool(text.strip()) and bool(checker.check_following(text))


DIFFERENT = {"length_constraints:number_sentences": 1, "change_case:capital_word_frequency": 1}


def test_verdicts_are_those_of_the_reference_on_1500_responses_but_for_a_few_whose_words_or_sentences_are_split(
    reference,
):
    assert set(CHECKERS) == set(reference) and len(CHECKERS) == 25
    rng = random.Random(0)
    held, differ = dict.fromkeys(CHECKERS, 0), dict.fromkeys(CHECKERS, 0)
    for i in range(1500):
        name = sorted(CHECKERS)[i % 25]
        text, kwargs = response(rng), rng.choice(KWARGS.get(name, [{}]))
        if name in HOLDS and rng.random() < 0.5:
            text = rng.choice(HOLDS[name])
        ours = followed(text, [name], [kwargs])[0]
        held[name] += ours
        differ[name] += ours != by_reference(reference, text, name, kwargs)
    assert {name: count for name, count in differ.items() if count} == DIFFERENT
    assert [name for name, count in held.items() if not 0 < count < 60] == []  # each is seen to hold and to fail


@pytest.mark.parametrize(
    ("text", "name", "kwargs", "ours", "theirs"),
    [
        ("Dr. Smith left. He ran.", "length_constraints:number_sentences", (3, "less than"), True, False),
        ("DON'T go.", "change_case:capital_word_frequency", (2, "at least"), False, True),
        ("The A/B test.", "change_case:capital_word_frequency", (2, "at least"), True, False),
    ],
)
def test_the_differences_are_these(reference, text, name, kwargs, ours, theirs):
    keys = ("num_sentences", "relation") if "sentences" in name else ("capital_frequency", "capital_relation")
    kwargs = dict(zip(keys, kwargs, strict=True))
    assert followed(text, [name], [kwargs]) == [ours]
    assert by_reference(reference, text, name, kwargs) == theirs


def test_a_prompt_has_1_to_10_of_all_25_instructions_none_against_another():
    rows = combined_prompts(1000, seed=0, split="train")
    lists = [row["args"]["instruction_id_list"] for row in rows]
    assert set().union(*lists) == set(KINDS) == set(CHECKERS)
    assert {len(names) for names in lists} == set(range(1, 11))
    assert all(len(names) == 1 for names in lists if ALONE & set(names))
    for row in rows:  # every parameter is known to its checker, which may or may not hold
        followed("Some text.", row["args"]["instruction_id_list"], row["args"]["instruction_kwargs"])


def test_combined_prompts_are_the_same_again_and_splits_share_none():
    train = combined_prompts(300, seed=0, split="train")
    assert train == combined_prompts(300, seed=0, split="train")
    held_out = combined_prompts(100, seed=7, split="heldout")
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}


def test_ten_instructions_can_be_followed_together():
    names = [
        *(
            "keywords:existence",
            "keywords:forbidden_words",
            "length_constraints:number_paragraphs",
            "punctuation:no_comma",
        ),
        *("detectable_content:number_placeholders", "detectable_content:postscript", "detectable_format:title"),
        *("detectable_format:number_bullet_lists", "change_case:english_lowercase", "startend:end_checker"),
    ]
    kwargs = [{k: values[0] for k, values in KINDS[name][0].items()} for name in names]
    text = (
        "<<a river>>\nthe light of [name] falls on [place] where people walk.\n***\n* one point here\n* two points here\n"
        "\np.s. remember the boats.\nis there anything else i can help with?"
    )
    assert followed(text, names, kwargs) == [True] * 10
