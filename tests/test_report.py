"""The page about runs: what it reads, what it refuses, what hostile text cannot do, and how a browser opens it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lnjax.config import load_config
from lnjax.data.tokenizer import Tokenizer, load_tokenizer
from lnjax.errors import DataError
from lnjax.grpo import describe as describe_rollouts
from lnjax.record import RolloutRecord, recorded
from lnjax.report.__main__ import main
from lnjax.report.page import fill, thin, write_page
from lnjax.report.read import describe, read_run
from lnjax.schema import RecordConfig
from lnjax.types import Completion, Prompt, Rollout, RolloutGroup, Score
from tests.cluster import install

ROOT = Path(__file__).parent.parent
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--<script>"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def evaluation(after, mean):
    return {
        "stage": "eval",
        "step": 0,
        "after": after,
        "mean": mean,
        "low": mean - 0.05,
        "high": mean + 0.05,
        "num_prompts": 256,
        "time": {},
    }


def group(step, *, text="4", samples=8, tokens=40):
    texts = [text, *("tok " for _ in range(tokens - 1))]
    answer = {"parts": {"accuracy": 1.0, "format": 1.0}, "failure": "", "finished": True, "tokens": tokens}
    answer |= {"versions": [[step - 1, tokens]], "texts": texts, "skipped": [tokens, 0]}
    answers = [
        answer | {"reward": k % 2, "advantage": k % 2 - 0.5, "logprobs": [-(i % 40) / 8 for i in range(tokens)]}
        for k in range(samples)
    ]
    prompt = {"texts": [f"<|user|>2+2? {text}", ""], "skipped": 0, "tokens": 9}
    where = {"prompt_id": f"arithmetic/train/{step}", "question": f"2+2? {text}", "verifier": "math", "args": "{}"}
    where |= {"pass_rate": 0.5, "prompt": prompt, "num_rollouts": 16, "num_groups": 8, "rollouts": answers}
    return {"stage": "grpo", "step": step, **where}


def grpo_line(step, *, steps, stale=2):
    """A step of an asynchronous run over servers with a curriculum."""
    share, wave = step / steps, 0.1 * math.sin(step)
    line = {
        "loss": wave,
        "entropy": 2 - share,
        "grad_norm": 1 + wave,
        "learning_rate": 1e-5 * share,
        "kl_ref": 0.01 * share,
    }
    line |= {"sampler_kl": 1e-7 * (1.2 + wave * 10), "clip_fraction": 0.01 + wave / 20, "ratio_max": 1.5 + wave}
    line |= {"parity_prob_error": 1.004 + wave / 100, "parity_prob_error_max": 1.2 + wave, "parity_tokens_checked": 100}
    line |= {
        "reward": share * 0.8 + wave,
        "accuracy": share * 0.9,
        "format": min(1.0, share * 2),
        "unfinished": 0.5 - share / 2,
    }
    line |= {"reward/math": share * 0.7, "reward/ifeval": share * 0.6 + wave, "mixed_groups": 0.5 + wave}
    line |= {
        "completion_tokens_mean": 500 * (1 - share) + 40,
        "completion_tokens_max": 900,
        "sample_tokens": 9000 + step,
    }
    line |= {
        "staleness_mean": stale * share,
        "staleness_max": min(stale, step - 1),
        "update_tokens": 20000,
        "prompts": 8,
    }
    line |= {"pass_rate_target": 0.625 * (1 - share), "pass_rate": 0.6 * (1 - share)}
    line |= {f"pass_rate/{k / 8:g}": math.exp(-((k / 8 - 0.625 * (1 - share)) ** 2) * 32) / 2.5 for k in range(6)}
    times = {
        "sample_s": 4.0,
        "score_s": 0.5,
        "wait_s": 1.0,
        "update_s": 30.0 if step == 1 else 3 + wave,
        "publish_s": 0.4,
    }
    return {"stage": "grpo", "step": step, **line, "time": times}


def make_run(folder, *, steps=20, text="4", groups_every=4, tokens=40):
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    sft = [
        {"stage": "sft", "step": i, "loss": 3 / i, "entropy": 1 / i, "time": {"update_s": 0.2}} for i in range(1, 21)
    ]
    grpo = [grpo_line(i, steps=steps) for i in range(1, steps + 1)]
    ends = [evaluation("init", 0.1), *sft, evaluation("sft", 0.26), *grpo, evaluation("grpo", 0.76)]
    write_lines(folder / "metrics.jsonl", ends)
    write_lines(folder / "rollouts.jsonl", [group(i, text=text, tokens=tokens) for i in range(1, steps, groups_every)])
    engine = {"parity_limit": 1.05, "num_servers": 2}
    curriculum = {"sigma": 0.125, "bins": 8}
    config = {
        "name": folder.name,
        "seed": 0,
        "model": {"source": "random"},
        "engine": engine,
        "grpo": {"curriculum": curriculum},
    }
    (folder / "config.json").write_text(json.dumps({"hash": "0", "config": config}))
    return folder


def data_of(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(name for name, _ in attrs)))


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


# Reading a run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"stage": "grpo", "step', r"metrics.jsonl:3: not valid JSON"),
        ("[1, 2]", r"metrics.jsonl:3: expected an object with stage, step, got b'\[1, 2\]"),
        ('{"stage": "grpo"}', r"metrics.jsonl:3: expected an object with stage, step"),
        ('{"stage": "grpo", "step": "two"}', r"metrics.jsonl:3: expected an object with stage, step"),
        ("\udcff", r"metrics.jsonl:3: not valid JSON"),
    ],
)
def test_a_broken_line_is_named_with_file_and_number(tmp_path, capsys, line, message):
    good = '{"stage": "grpo", "step": 1, "time": {}}\n'
    (tmp_path / "metrics.jsonl").write_bytes(f"{good}{good}{line}\n{good}".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert f"error: {tmp_path}/metrics.jsonl:3: " in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_line_that_is_still_being_written_is_left_out_and_noted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 1, "loss": 2.0, "time": {}}\n{"stage": "sft", "st'
    )
    run = read_run(tmp_path)
    assert [x["step"] for x in run.metrics] == [1]
    assert describe(run)["notes"] == ["metrics.jsonl:2 is not whole yet and left out"]


def test_a_folder_without_steps_says_so(tmp_path):
    with pytest.raises(DataError, match=r"metrics.jsonl: missing; give the folder of a run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"metrics.jsonl: no lines yet"):
        read_run(tmp_path)


def test_a_stage_becomes_columns_with_seconds_and_rates(tmp_path):
    lines = [
        {"stage": "grpo", "step": 1, "reward": 0.25, "sample_tokens": 30, "time": {"sample_s": 2.0}},
        {"stage": "grpo", "step": 2, "reward": None, "kl_ref": 0.123456789012, "note": "x", "time": {"wait_s": 0.0}},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert describe(read_run(tmp_path))["stages"] == {
        "grpo": {
            "steps": [1, 2],
            "columns": {
                "reward": [0.25, None],
                "sample_tokens": [30, None],
                "time.sample": [2.0, None],
                "rate.sample": [15.0, None],
                "kl_ref": [None, 0.12345679],
                "time.wait": [None, 0.0],
            },
            "every": 1,
        }
    }


def test_of_a_long_stage_every_second_step_is_drawn_and_the_last_one(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": i, "loss": 1.0} for i in range(1, 2502)])
    stage = describe(read_run(tmp_path))["stages"]["sft"]
    assert stage["every"] == 2
    assert (stage["steps"][:2], stage["steps"][-1]) == ([1, 3], 2501)


def test_the_run_that_the_weights_came_from_is_the_parent(tmp_path):
    parent, child = make_run(tmp_path / "parent"), make_run(tmp_path / "child")
    config = {"name": "child", "model": {"source": str(parent)}}
    (child / "config.json").write_text(json.dumps({"config": config}))
    found = describe(read_run(child))["parent"]
    assert (found["name"], found["config"]["model.source"]) == ("parent", "random")
    assert describe(read_run(parent))["parent"] is None


# The page


@pytest.mark.parametrize("text", [HOSTILE, "\udc80 \x00 \u2028 & &lt; @DATA@ @HASH@"])
def test_text_of_a_run_cannot_leave_its_place_in_the_page(tmp_path, text):
    plain = write_page([make_run(tmp_path / "plain")], out=tmp_path / "plain.html").read_text()
    page = write_page([make_run(tmp_path / "hostile", text=text)], out=tmp_path / "hostile.html").read_text()
    assert tags(page) == tags(plain)
    assert page.count("</script>") == 2
    assert data_of(page)["runs"][0]["rollouts"][0]["rollouts"][0]["texts"][0] == text


def test_what_is_no_number_is_null(tmp_path):
    lines = '{"stage": "sft", "step": 1, "loss": NaN}', '{"stage": "sft", "step": 2, "loss": -Infinity}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert describe(read_run(tmp_path))["stages"]["sft"]["columns"] == {}
    with pytest.raises(ValueError, match="JSON"):
        fill(float("nan"))


def test_the_page_runs_no_script_but_its_own_and_asks_no_network():
    page = fill({})
    assert "script-src 'sha256-" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


def test_a_page_of_500_steps_stays_under_five_megabytes_and_says_what_it_left_out(tmp_path):
    run = make_run(tmp_path / "long", steps=500, groups_every=4, tokens=512)
    assert (run / "rollouts.jsonl").stat().st_size > 5e6
    page = write_page([run], out=tmp_path / "page.html")
    assert 2e6 < page.stat().st_size < 5e6
    shown = data_of(page.read_text())["runs"][0]
    assert (shown["recorded"], len(shown["rollouts"])) == (125, 42)
    assert len(shown["stages"]["grpo"]["steps"]) == 500


def test_groups_are_thinned_evenly_to_the_room_there_is():
    lines = [{"step": i} for i in range(10, 20)]  # 11 bytes each
    assert thin(lines, room=110) == lines
    assert [x["step"] for x in thin(lines, room=109)] == [10, 12, 14, 16, 18]
    assert thin(lines, room=10) == []
    assert thin([], room=10) == []


def test_the_front_door_writes_one_page_for_several_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    assert main([*map(str, runs), "--parent", str(runs[0])]) == 0
    assert capsys.readouterr().out.startswith(str(runs[0] / "report.html"))
    assert main([str(runs[0]), "--parent", str(tmp_path)]) == 2
    assert "no config of a run" in capsys.readouterr().err
    assert main([str(runs[0]), "--out", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "No such file" in capsys.readouterr().err
    data = data_of((runs[0] / "report.html").read_text())
    assert [x["name"] for x in data["runs"]] == ["a", "b"]
    assert data["parent"]["config"]["name"] == "a"


# Recording rollouts


def rollout_group(length=6, *, rewards=(1.0, 0.0, 0.0)):
    prompt = Prompt("arithmetic/train/3", (1, 20, 21), "math", {"expected_answer": "4"}, text="2+2?", pass_rate=0.25)
    ids = tuple(30 + i % 50 for i in range(length))
    completion = Completion(ids, (-0.5,) * length, (7,) * (length - 2) + (8, 8), finished=True)
    return RolloutGroup(prompt, tuple(Rollout(prompt, completion, Score(r, {"accuracy": r})) for r in rewards))


def record(folder, *, keep_lines=0, **knobs):
    tokenizer = load_tokenizer("arithmetic")
    return RolloutRecord(folder, c=RecordConfig(**knobs), tokenizer=tokenizer, keep_lines=keep_lines, writes=True)


def keep(log, step, groups):
    log.keep("grpo", step=step, groups=groups, credit=lambda g: [x.score.reward - 0.5 for x in g.rollouts])


def read(folder):
    return [json.loads(x) for x in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_every_step_is_recorded_at_first_and_then_ever_fewer():
    steps = [s for s in range(1, 501) if recorded(s, per_doubling=4)]
    assert steps[:16] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert sum(recorded(s, per_doubling=8) for s in range(1, 501)) == 55
    assert sum(recorded(s, per_doubling=8) for s in range(1, 10_001)) == 89
    assert not any(recorded(s, per_doubling=0) for s in range(1, 99))


def test_a_recorded_group_holds_what_a_reader_needs(tmp_path):
    log = record(tmp_path, samples=2)
    keep(log, 1, [rollout_group()])
    log.close()
    (line,) = read(tmp_path)
    first, second = line.pop("rollouts")
    assert line == {
        "stage": "grpo",
        "step": 1,
        "num_groups": 1,
        "prompt_id": "arithmetic/train/3",
        "question": "2+2?",
        "verifier": "math",
        "args": '{"expected_answer": "4"}',
        "pass_rate": 0.25,
        "prompt": {"texts": ["<|begin_of_text|>%&", ""], "skipped": 0, "tokens": 3},
        "num_rollouts": 3,
    }
    assert first == {
        "reward": 1.0,
        "parts": {"accuracy": 1.0},
        "failure": "",
        "advantage": 0.5,
        "finished": True,
        "tokens": 6,
        "versions": [[7, 4], [8, 2]],
        "texts": ["/", "0", "1", "2", "3", "4"],
        "logprobs": [-0.5] * 6,
        "skipped": [6, 0],
    }
    assert second["advantage"] == -0.5


def test_of_a_long_completion_the_first_and_last_tokens_are_kept(tmp_path):
    log = record(tmp_path, tokens=5)
    keep(log, 1, [rollout_group(40)])
    log.close()
    answer = read(tmp_path)[0]["rollouts"][0]
    assert (answer["texts"], answer["skipped"], len(answer["logprobs"])) == (["/", "0", "1", "U", "V"], [3, 35], 5)


def test_the_same_groups_are_drawn_again_and_a_resume_cuts_what_comes_after(tmp_path):
    groups = [rollout_group(rewards=(i / 10,) * 2) for i in range(8)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log = record(tmp_path / name)
        for step in (1, 2, 3):
            keep(log, step, groups)
        assert log.lines == 6
        log.close()
    whole = (tmp_path / "a" / "rollouts.jsonl").read_bytes()
    assert whole == (tmp_path / "b" / "rollouts.jsonl").read_bytes()
    drawn = [x["rollouts"][0]["reward"] for x in read(tmp_path / "a")]
    assert len({tuple(drawn[i : i + 2]) for i in (0, 2, 4)}) > 1
    again = record(tmp_path / "a", keep_lines=2)
    for step in (2, 3):
        keep(again, step, groups)
    again.close()
    assert (tmp_path / "a" / "rollouts.jsonl").read_bytes() == whole


def test_a_process_that_does_not_write_counts_the_same_lines(tmp_path):
    log = RolloutRecord(tmp_path, c=RecordConfig(), tokenizer=load_tokenizer("arithmetic"), keep_lines=4, writes=False)
    keep(log, 1, [rollout_group()] * 3)
    assert log.lines == 6
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_rewards_are_told_by_task_where_there_are_several():
    c = load_config("tiny_grpo").grpo
    assert c is not None
    c = dataclasses.replace(c, max_staleness=1)
    one, other = rollout_group(rewards=(1.0, 0.0)), rollout_group(rewards=(1.0, 1.0))
    sudoku = dataclasses.replace(other.prompt, verifier="reasoning_gym", args={"task": "mini_sudoku"})
    both = describe_rollouts([one, dataclasses.replace(other, prompt=sudoku)], c, updates=8)
    assert {k: v for k, v in both.items() if k.startswith("reward")} == {
        "reward": 0.75,
        "reward/math": 0.5,
        "reward/mini_sudoku": 1.0,
    }
    assert "reward/math" not in describe_rollouts([one], c, updates=8)


def test_pieces_of_a_character_show_at_its_last_token():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(backend, "", "", "", (), None)
    ids = backend.encode("aé€😀b").ids
    assert tokenizer.pieces(ids) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert tokenizer.pieces(ids[:2]) == ["a", "\ufffd"]
    assert tokenizer.pieces([]) == []


# In a browser


def browse(page, *words):
    """(DOM after its scripts ran, console lines)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium and (reason := install("chromium")):
        pytest.skip(reason)
    command = [chromium or "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", "--v=0", *words, f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout, [x for x in done.stderr.splitlines() if "CONSOLE" in x]


@pytest.mark.slow
def test_the_page_of_a_real_run_opens_in_a_browser_without_a_console_error(tmp_path):
    command = [sys.executable, "-m", "lnjax.launch", "--config", "tiny_grpo", "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    page = tmp_path / "run" / "report.html"
    assert page.stat().st_size < 5e6
    dom, console = browse(page, "--dump-dom", "--window-size=1280,2000")
    assert console == []
    assert "<title>run – lnjax report</title>" in dom
    for title in ("Reward and its parts", "KL to the reference", "Entropy", "Time by phase", "Rollouts", "Config"):
        assert f">{title}</h" in dom
    assert "Curriculum" not in dom.split("<script")[0]
    assert "limit" not in dom.split("<script")[0]
    assert 'aria-current="true"' in dom and "Response 4" in dom


@pytest.mark.slow
def test_a_browser_shows_hostile_text_as_text(tmp_path):
    runs = [make_run(tmp_path / "hostile", text=HOSTILE), make_run(tmp_path / "<b>two", steps=30)]
    dom, console = browse(write_page(runs, out=tmp_path / "page.html"), "--dump-dom", "--window-size=390,800")
    assert console == []
    assert "<title>hostile, &lt;b&gt;two – lnjax report</title>" in dom
    shown = dom.split('<script type="application/json"')[0]
    assert "<img" not in shown and "&lt;img src=x onerror=" in shown
    for title in ("Reward by task", "Parity oracle", "Curriculum", "Staleness"):
        assert f">{title}</h3>" in shown
    assert "limit 1.05: the run stops" in shown
