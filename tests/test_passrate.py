"""Pass rates from a tiny model: the file, going on with it, refusing another's, and the curriculum it makes."""

import json

import pytest

from lnjax import passrate
from lnjax.data.streams import build_prompt_stream, prompt_rows
from lnjax.data.tokenizer import load_tokenizer
from lnjax.schema import CurriculumConfig, PromptConfig

WORDS = ["--config", "tiny_grpo", "--grpo.prompts.num-prompts", "20", "--grpo.sampling.max-new-tokens", "8"]
SAMPLES = ["--samples", "4"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A finished file of 20 rows: 3 chunks, the last of 4."""
    folder = tmp_path_factory.mktemp("passrate")
    out = folder / "rates.jsonl"
    assert passrate.main([*WORDS, *SAMPLES, "--out", str(out), "--run-dir", str(folder / "run")]) == 0
    return out


def test_every_row_of_the_source_gets_its_rate_and_what_measured_it(measured):
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    source = prompt_rows(PromptConfig(source="ifeval", num_prompts=20))
    assert [row["input"] for row in rows] == [row["input"] for _, row in source]
    assert all(0 <= row["pass_rate"] <= 1 for row in rows)
    assert {row["measured"]["model"] for row in rows} == {"random"}
    assert {row["measured"]["samples"] for row in rows} == {4}
    assert {len(row["measured"]["weights"]) for row in rows} == {16}
    assert measured.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stopped_measurement_goes_on_to_the_same_bytes_and_drops_half_a_line(measured, tmp_path):
    whole, out = measured.read_bytes(), tmp_path / "rates.jsonl"
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:11]) + lines[11][:40])
    assert passrate.main([*WORDS, *SAMPLES, "--out", str(out), "--run-dir", str(tmp_path / "run")]) == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--samples", "2"], "samples was 4, is 2"),
        ([*SAMPLES, "--grpo.sampling.temperature", "0.5"], "config was"),
        ([*SAMPLES, "--grpo.prompts.seed", "1"], "config was"),
        ([*SAMPLES, "--model.source", "elsewhere"], "model was 'random', is 'elsewhere'"),
    ],
)
def test_a_file_of_another_model_or_config_is_refused_by_name(measured, tmp_path, capsys, words, named):
    before = measured.read_bytes()
    assert passrate.main([*WORDS, *words, "--out", str(measured), "--run-dir", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err
    assert measured.read_bytes() == before


def test_the_measured_file_is_a_source_for_a_curriculum(measured):
    c = PromptConfig(source=str(measured), max_prompt_tokens=400)
    order = CurriculumConfig(drop_at=1.01, start=1.0, end=0.0)
    stream = build_prompt_stream(c, load_tokenizer("arithmetic"), curriculum=order, batch_size=4)
    rates = [p.pass_rate for p in stream.take(20)]
    assert sum(rates[:4]) >= sum(rates[-4:])


def test_a_count_or_a_config_that_cannot_work_exits_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        passrate.main([*WORDS, "--samples", "none"])
    assert "argument --samples: invalid int value: 'none'" in capsys.readouterr().err
    assert passrate.main(["--config", "tiny_sft"]) == 2
    assert "tiny_sft has no grpo stage" in capsys.readouterr().err
