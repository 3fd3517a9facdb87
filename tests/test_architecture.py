"""The house rules of DESIGN: floors, guests, sizes. Reads the imports, runs nothing."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lnjax"

FLOORS = [
    {"errors"},
    {"architecture", "training"},
    {"schema"},
    {"types", "proxy", "distributed", "stages"},
    {"validate"},
    {"config", "alive"},
    {"mesh", "metrics", "health", "sources", "profile", "recipe", "calculator"},
    {"ops"},
    {"models", "learn"},
    {"data", "rollout", "rewards", "checkpoint"},
    {"record", "tasks"},
    {"score", "stage", "fit", "environment"},
    {"build"},
    {"source", "parity", "sampler"},
    {"heldout", "sft", "grpo", "preference"},
    {"report"},
    {"train", "flags", "passrate", "evaluate"},
    {"slurm", "planner", "pipeline"},
    {"launch", "plan", "convert", "serve", "bench"},
]
ROOMS = {"models", "learn", "ops", "data", "rollout", "rewards", "checkpoint", "planner", "report", "bench"}
NO_JAX = {
    "errors.py",
    "architecture.py",
    "stages.py",
    "training.py",
    "schema.py",
    "validate.py",
    "config.py",
    "sources.py",
    "proxy.py",
    "recipe.py",
    "launch.py",
    "plan.py",
    "distributed.py",
    "alive.py",
    "flags.py",
    "slurm.py",
}
GUESTS = {
    "transformer_engine": "ops",
    "orbax": "checkpoint",
    "gguf": ("checkpoint", "data"),  # its tokenizer and its tensors
    "optax": "learn",
    "tokenizers": ("data", "bench"),
    "transformers": ("data", "bench"),
    "grain": "data",
    "jinja2": "data",
    "tensorboardX": "metrics.py",
    "rich": ("metrics.py", "profile.py", "launch.py", "plan.py", "planner", "bench"),
    "tyro": ("config.py", "schema.py"),
    "matplotlib": ("report", "passrate.py", "bench"),
    "math_verify": "rewards",
    "nltk": "rewards",
    "jsonschema": "rewards",
    "referencing": "rewards",
    "httpx": ("rollout", "rewards"),
    "torch": "bench",  # one file of it, which runs in an environment of its own; else only in PLUGIN, as the next two
    "vllm": "bench",
    "tensorstore": (),
}


PLUGIN = PACKAGE / "rollout" / "vllm_plugin"
"""Runs inside vLLM's environment, as a package of its own."""


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if PLUGIN not in p.parents)


def imports(text: str) -> list[str]:
    """Dotted names of everything imported, at the top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    """First part of the module's name below lnjax."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def violations(here: str, text: str) -> list[str]:
    """Imports of lnjax modules that are not on a lower floor (or in the same room)."""
    found = []
    for name in imports(text):
        parts = name.split(".")
        if parts[0] != "lnjax":
            continue
        there = parts[1]
        same_room = there == here and here in ROOMS
        if not same_room and floor(there) >= floor(here):
            found.append(f"{here} imports {there}")
    return found


def test_the_checker_sees_a_sibling_and_an_upward_import():
    assert violations("data", "from lnjax.rewards.pool import build_reward") == ["data imports rewards"]
    assert violations("models", "import lnjax.learn.loss") == ["models imports learn"]
    assert violations("learn", "def f():\n    from lnjax import train") == ["learn imports train"]
    assert violations("data", "from lnjax.data.rows import Row\nfrom lnjax.types import Prompt") == []


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_the_rules_of_the_house(path):
    text = path.read_text(encoding="utf-8")
    if path == PACKAGE / "__init__.py" or path.name == "__init__.py":
        assert text == "", "packages stay empty"
        return
    assert violations(room(path), text) == []
    names = imports(text)
    for guest, homes in GUESTS.items():
        if any(n.split(".")[0] == guest for n in names):
            homes = (homes,) if isinstance(homes, str) else homes
            assert any(path.relative_to(PACKAGE).parts[0] == home for home in homes), f"{guest} is a guest of {homes}"
    if path.name in NO_JAX and path.parent == PACKAGE:
        top = [n for n in imports_at_top(text) if n.split(".")[0] in ("jax", "flax", "optax")]
        assert top == []
    assert path.name not in ("utils.py", "helpers.py", "misc.py")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 150, f"{node.name} is too long"


def imports_at_top(text: str) -> list[str]:
    tree = ast.parse(text)
    return imports(ast.unparse(ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])))


@pytest.mark.parametrize("path", sorted(PLUGIN.rglob("*.py")), ids=lambda p: p.name)
def test_the_plugin_imports_nothing_of_lnjax_and_no_other_package(path):
    text = path.read_text(encoding="utf-8")
    roots = {name.split(".")[0] for name in imports(text)}
    assert roots <= {"vllm", "torch", "tensorstore", "numpy", "lnjax_vllm"} | sys.stdlib_module_names
    assert len(text.splitlines()) <= 400


def test_a_server_process_starts_without_jax():
    for name in ("guard", "server"):
        text = (PACKAGE / "rollout" / f"{name}.py").read_text(encoding="utf-8")
        assert not [n for n in imports(text) if n.split(".")[0] == "jax" or n.startswith("lnjax.types")]


def test_workers_of_the_reward_pool_never_import_jax():
    for name in (
        "worker",
        "verifiers",
        "protocol",
        "format",
        "ifeval",
        "judge",
        "post",
        "rule_judge",
        "tool_call",
        "code",
        "sandbox",
    ):
        text = (PACKAGE / "rewards" / f"{name}.py").read_text(encoding="utf-8")
        assert not [n for n in imports(text) if n.split(".")[0] == "jax" or n.startswith("lnjax.types")]


def code_lines(text: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in words)


def test_the_product_can_be_read_in_an_afternoon():
    assert code_lines('"""What."""\n\nx = 1  # why\n# because\ndef f():\n    """How."""\n    return x\n') == 3
    bench = set((PACKAGE / "bench").rglob("*.py"))
    files = [p for p in (*sources(), *PLUGIN.rglob("*.py")) if p not in bench]
    for budget, paths in ((11_630, files), (950, bench)):
        assert sum(code_lines(p.read_text(encoding="utf-8")) for p in paths) <= budget
