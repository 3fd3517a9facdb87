"""Published benchmarks: their rows as prompts, right and wrong answers, the table, going on, missing files."""

import base64
import csv
import json
import pickle
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from lnjax import evaluate
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import DataError
from lnjax.evaluate import member_of, table
from lnjax.models.family import family
from lnjax.rewards.code import unpack
from lnjax.rewards.pool import build_reward
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rewards.verifiers import tool_call
from lnjax.sampler import Sampler
from lnjax.schema import JudgeConfig, RewardConfig
from lnjax.score import figure, mean_interval
from lnjax.tasks import TASKS, read_task
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
        "id": "live_simple_0-0-0",
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
    },
    "livecodebench": {
        "question_content": "Twice the number.",
        "contest_date": "2024-08-03T00:00:00",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(HIDDEN))).decode(),
        "metadata": "{}",
    },
    "chat": {"question_id": "a", "turns": [{"content": "Say hello."}]},
}
ANSWERS = {
    "bfcl": {"id": "live_simple_0-0-0", "ground_truth": [{"weather": {"city": ["Oslo"], "type": ["", 1.5]}}]},
    "chat": {"question_id": "a", "choices": [{"index": 0, "turns": [{"content": "Hello number 7"}]}]},
}
RIGHT = {
    "aime24": "The answer is \\boxed{7}.",
    "math500": "\\boxed{0.5}",
    "ifeval": "Two words",
    "bfcl": '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo", "type": 1.5}}]</TOOLCALL>',
    "livecodebench": "```python\nprint(2 * int(input()))\n```",
    "chat": "Hello, hello 7",
}
WRONG = {
    "gpqa": "\\boxed{E}",
    "aime24": "\\boxed{8}",
    "math500": "\\boxed{0.51}",
    "ifeval": "More, than two words",
    "bfcl": '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Rome"}}]</TOOLCALL>',
    "livecodebench": "```python\nprint(2)\n```",
    "chat": "No 8",
}


def write(folder):
    """One row of every task, each in its published form."""
    for name, row in ROWS.items():
        for pattern, value in ((TASKS[name].files, row), (TASKS[name].answers, ANSWERS.get(name))):
            if pattern:
                path = folder / pattern.replace("*", "one")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(value) + "\n")
    with open(folder / TASKS["gpqa"].files, "w", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS["gpqa"], "Explanation"])
        writer.writeheader()
        writer.writerow(ROWS["gpqa"] | {"Explanation": "two\nlines"})
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path)


def test_right_answers_score_1_and_wrong_ones_0(data):
    requests, wanted = [], []
    for name in ROWS:
        row = read_task(name, data)[0][1]
        args = {**row["args"], "tools": row.get("tools")}
        named = {"ifeval": "ifeval", "aime24": "math", "math500": "math"}
        verifier = args.get("verifier", named.get(name, ""))
        right = RIGHT.get(name) or f"It is \\boxed{{\\text{{{args['answer']}}}}}"
        for text, verdict in ((right, 1.0), (WRONG[name], 0.0), ("", 0.0)):
            requests.append(ScoreRequest(verifier, args, True, f"<think>\\boxed{{A}}</think>{text}", True))
            wanted.append(verdict)
    c = RewardConfig(num_workers=1, deadline_s=120, judge=JudgeConfig(address="rule"))
    with build_reward(c) as reward:
        assert [s.reward for s in reward.score(requests)] == wanted


def test_rows_become_prompts_as_the_report_words_them(data):
    assert read_task("aime24", data) == [
        (
            "aime24/0",
            {
                "input": "Below is a math question. I want you to reason through the steps and then give a final answer. "
                "Your final answer should be in \\boxed{}.\nQuestion: 3+4?",
                "args": {"expected_answer": "7"},
            },
        )
    ]
    row = read_task("gpqa", data)[0][1]
    letter = row["args"]["answer"]
    assert f"\n{letter}. Sun\n" in row["input"] + "\n"
    call = read_task("bfcl", data)[0][1]
    assert [m["role"] for m in call["input"]] == ["user", "user"]
    assert call["tools"][0]["parameters"]["properties"] == {
        "city": {"type": "string"},
        "type": {"type": "number"},
        "x": {"type": ["array", "boolean", "number", "object", "string"]},
    }
    code = read_task("livecodebench", data)[0][1]["args"]
    assert [t["input"] for t in unpack(code["public"], code["private"])] == ["1", "4"]
    assert read_task("chat", data)[0][1] == {
        "input": "Say hello.",
        "args": {"verifier": "judge", "answer": "Hello number 7", "open_ended": True},
    }


