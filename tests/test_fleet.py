"""What the fleet does with servers that die, lie, hang or refuse. The servers are fakes; tests/test_vllm.py has real ones."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest

from lnjax.checkpoint.publish import Publisher
from lnjax.errors import ConfigError, RolloutError
from lnjax.rollout import vllm
from lnjax.schema import VllmConfig
from lnjax.types import Prompt, SamplingParams
from tests.fake_vllm import FakeServer
from tests.specs import llama

PROMPTS = [Prompt(f"p/{i}", (10 + i, 3), "none", {}) for i in range(6)]
SAMPLING = SamplingParams(1.0, 1.0, 0, 4, ())
DEADLINES = {"probe_deadline_s": 2.0, "request_deadline_s": 1.0, "swap_deadline_s": 2.0, "start_deadline_s": 3.0}


@pytest.fixture
def attach(make_model, tmp_path, monkeypatch):
    """attach(servers, ...) -> an engine over them, and load(number): publish other weights."""
    monkeypatch.setenv("LNJAX_SERVER_KEY", "k")
    monkeypatch.setattr(vllm, "BACK_OFF_S", 0.1)
    monkeypatch.setattr(vllm, "PROBE_EVERY_S", 0.2)
    model, closing = make_model(llama()), []

    def start(*servers, **changes):
        c = VllmConfig(addresses=tuple(s.address for s in servers), num_servers=0, max_len=64, **DEADLINES)
        c = dataclasses.replace(c, **changes)
        publisher = Publisher(
            tmp_path / "weights",
            spec=model.spec,
            mesh=model.compute.ops.mesh,
            dtype=jnp.dtype("float32"),
            keep=2,
            deadline_s=2.0,
        )
        notes: list[str] = []
        engine = vllm.VllmEngine(c, publisher=publisher, model={}, run_dir=tmp_path, note=notes.append)
        closing.extend([engine, *servers])
        engine.notes = notes
        engine.load = lambda n: engine.load_weights(n, model.init_params(jax.random.key(n), dtype=jnp.float32))
        return engine

    yield start
    for item in closing:
        item.close()


def ready(engine, count):
    start = time.monotonic()
    while sum(m.ready.is_set() for m in engine._members) < count:
        assert time.monotonic() - start < 10, engine.notes
        time.sleep(0.02)


def ask(engine, seed=0, prompts=PROMPTS):
    return engine.generate(prompts, num_samples=3, sampling=SAMPLING, seed=seed)


def test_groups_stay_whole_are_spread_by_load_and_carry_the_version_they_were_made_with(attach):
    one, two = FakeServer(delay_s=0.1), FakeServer(delay_s=0.1)
    engine = attach(one, two)
    engine.load(5)
    ready(engine, 2)
    groups = ask(engine)
    assert [[c.versions for c in g] for g in groups] == [[(5,) * 4] * 3] * 6
    assert sorted(one.answered + two.answered) == sorted(p.token_ids for p in PROMPTS)
    assert {len(one.answered), len(two.answered)} == {3}
    assert ask(engine) == groups
    assert ask(engine, seed=1) != groups


LIES = {
    "unpublished label": "never attested",
    "older label": "older than version 2",
    "no label": "do not cover",
    "a gap between spans": "do not cover",
}


@pytest.mark.parametrize("trouble", LIES)
def test_tokens_of_weights_that_were_not_published_or_attested_are_refused_and_counted(attach, trouble):
    liar, honest = FakeServer(), FakeServer()
    engine = attach(liar, honest)
    engine.load(1)
    ready(engine, 2)
    engine.load(2)
    expected = ask(engine, prompts=PROMPTS[:2])
    liar.trouble = trouble
    assert ask(engine, prompts=PROMPTS[:2]) == expected
    counts = engine.report()["fleet"]
    assert counts["unattested"] >= 1
    assert any(LIES[trouble] in n for n in engine.notes)
    assert counts["resent"] >= 1


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        ("status 500", "status"),
        ("hangs", "deadline"),
        ("hangs up", "connection"),
        ("not json", "reply"),
        ("a completion too few", "reply"),
        ("other ids beside the logprobs", "reply"),
        ("aborted", "reply"),
    ],
)
def test_requests_of_a_broken_server_go_to_another_and_no_prompt_is_lost_or_answered_twice(attach, trouble, kind):
    broken, whole = FakeServer(), FakeServer()
    engine = attach(broken, whole)
    engine.load(1)
    ready(engine, 2)
    expected = ask(engine)
    broken.answered.clear(), whole.answered.clear()
    broken.trouble = trouble
    assert ask(engine) == expected
    assert sorted(whole.answered) == sorted(p.token_ids for p in PROMPTS)
    assert engine.report()["fleet"][kind] >= 1
    broken.trouble = ""
    ready(engine, 2)  # it comes back, with the current weights
    assert broken.served[-1] == whole.served[-1]


def test_a_server_that_attests_other_weights_takes_no_request_until_it_attests_the_published_ones(attach):
    server = FakeServer()
    engine = attach(server)
    engine.load(1)
    ready(engine, 1)
    server.trouble = "attests another digest"
    version = engine.load(2)
    assert any("a rank attests 2 (0000" in n for n in engine.notes)
    assert {v for g in ask(engine) for c in g for v in c.versions} == {2}
    assert server.attested["digest"] == version.digest


@pytest.mark.parametrize("trouble", ["refuses once", "refuses once and drops a resume"])
def test_a_refused_version_is_repaired_and_loaded_and_the_server_is_never_left_paused(attach, trouble):
    server = FakeServer()
    engine = attach(server)
    engine.load(1)
    ready(engine, 1)
    server.trouble = trouble
    server.calls.clear()
    engine.load(2)
    assert server.served[-1].startswith("2:")
    assert [c for c in server.calls if c in ("/pause", "/resume")] == ["/pause", "/resume"] * 2
    assert engine.report()["fleet"]["refused"] == 1
    assert any(
        "refused: /update_weights: 500" in n and ("then connection: /resume" in n) == ("drops" in trouble)
        for n in engine.notes
    )


@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_server_taken_down_while_its_weights_change_harms_no_other_and_comes_back_with_them(attach, hangs_up):
    server, whole = FakeServer(), FakeServer()
    engine = attach(server, whole)
    engine.load(1)
    ready(engine, 2)
    inner, left = server.reply, [1]

    def reply(path, key, body):
        if path == "/collective_rpc" and left:
            left.pop()
            engine._loop.call_soon_threadsafe(engine._members[0].failed.set)  # as a request that failed meanwhile does
            time.sleep(0.5)
            if hangs_up:
                return 0, {}
        return inner(path, key, body)

    server.reply = reply
    engine.load(2)
    assert {v for g in ask(engine) for c in g for v in c.versions} == {2}
    start = time.monotonic()
    while engine.report()["fleet"]["restarts"] < 1:
        assert time.monotonic() - start < 10, engine.notes
        time.sleep(0.02)
    ready(engine, 2)
    assert server.served[-1] == whole.served[-1]
    assert [m.failed.is_set() for m in engine._members] == [False, False]


def test_a_server_that_lost_its_weights_gets_them_again(attach):
    server = FakeServer()
    engine = attach(server)
    engine.load(1)
    ready(engine, 1)
    server.served.append("none")  # as after a restart behind our back
    start = time.monotonic()
    while not server.served[-1].startswith("1:"):
        assert time.monotonic() - start < 10, engine.notes
        time.sleep(0.02)
    assert any("it says that it serves 'none'" in n for n in engine.notes)


def test_a_request_that_no_server_takes_names_the_prompt(attach):
    server = FakeServer()
    engine = attach(server)
    engine.load(1)
    ready(engine, 1)
    server.trouble = "status 400"
    with pytest.raises(RolloutError, match=r"prompt p/0: no server takes it: .*prompt too long"):
        ask(engine, prompts=PROMPTS[:1])
    with pytest.raises(RolloutError, match=r"prompt long: 90 tokens and 4 new ones exceed engine.max_len=64"):
        ask(engine, prompts=[Prompt("long", (1,) * 90, "none", {})])


def test_servers_that_never_start_end_the_run_with_their_reasons(attach):
    server = FakeServer(key="another")
    engine = attach(server)
    with pytest.raises(RolloutError, match=r"no server is left: server 0 was started 3 times; .*401"):
        engine.load(1)


def test_a_server_off_this_host_that_obeys_without_a_key_is_not_used(attach):
    server = FakeServer(key="", host="127.0.0.2")
    engine = attach(server)
    with pytest.raises(ConfigError, match="answers without a bearer key"):
        engine.load(1)


def test_rolling_changes_one_server_after_the_other(attach):
    servers = FakeServer(), FakeServer()
    engine = attach(*servers, swap="rolling")
    engine.load(1)
    ready(engine, 2)
    order = []
    for i, server in enumerate(servers):
        inner = server.reply

        def reply(path, key, body, i=i, inner=inner):
            if path in ("/pause", "/resume"):
                order.append((path, i))
            return inner(path, key, body)

        server.reply = reply
    engine.load(2)
    assert order == [("/pause", 0), ("/resume", 0), ("/pause", 1), ("/resume", 1)]
