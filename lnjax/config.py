"""From `--config NAME --any.key value` to one validated RunConfig; its hash; its file in the run folder. No jax."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tyro

from lnjax.errors import ConfigError
from lnjax.proxy import proxy
from lnjax.schema import RunConfig
from lnjax.stages import STAGES
from lnjax.validate import validate

MARKS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
FREE_ON_RESUME = (
    *(f"{name}.steps" for name in STAGES),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.export_hf"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),  # a checkpoint restores on any mesh
    "profile",
    *("cluster.start_deadline_s", "cluster.heartbeat_s", "cluster.step_deadline_s"),
)
"""Keys a resumed run may change."""
USAGE = (
    "usage: python -m lnjax.launch --config NAME [--run-dir DIR] [--dry-run] [--proxy] [--slurm nodes=N ... [--print]] "
    "[--any.key value ...] [--help]"
)


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for."""

    config: RunConfig
    run_dir: Path
    dry_run: bool
    name: str
    """As given: a name or a path."""
    overrides: tuple[str, ...]
    """`--key value` words, as given."""
    slurm: tuple[str, ...] | None
    """`key=value` words after --slurm; None: run here."""
    print_only: bool
    """Show the SLURM script instead of submitting it."""
    proxy: bool
    """The config is one made small by lnjax.proxy, for 8 virtual CPU devices."""


def config_names() -> list[str]:
    """Configs that can be named: every module in the package `configs`."""
    folder = _configs_folder()
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def read_config(name: str) -> Any:
    """What `configs/NAME.py`, or a path to a .py file with a function config(), returns. Raises ConfigError with the nearest
    name."""
    path = Path(name) if name.endswith(".py") else _configs_folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"no config {name!r}{nearest(name, config_names())}; there are {', '.join(config_names())}")
    found = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ConfigError(f"{path}: no function config(); it must return a RunConfig")
    return module.config()


def load_config(name: str) -> RunConfig:
    """The config of one run by its name. Raises ConfigError for another kind, and as `read_config` does."""
    config = read_config(name)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{name}: config() returned {type(config).__name__}, expected RunConfig")
    return config


def parse(argv: Sequence[str]) -> Job:
    """The job of a command line. Raises ConfigError for an unknown key, a wrong type or values that do not fit."""
    name, run_dir, flags, rest = None, None, set(), []
    slurm: list[str] | None = None
    words = [w for word in argv for w in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])]
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("--dry-run", "--print", "--proxy"):
            flags.add(word)
        elif word == "--slurm":
            slurm = slurm or []
            while position + 1 < len(words) and not words[position + 1].startswith("--"):
                position += 1
                slurm.append(words[position])
        elif word in ("--config", "--run-dir"):
            position += 1
            if position == len(words):
                raise ConfigError(f"{word} needs a value. {USAGE}")
            if word == "--config":
                name = words[position]
            else:
                run_dir = Path(words[position])
        else:
            rest.append(word)
        position += 1
    if name is None:
        if "--help" in rest or "-h" in rest:
            print(f"{USAGE}\n\nconfigs: {', '.join(config_names())}\n--config NAME --help explains every key of NAME.")
            sys.exit(0)
        raise ConfigError(f"--config is missing; there are {', '.join(config_names())}. {USAGE}")
    config = load_config(name)
    config = override(proxy(config) if "--proxy" in flags else config, rest)
    validate(config)
    if "--print" in flags and slurm is None:
        raise ConfigError("--print shows what --slurm would submit; give --slurm nodes=N too")
    return Job(
        config,
        run_dir or Path("runs") / config.name,
        dry_run="--dry-run" in flags,
        name=name,
        overrides=tuple(rest),
        slurm=None if slurm is None else tuple(slurm),
        print_only="--print" in flags,
        proxy="--proxy" in flags,
    )


def override(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """The config with `--key value` pairs applied; `--help` prints every key and exits."""
    if "--help" in words or "-h" in words:
        tyro.cli(
            RunConfig, default=config, args=["--help"], config=MARKS, prog="python -m lnjax.launch", description=USAGE
        )
    known = _settable(config)
    pairs: list[tuple[str, list[str]]] = []
    position = 0
    while position < len(words):
        word = words[position]
        key = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides are --key value")
        if key not in known:
            _unknown(key, known, config)
        if position + 1 == len(words):
            raise ConfigError(f"--{key} needs a value")
        end = position + 2
        while known[key].startswith("tuple") and end < len(words) and not words[end].startswith("--"):
            end += 1
        pairs.append((key, list(words[position + 1 : end])))
        position = end
    for key, values in pairs:  # one by one, so that an error can name its key
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                config = tyro.cli(
                    RunConfig,
                    default=config,
                    args=[
                        f"--{key.replace('_', '-')}",
                        *(v.capitalize() if known[key] == "bool" else v for v in values),
                    ],
                    config=MARKS,
                    use_underscores=False,
                )
        except SystemExit as error:
            value = " ".join(values)
            raise ConfigError(f"--{key} {value}: expected {known[key]}, got {value!r}") from error
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_hash(config: RunConfig) -> str:
    """12 hex digits of the resolved values."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def render(config: RunConfig) -> str:
    """One line a section."""
    lines: list[str] = []

    def walk(name: str, value: Any) -> None:
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        plain = [f"{k}={v}" for k, v in fields if not dataclasses.is_dataclass(v)]
        if plain:
            lines.append(f"{name:18} {' '.join(plain)}")
        for key, inner in fields:
            if key == "spec" and inner is not None:
                lines.append(
                    f"{'model.spec':18} {len(inner.blocks)} blocks d_model={inner.d_model} heads={inner.num_heads}x"
                    f"{inner.head_dim} vocab={inner.vocab_size}"
                )
            elif dataclasses.is_dataclass(inner):
                walk(f"{name}.{key}".removeprefix("run."), inner)

    walk("run", config)
    return "\n".join(lines)


def check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError when the folder holds a run of another config; touches nothing."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    try:
        before = flat(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); use another --run-dir") from error
    after = flat(json.loads(json.dumps(to_dict(config))))
    changed = [
        f"{k} was {before.get(k)!r}, is {after.get(k)!r}"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k) and k not in FREE_ON_RESUME
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{run_dir} holds a run of another config ({'; '.join(changed[:3])}{more}); use another --run-dir, or the "
            "same values to resume it"
        )


def save_config(config: RunConfig, run_dir: Path) -> None:
    """Write RUN_DIR/config.json, whole."""
    path = run_dir / "config.json"
    temporary = path.with_name(path.name + ".tmp")
    body = {"hash": config_hash(config), "config": to_dict(config)}
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of nested dicts; lists are leaves."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return found


def _configs_folder() -> Path:
    import configs  # noqa: PLC0415

    return Path(configs.__path__[0])


def _settable(config: RunConfig) -> dict[str, str]:
    """{dotted key: type as text} of what the command line may set."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner) and field.name != "spec":
                walk(f"{prefix}{field.name}.", inner)
            elif field.name != "spec" and inner is not None:
                kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
                found[prefix + field.name] = kind.replace("typing.", "")
                if kind == "Literal":
                    found[prefix + field.name] = str(field.type).replace("typing.", "")

    walk("", config)
    return found


def _unknown(key: str, known: Mapping[str, str], config: RunConfig) -> NoReturn:
    stage = key.split(".")[0]
    if hasattr(config, stage) and getattr(config, stage) is None:
        raise ConfigError(f"unknown key --{key}: {config.name} has no {stage} stage")
    raise ConfigError(f"unknown key --{key}{nearest(key, list(known))}; --help lists all")


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]}?" if close else ""
