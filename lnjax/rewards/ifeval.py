"""The 25 instruction checkers of IFEval (arXiv 2311.07911), from the package if-verifiable, made to run offline."""

import importlib.util
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import nltk
from langdetect import DetectorFactory

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d+|[^\w\s]")


def _registry() -> dict[str, Any]:
    """The checkers by id. The package's own __init__ needs a dataset library that nothing here does, so it is not run."""
    name = "if_verifiable"
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("if-verifiable is not installed; it holds the IFEval checkers")
        package = types.ModuleType(name)
        package.__path__ = list(found.submodule_search_locations)
        sys.modules[name] = package
    from if_verifiable.ifeval import instructions_registry, instructions_util  # noqa: PLC0415

    # nltk's punkt data is a download; the package's own rules split sentences, a pattern splits words.
    instructions_util.count_sentences = lambda text: len(instructions_util.split_into_sentences(text))
    instructions_util.nltk = types.SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=WORD.findall)
    DetectorFactory.seed = 0
    return instructions_registry.INSTRUCTION_DICT


CHECKERS = _registry()


def followed(answer: str, ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each instruction is followed (strict: the text as it is; an empty one follows none)."""
    if len(ids) != len(kwargs) or not ids:
        raise ValueError(f"{len(ids)} instruction ids and {len(kwargs)} kwargs; expected as many, and at least one")
    verdicts = []
    for name, arguments in zip(ids, kwargs, strict=True):
        if name not in CHECKERS:
            raise ValueError(f"unknown instruction {name!r}; known: {sorted(CHECKERS)}")
        checker = CHECKERS[name](name)
        checker.build_description(**{k: v for k, v in (arguments or {}).items() if v is not None})
        verdicts.append(bool(answer.strip()) and bool(checker.check_following(answer)))
    return verdicts