def test_calls_that_no_answer_lists_are_wanted_or_not_by_their_kind(data):
    path = data / "bfcl_v2_live" / "one.json"
    rows = [ROWS["bfcl"] | {"id": f"live_{kind}_0-0-0"} for kind in ("relevance", "irrelevance")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (wants, wants_not) = [row for _, row in read_task("bfcl", data)]
    call, unfit = RIGHT["bfcl"].replace("Oslo", "Rome"), RIGHT["bfcl"].replace("weather", "rain")
    for row, verdicts in ((wants, [1.0, 0.0, 0.0]), (wants_not, [0.0, 0.0, 1.0])):
        args = {**row["args"], "tools": row["tools"]}
        assert [tool_call(text, args)["accuracy"] for text in (call, unfit, "In words.")] == verdicts
    path.write_text(json.dumps(ROWS["bfcl"] | {"id": "live_simple_9-9-9"}))
    with pytest.raises(DataError, match=r"one\.json:1: KeyError 'live_simple'"):
        read_task("bfcl", data)


def test_only_contests_of_the_report_count(data):
    path = data / "livecodebench" / "one.jsonl"
    dates = ("2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-02-01T00:00:00", "2025-02-02T00:00:00")
    path.write_text("".join(json.dumps(ROWS["livecodebench"] | {"contest_date": d}) + "\n" for d in dates))
    assert len(read_task("livecodebench", data)) == 2
    path.write_text(json.dumps(ROWS["livecodebench"] | {"contest_date": "2023-01-01"}))
    with pytest.raises(DataError, match="none of its 1 rows is among those of the report"):
        read_task("livecodebench", data)


def test_a_missing_or_malformed_file_says_where_what_belongs(tmp_path):
    with pytest.raises(DataError, match=r"gpqa_diamond\.csv: missing; put the benchmark gpqa there: .*Correct Answer"):
        read_task("gpqa", tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(
        DataError, match=r"aime24\.jsonl:1: KeyError 'problem'; aime24 has lines with problem and answer"
    ):
        read_task("aime24", tmp_path)
    (tmp_path / "gpqa_diamond.csv").write_text("Question,Correct Answer\nWhy?\n")
    with pytest.raises(DataError, match=r"gpqa_diamond\.csv: row 1: AttributeError"):
        read_task("gpqa", tmp_path)


def test_hidden_tests_that_would_run_something_are_refused(data):
    class Evil:
        def __reduce__(self):
            return print, ("escaped",)

    for payload in (pickle.dumps(Evil()), pickle.dumps(7), b"", b"\0" * 100):
        hidden = base64.b64encode(zlib.compress(payload)).decode()
        row = {**ROWS["livecodebench"], "private_test_cases": hidden}
        (data / "livecodebench" / "one.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=r"one\.jsonl:1: ValueError tests: "):
            read_task("livecodebench", data)


def test_the_interval_weighs_a_prompt_by_its_instructions():
    assert mean_interval([1.0, 0.0]) == pytest.approx((0.5, 0.0, 1.0))
    mean, low, high = mean_interval([1.0, 0.5] * 50, weights=[1, 3] * 50)
    assert mean == 0.625
    assert (mean - low, high - mean) == pytest.approx((0.03693, 0.03693), abs=1e-4)  # 1.96 x 0.1875 x sqrt(100/99) / 10
    assert figure([1.0] * 30, weights=[2] * 30) == {"mean": 1.0, "low": 0.9, "high": 1.0, "num_prompts": 30}


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
            model=SimpleNamespace(spec=c.model.spec),
            tokenizer=tokenizer,
            sampling=lambda s: SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, (2,)),
        )
        with build_reward(c.reward) as reward:
            yield Sampler(built, scripted, reward, "0" * 16)

    monkeypatch.setattr(evaluate, "open_sampler", opened)
    return scripted


def words(data, out, tasks="aime24,ifeval,bfcl"):
    named = ["--tasks", tasks] if tasks else []
    return ["--config", "tiny_grpo", "--data", str(data), "--out", str(out), "--engine.max-len", "2000", *named]


SAMPLES = ["--samples", "4"]


@pytest.mark.slow
def test_on_and_off_stand_side_by_side_and_the_same_command_asks_only_what_is_missing(data, engine, capsys, tmp_path):
    out = tmp_path / "results"
    assert evaluate.main([*words(data, out), *SAMPLES]) == 0
    assert engine.asked[:2] == [("aime24/0/on", 4, 0.6, 0.95), ("aime24/0/off", 1, 0.0, 1.0)]
    summary = json.loads((out / "summary.json").read_text())
    assert {name: (t["on"]["mean"], t["off"]["mean"]) for name, t in summary["tasks"].items()} == {
        "aime24": (0.5, 0.0),
        "ifeval": (0.5, 0.0),
        "bfcl": (0.5, 0.0),
    }
    assert (out / "table.md").read_text().splitlines() == summary["table"]
    assert summary["table"][2] == "| aime24 | 1 | 50.0 (0.0 to 100.0) | 0.0 (0.0 to 100.0) | 0, 0 | 0, 0 |"
    assert summary["table"][2] in capsys.readouterr().out
    # A killed measurement leaves half a line; the same command asks that again, and nothing else.
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    engine.asked.clear()
    file = out / "bfcl_on.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    (out / "summary.json").unlink()
    assert evaluate.main([*words(data, out), *SAMPLES]) == 0
    assert engine.asked == [("bfcl/0/on", 4, 0.6, 0.95)]
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    # Another seed is another measurement.
    assert evaluate.main([*words(data, out), *SAMPLES, "--seed", "1"]) == 2
    assert "aime24_on.jsonl:1: measured otherwise (config was" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_measured_is_a_row_that_says_why_and_an_error_where_it_was_asked_for(
    data, engine, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "run_program", refuse)
    for name in ("gpqa", "math500"):
        (data / TASKS[name].files).unlink()
    (data / "bfcl_v2_live" / "possible_answer" / "one.json").unlink()
    assert evaluate.main([*words(data, tmp_path / "results", tasks=""), *SAMPLES]) == 0
    rows = (tmp_path / "results" / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:10]] == [f"| {name}" for name in TASKS]
    assert "gpqa_diamond.csv: missing; put the benchmark gpqa there" in rows[2]
    assert "bfcl_v2_live/possible_answer/*.json: missing" in rows[7]
    assert "not measured: no sandbox" in rows[8]
    assert "the config has no reward.judge; add one" in rows[9]
    assert evaluate.main(words(data, tmp_path / "results", tasks="aime24,math500")) == 2
    assert "math500.jsonl: missing; put the benchmark math500 there" in capsys.readouterr().err
    assert evaluate.main(words(tmp_path / "empty", tmp_path / "results", tasks="")) == 2
    assert "aime24.jsonl: missing" in capsys.readouterr().err
    assert evaluate.main(words(data, tmp_path / "results", tasks="chess")) == 2
    assert "--tasks chess: expected some of gpqa,aime24" in capsys.readouterr().err


