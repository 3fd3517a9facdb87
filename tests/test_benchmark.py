"""Published benchmarks: their rows as prompts, right and wrong answers, the table, going on, missing files."""

import base64
import json
import pickle
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from lnjax import benchmark
from lnjax.data.benchmarks import BENCHMARKS, read_benchmark
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import DataError
from lnjax.rewards.pool import build_reward
from lnjax.rewards.protocol import ScoreRequest
from lnjax.sampler import Sampler
from lnjax.schema import RewardConfig
from lnjax.score import mean_interval
from lnjax.types import Completion, SamplingParams

HIDDEN = json.dumps([{"input": "4", "output": "8", "testtype": "stdin"}])
ROWS = {
    "gpqa": {
        "Question": "Largest?",
        "Correct Answer": "Sun ",
        **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)},
    },
    "aime24": {"problem": "3+4?", "answer": 7},
    "math500": {"problem": "Half?", "answer": "\\frac{1}{2}"},
    "ifeval": {
        "prompt": "Write. No commas. Two words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 3, "relation": "less than"}],
    },
    "bfcl": {
        "question": [[{"role": "system", "content": "Help."}, {"role": "user", "content": "Weather in Oslo?"}]],
        "function": [
            {
                "name": "weather",
                "parameters": {
                    "type": "dict",
                    "properties": {"city": {"type": "string"}, "type": {"type": "float"}, "x": {"type": "any"}},
                    "required": ["city"],
                },
            }
        ],
        "ground_truth": [{"weather": {"city": ["Oslo"], "type": ["", 1.5]}}],
    },
    "livecodebench": {
        "question_content": "Twice the number.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(HIDDEN))).decode(),
        "metadata": "{}",
    },
}
RIGHT = {
    "aime24": "The answer is \\boxed{7}.",
    "math500": "\\boxed{0.5}",
    "ifeval": "Two words",
    "bfcl": '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo", "type": 1.5}}]</TOOLCALL>',
    "livecodebench": "```python\nprint(2 * int(input()))\n```",
}
WRONG = {
    "gpqa": "\\boxed{E}",
    "aime24": "\\boxed{8}",
    "math500": "\\boxed{0.51}",
    "ifeval": "More, than two words",
    "bfcl": '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Rome"}}]</TOOLCALL>',
    "livecodebench": "```python\nprint(2)\n```",
}


@pytest.fixture
def data(tmp_path):
    for name, row in ROWS.items():
        (tmp_path / BENCHMARKS[name].file).write_text(json.dumps(row) + "\n")
    return tmp_path


def test_right_answers_score_1_and_wrong_ones_0(data):
    requests, wanted = [], []
    for name in ROWS:
        row = read_benchmark(name, data)[0][1]
        args = {**row["args"], "tools": row.get("tools")}
        named = {"ifeval": "ifeval", "aime24": "math", "math500": "math"}
        verifier = args.get("verifier", named.get(name, ""))
        right = RIGHT.get(name) or f"It is \\boxed{{\\text{{{args['answer']}}}}}"
        for text, verdict in ((right, 1.0), (WRONG[name], 0.0), ("", 0.0)):
            requests.append(ScoreRequest(verifier, args, True, f"<think>\\boxed{{A}}</think>{text}", True))
            wanted.append(verdict)
    with build_reward(RewardConfig(num_workers=1, deadline_s=60)) as reward:
        assert [s.reward for s in reward.score(requests)] == wanted


def test_rows_become_prompts_as_the_report_words_them(data):
    assert read_benchmark("aime24", data) == [
        (
            "aime24/0",
            {
                "input": "Below is a math question. I want you to reason through the steps and then give a final answer. "
                "Your final answer should be in \\boxed{}.\nQuestion: 3+4?",
                "args": {"expected_answer": "7"},
            },
        )
    ]
    row = read_benchmark("gpqa", data)[0][1]
    letter = row["args"]["answer"]
    assert f"\n{letter}. Sun\n" in row["input"] + "\n"
    call = read_benchmark("bfcl", data)[0][1]
    assert [m["role"] for m in call["input"]] == ["user", "user"]
    assert call["tools"][0]["parameters"]["properties"] == {
        "city": {"type": "string"},
        "type": {"type": "number"},
        "x": {"type": ["array", "boolean", "number", "object", "string"]},
    }
    code = read_benchmark("livecodebench", data)[0][1]["args"]
    assert [t["input"] for t in code["tests"]] == ["1", "4"]


