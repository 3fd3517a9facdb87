"""Where a model or tokenizer comes from: a folder, a file, or a file that an installed package ships."""

import importlib.util
from pathlib import Path

from lnjax.errors import ConfigError

PACKAGE = "package:"


def resolve_source(source: str) -> Path:
    """The path behind a source name. Raises ConfigError when it does not exist.

    `package:NAME/FILE` is a file inside the installed package NAME, which is found but not imported.
    """
    if not source.startswith(PACKAGE):
        path = Path(source).expanduser()
        if not path.exists():
            raise ConfigError(
                f"{source}: no such folder or file; give a folder in Hugging Face format, a .gguf file or "
                f"{PACKAGE}NAME/FILE.gguf"
            )
        return path
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    if not name or not file:
        raise ConfigError(f"{source}: expected {PACKAGE}NAME/FILE")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{source}: the package {name} is not installed; install it, or use another source")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        here = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.exists() else []
        raise ConfigError(f"{source}: the package {name} has no such file; files of that kind there: {here}")
    return path