def refuse(source, **limits):
    raise RuntimeError("no sandbox")


def test_a_member_of_the_family_stands_beside_its_own_numbers_in_the_report():
    assert [member_of(family(x)) for x in ("nano4b", "nano8b", "super49b", "ultra253b")] == [
        "",
        "nano8b",
        "super49b",
        "ultra253b",
    ]
    one = {"mean": 0.5, "low": 0.4, "high": 0.6, "num_prompts": 198, "unfinished": 0.021, "failures": 3}
    lines = table({"gpqa": {"on": one, "off": one}, "chat": {"missing": "no judge"}}, member="ultra253b")
    assert lines[0].endswith("| Ultra 253B in the report |")
    assert lines[2] == "| gpqa | 198 | 50.0 (40.0 to 60.0) | 50.0 (40.0 to 60.0) | 2, 2 | 3, 3 | 76.0, 56.6 |"
    assert lines[3] == "| chat |  | not measured: no judge |  |  |  |  |"
    assert "arXiv 2505.00949, tables 3 to 5" in lines[4]


def test_a_prompt_that_leaves_no_room_names_itself_and_the_knob(data, engine, capsys, tmp_path):
    assert evaluate.main([*words(data, tmp_path / "results", tasks="ifeval,aime24"), "--engine.max-len", "300"]) == 2
    error = capsys.readouterr().err
    assert "aime24/0/on has 1" in error and "raise --engine.max-len" in error
    assert engine.asked == [], "before anything is sampled"


@pytest.mark.slow
def test_a_real_model_is_measured_and_half_a_measurement_goes_on_to_the_same_bytes(data, tmp_path):
    rows = [ROWS["ifeval"] | {"prompt": f"{i} words."} for i in range(3)]
    (data / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, command = tmp_path / "results", ["--config", "tiny_grpo", "--tasks", "ifeval", "--samples", "2"]
    command += ["--data", str(data), "--out", str(out), "--run-dir", str(tmp_path / "run")]
    assert evaluate.main(command) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert set(whole) == {"ifeval_on.jsonl", "ifeval_off.jsonl", "summary.json", "table.md"}
    (out / "summary.json").unlink()
    (out / "ifeval_off.jsonl").unlink()
    (out / "ifeval_on.jsonl").write_bytes(whole["ifeval_on.jsonl"].splitlines(keepends=True)[0] + b'{"id": "ai')
    assert evaluate.main(command) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
