"""Verifiers in worker processes, each completion under its own deadline."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence

from lnjax.errors import ConfigError, RolloutError
from lnjax.rewards.format import answer_of, follows_format
from lnjax.rewards.judge import JudgeClient, question_of, rule_request
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rewards.verifiers import JUDGE, REWARD_MODEL, VERIFIERS
from lnjax.schema import RewardConfig
from lnjax.types import Score

START_DEADLINE_S = 120.0
WINDOW = 16  # requests on their way to one worker; it answers in order
START_ATTEMPTS = 3
ATTEMPTS = 2  # a completion whose worker dies this often scores 0


class Worker:
    """One process and what it owes."""

    def __init__(self, *, warm: str, extra: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lnjax.rewards.worker", warm, extra, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self.owed: deque[int] = deque()
        """Request indices, the one being judged first."""
        self.ready = False
        self.since = time.monotonic()
        """When the first owed request (or the start) began."""
        self._outgoing, self._incoming = b"", b""

    def send(self, index: int, line: bytes) -> None:
        if not self.owed:
            self.since = time.monotonic()
        self.owed.append(index)
        self._outgoing += line

    @property
    def unsent(self) -> bool:
        return bool(self._outgoing)

    def flush(self) -> None:
        try:
            self._outgoing = self._outgoing[os.write(self.stdin.fileno(), self._outgoing) :]
        except BlockingIOError:
            pass  # its pipe is full; the selector calls again
        except BrokenPipeError:
            self._outgoing = b""  # it died, which `read` will find

    def read(self) -> tuple[list[dict], bool]:
        """(whole replies so far, whether it is still there)."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        *lines, self._incoming = (self._incoming + chunk).split(b"\n")
        return [json.loads(line) for line in lines], bool(chunk)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class RewardPool:
    """`score` is deterministic: neither the order nor the verdicts depend on which worker did what."""

    def __init__(self, c: RewardConfig, *, extra: Mapping[str, str]):
        self._c, self._extra = c, json.dumps(dict(extra))
        self._known = sorted({*VERIFIERS, *extra, *([JUDGE] if c.judge else []), *([REWARD_MODEL] if c.model else [])})
        self._judge = JudgeClient(c.judge) if c.judge else None
        self._workers: list[Worker] = []
        self._warm: set[str] = set()
        self._failed_starts = 0

    def check(self, verifiers: Sequence[str]) -> None:
        """Raises ConfigError for a name that no verifier has."""
        for name in sorted(set(verifiers) - set(self._known)):
            if name in (JUDGE, REWARD_MODEL):
                section = "judge" if name == JUDGE else "model"
                raise ConfigError(
                    f"prompts ask for the verifier `{name}`, but the config has no reward.{section}; add one"
                )
            raise ConfigError(f"unknown verifier {name!r}; known: {self._known}. Fix args.verifier in the data")

    def start(self) -> None:
        """Raises RolloutError when the config's judge does not answer."""
        if self._judge:
            self._judge.check()

    def report(self) -> dict[str, dict[str, int]]:
        """Totals for summary.json."""
        return {"judge": dict(self._judge.counts)} if self._judge else {}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in order. A verifier that hangs or raises scores 0 and says so in `failure`."""
        self.check([r.verifier for r in requests])
        judged = {i for i, r in enumerate(requests) if r.finished and r.verifier == JUDGE}
        rules = {i: rule_request(requests[i]) for i in judged} if self._c.judge and self._c.judge.rule_first else {}
        work = [rules.get(i) or r for i, r in enumerate(requests)]
        todo = deque(i for i, r in enumerate(work) if r.finished and r.verifier not in (JUDGE, REWARD_MODEL))
        replies: dict[int, dict] = {}
        if todo:
            self._run(work, todo, replies)
        if judged:
            self._ask(requests, sorted(judged), replies)
        for i, r in enumerate(requests):
            if r.finished and r.verifier == REWARD_MODEL:
                replies[i] = {"parts": r.args["parts"], "failure": ""}
        return [self._verdict(r, replies.get(i)) for i, r in enumerate(requests)]

    def close(self) -> None:
        self._end_workers()
        if self._judge:
            self._judge.close()

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _ask(self, requests: Sequence[ScoreRequest], judged: Sequence[int], replies: dict[int, dict]) -> None:
        """Verdicts of the judge, but where the rule is certain. `judged` becomes the share that needed it."""
        assert self._judge
        certain = {i for i in judged if replies.get(i, {}).get("parts", {}).get("accuracy") == 1.0}
        asked = [i for i in judged if i not in certain]
        verdicts = self._judge.ask([question_of(requests[i]) for i in asked])
        for i in certain:
            replies[i] = {"parts": {"accuracy": 1.0, "judged": 0.0}, "failure": ""}
        for i, verdict in zip(asked, verdicts, strict=True):
            replies[i] = {"parts": {"accuracy": float(verdict.right), "judged": 1.0}, "failure": verdict.failure}

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _verdict(self, request: ScoreRequest, reply: dict | None) -> Score:
        """Reward = accuracy x format, as the published run multiplied them."""
        parts, failure = {"accuracy": 0.0}, ""
        if reply:
            parts, failure = {"accuracy": 0.0, **reply["parts"]}, reply["failure"]
        if self._c.format == "none":
            return Score(parts["accuracy"], parts, failure)
        parts["format"] = float(request.finished and follows_format(request.text, reasoning=request.reasoning))
        return Score(parts["accuracy"] * parts["format"], parts, failure)

    def _run(self, requests: Sequence[ScoreRequest], todo: deque[int], replies: dict[int, dict]) -> None:
        needed = {requests[i].verifier for i in todo}
        if not needed <= self._warm:  # start anew, with those imported before any deadline runs
            self._warm |= needed
            self._end_workers()
        attempts: dict[int, int] = {}
        expected = len(todo)
        while len(replies) < expected:
            while len(self._workers) < self._c.num_workers:
                self._workers.append(Worker(warm=",".join(sorted(self._warm)), extra=self._extra))
            for worker in self._workers:
                while todo and worker.ready and len(worker.owed) < WINDOW:
                    index = todo.popleft()
                    worker.send(index, _line(requests[index]))
            for worker in self._wait():
                failure = self._advance(worker, replies)
                if failure is None:
                    continue
                worker.kill()
                self._workers.remove(worker)
                self._failed_starts = 0 if worker.ready else self._failed_starts + 1
                if self._failed_starts >= START_ATTEMPTS:
                    raise RolloutError(
                        f"{START_ATTEMPTS} reward workers in a row {failure} before they were ready; see above"
                    )
                if worker.owed:  # the first one was being judged; the others go to another worker
                    culprit = worker.owed.popleft()
                    attempts[culprit] = attempts.get(culprit, 0) + 1
                    if failure == "deadline" or attempts[culprit] >= ATTEMPTS:
                        detail = (
                            f"deadline of {self._c.deadline_s:g} s" if failure == "deadline" else f"worker {failure}"
                        )
                        replies[culprit] = {"parts": {}, "failure": detail}
                    else:
                        worker.owed.appendleft(culprit)
                    todo.extendleft(reversed(worker.owed))

    def _wait(self) -> list[Worker]:
        """Workers that may have news: readable ones, and those past their deadline."""
        now = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            waits = [self._deadline(w) - now for w in self._workers if w.owed or not w.ready]
            events = selector.select(max(0.0, min(waits, default=1.0)))
        readable = []
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
            else:
                readable.append(key.data)
        now = time.monotonic()
        late = [w for w in self._workers if w not in readable and (w.owed or not w.ready) and now >= self._deadline(w)]
        return readable + late

    def _deadline(self, worker: Worker) -> float:
        return worker.since + (self._c.deadline_s if worker.ready else START_DEADLINE_S)

    def _advance(self, worker: Worker, replies: dict[int, dict]) -> str | None:
        """Take its replies; why it must go, or None."""
        try:
            lines, alive = worker.read()
        except BlockingIOError:
            return "deadline"  # nothing to read: it is here because its time is up
        for line in lines:
            if "ready" in line:
                worker.ready = True
            else:
                replies[worker.owed.popleft()] = line
            worker.since = time.monotonic()
        return None if alive else f"ended with status {worker.process.wait()}"


def build_reward(c: RewardConfig, *, extra: Mapping[str, str] | None = None) -> RewardPool:
    """A pool whose workers start at the first `score`. `extra` adds verifiers: {name: "module:function"}."""
    return RewardPool(c, extra=extra or {})


def _line(request: ScoreRequest) -> bytes:
    body = {"verifier": request.verifier, "args": dict(request.args), "answer": answer_of(request.text)}
    return json.dumps(body).encode() + b"\n"
