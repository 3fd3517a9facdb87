"""Text to token ids and back, and chat templates: one class over the files a model comes with."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from lnjax.errors import ConfigError, DataError, TemplateError
from lnjax.sources import resolve_source

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>")
"""Tokens that end an assistant turn, where a vocabulary has them."""
THINK = ("<think>", "</think>")
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARITHMETIC_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    backend: tokenizers.Tokenizer
    template: str
    """Jinja source of the chat template."""
    bos_token: str
    eos_token: str
    stop_token_ids: tuple[int, ...]
    """Any of them ends a completion."""
    source: Path | None
    """Folder in Hugging Face format that it came from, else None."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens written in it are recognised, none is added."""
        encoded = self.backend.encode(text, add_special_tokens=False)
        unknown = getattr(self.backend.model, "unk_token", None)
        if unknown and unknown in encoded.tokens and unknown not in text:
            start, end = encoded.offsets[encoded.tokens.index(unknown)]
            raise DataError(
                f"the tokenizer has no token for {text[start:end]!r} in {text[:60]!r}; use another tokenizer"
            )
        return encoded.ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids. Special tokens are left out, but think tags always stay."""
        if skip_special:
            added = self.backend.get_added_tokens_decoder()
            hidden = {i for i, t in added.items() if t.special and t.content not in THINK}
            ids = [i for i in ids if i not in hidden]
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, special ones too; together they are the whole text. Where several tokens make one character,
        the last one has it."""
        texts: list[str] = []
        held: list[int] = []
        for i, token in enumerate(ids, start=1):
            held.append(token)
            text = self.decode(held, skip_special=False)
            whole = not text.endswith("\ufffd") or len(held) == 4 or i == len(ids)  # UTF-8 takes four bytes at most
            texts.append(text if whole else "")
            held = [] if whole else held
        return texts

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Messages {role, content} through the chat template. Raises TemplateError when the template refuses."""
        try:
            return _compile(self.template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"chat template: {error}; roles given: {[m['role'] for m in messages]}. Change the messages or the "
                "tokenizer's chat_template"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the files that Hugging Face loads; those of a Hugging Face folder are copied as they are."""
        if self.source is not None:
            for name in HF_FILES:
                if (self.source / name).exists():
                    shutil.copyfile(self.source / name, folder / name)
            return
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token or None,
            "eos_token": self.eos_token,
            "chat_template": self.template,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def load_tokenizer(source: str) -> Tokenizer:
    """From `arithmetic`, a folder in Hugging Face format, a .gguf file, or `package:NAME/FILE.gguf`."""
    if source == "arithmetic":
        return _arithmetic()
    if source == "random":
        raise ConfigError("model.source=random brings no tokenizer; set --model.tokenizer to `arithmetic` or a folder")
    path = resolve_source(source)
    return _from_gguf(path) if path.suffix == ".gguf" else _from_folder(path)


_compiled: dict[str, jinja2.Template] = {}


def _compile(source: str) -> jinja2.Template:
    if source not in _compiled:

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # No clock is offered (strftime_now stays undefined): a rendered prompt must not depend on the day.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        _compiled[source] = environment.from_string(source)
    return _compiled[source]


def _stop_ids(backend: tokenizers.Tokenizer, *, eos_token: str, declared: Sequence[int] = ()) -> tuple[int, ...]:
    found = [backend.token_to_id(name) for name in (eos_token, *TURN_ENDS)]
    return tuple(sorted({i for i in [*found, *declared] if i is not None}))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); fetch the file again") from error


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer").is_dir():  # of a run
        folder = folder / "tokenizer"
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError(
            f"{folder}: no tokenizer.json; put the model's tokenizer files there or set --model.tokenizer"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust binding raises nothing narrower
        raise ConfigError(f"{file}: {error}; fetch the file again") from error
    config = _json(folder / "tokenizer_config.json")
    template = config.get("chat_template") or ""
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several named ones
        template = {t["name"]: t["template"] for t in template}.get("default", "")
    if not template:
        raise TemplateError(f"{folder}: no chat template in tokenizer_config.json or chat_template.jinja; add one")

    def token(name: str) -> str:
        value = config.get(name) or ""
        return value["content"] if isinstance(value, dict) else value

    declared = []
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id") or []
        declared += [ids] if isinstance(ids, int) else ids
    stops = _stop_ids(backend, eos_token=token("eos_token"), declared=declared)
    return Tokenizer(backend, template, token("bos_token"), token("eos_token"), stops, folder)


def _from_gguf(path: Path) -> Tokenizer:
    from gguf import GGUFReader  # noqa: PLC0415 - takes a second to import

    fields = GGUFReader(str(path)).fields

    def get(name: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{name}")
        if field is None and default is None:
            raise ConfigError(f"{path}: no tokenizer.{name} in its metadata; use a file that carries its tokenizer")
        return default if field is None else field.contents()

    kind, pre = get("ggml.model"), get("ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ConfigError(f"{path}: tokenizer model {kind!r} is not supported, only byte-level BPE (`gpt2`)")
    tokens = get("ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in get("ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    if pre not in splits:
        raise ConfigError(f"{path}: pre-tokenizer {pre!r} is not one of {sorted(splits)}; convert the tokenizer first")
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, get("ggml.token_type"), strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    eos = tokens[get("ggml.eos_token_id")]
    return Tokenizer(
        backend,
        get("chat_template"),
        tokens[get("ggml.bos_token_id")] if "tokenizer.ggml.bos_token_id" in fields else "",
        eos,
        _stop_ids(backend, eos_token=eos),
        None,
    )


def _arithmetic() -> Tokenizer:
    """Single printable ASCII characters, Llama-3 headers, and a few words that every prompt repeats."""
    control = (
        "<|unk|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    words = (*THINK, "\n\n", "system", "user", "assistant", "detailed thinking on", "detailed thinking off")
    characters = ("\n", *(chr(i) for i in range(32, 127)))
    vocabulary = {t: i for i, t in enumerate((*control, *words, *characters))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False) for t in words])
    stops = _stop_ids(backend, eos_token="<|end_of_text|>")
    return Tokenizer(backend, ARITHMETIC_TEMPLATE, "<|begin_of_text|>", "<|end_of_text|>", stops, None)