def test_a_missing_or_malformed_file_says_where_what_belongs(tmp_path):
    with pytest.raises(
        DataError, match=r"gpqa_diamond\.jsonl: missing; put the benchmark gpqa there, .*Correct Answer"
    ):
        read_benchmark("gpqa", tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(DataError, match=r"aime24\.jsonl:1: KeyError 'problem'; a line of aime24 has problem, answer"):
        read_benchmark("aime24", tmp_path)


def test_hidden_tests_that_would_run_something_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("escaped",)

    for payload in (pickle.dumps(Evil()), b"", b"\0" * 100):
        hidden = base64.b64encode(zlib.compress(payload)).decode()
        row = {**ROWS["livecodebench"], "private_test_cases": hidden}
        (tmp_path / "livecodebench.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=r"livecodebench\.jsonl:1: "):
            read_benchmark("livecodebench", tmp_path)


def test_the_interval_weighs_a_prompt_by_its_instructions():
    assert mean_interval([1.0, 0.0]) == pytest.approx((0.5, 0.0, 1.0))
    mean, low, high = mean_interval([1.0, 0.5] * 50, weights=[1, 3] * 50)
    assert mean == 0.625
    assert (mean - low, high - mean) == pytest.approx((0.03693, 0.03693), abs=1e-4)  # 1.96 x 0.1875 x sqrt(100/99) / 10


class Scripted:
    """An engine that is right with reasoning on in half of its samples, and wrong with it off."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def generate(self, prompts, *, num_samples, sampling, seed):
        found = []
        for p in prompts:
            self.asked.append((p.id, num_samples, sampling.temperature, sampling.top_p))
            name = p.id.split("/")[0]
            texts = [RIGHT[name] if p.reasoning and i % 2 == 0 else WRONG[name] for i in range(num_samples)]
            ids = [tuple(self.tokenizer.encode(t)) for t in texts]
            found.append([Completion(i, (0.0,) * len(i), (0,) * len(i), True) for i in ids])
        return found


@pytest.fixture
def engine(monkeypatch):
    tokenizer = load_tokenizer("arithmetic")
    scripted = Scripted(tokenizer)

    @contextmanager
    def opened(c, *, folder):
        folder.mkdir(parents=True, exist_ok=True)
        built = SimpleNamespace(
            config=c,
            tokenizer=tokenizer,
            sampling=lambda s: SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, (2,)),
        )
        with build_reward(c.reward) as reward:
            yield Sampler(built, scripted, reward, "0" * 16)

    monkeypatch.setattr(benchmark, "open_sampler", opened)
    return scripted


def words(data, out):
    tasks = ["--tasks", "aime24,ifeval,bfcl", "--data", str(data), "--out", str(out), "--samples", "4"]
    return ["--config", "tiny_grpo", *tasks, "--engine.max-len", "2000"]


def test_on_and_off_stand_side_by_side_beside_the_papers_numbers(data, engine, capsys, tmp_path):
    out = tmp_path / "results"
    assert benchmark.main(words(data, out)) == 0
    assert engine.asked[:2] == [("aime24/0/on", 4, 0.6, 0.95), ("aime24/0/off", 1, 0.0, 1.0)]
    tasks = json.loads((out / "summary.json").read_text())["tasks"]
    assert {name: (t["on"]["mean"], t["off"]["mean"]) for name, t in tasks.items()} == {
        "aime24": (0.5, 0.0),
        "ifeval": (0.5, 0.0),
        "bfcl": (0.5, 0.0),
    }
    printed = capsys.readouterr().out
    assert "80.8|20.0" in printed and "50.0 (50–50)" in printed and "2505.00949" in printed
    # The same command asks nothing again; a half-written line is asked again.
    engine.asked.clear()
    file = out / "bfcl_on.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert benchmark.main(words(data, out)) == 0
    assert engine.asked == [("bfcl/0/on", 4, 0.6, 0.95)]
    # Another seed is another measurement.
    assert benchmark.main([*words(data, out), "--seed", "1"]) == 2
    assert "aime24_on.jsonl:1: measured otherwise (config was" in capsys.readouterr().err


def test_a_missing_file_or_task_exits_2_before_anything_is_loaded(data, engine, capsys, tmp_path):
    (data / "aime24.jsonl").unlink()
    assert benchmark.main(words(data, tmp_path / "results")) == 2
    assert "aime24.jsonl: missing; put the benchmark aime24 there" in capsys.readouterr().err
    assert benchmark.main(["--config", "tiny_grpo", "--tasks", "chess", "--out", "x"]) == 2
    assert "--tasks chess: expected" in capsys.readouterr().err
