"""Signs of life: what each process is at, who is stuck, and a stop that all agree on.

Every process writes RUN_DIR/alive/RANK.json every few seconds and reads its neighbours'. One thread does that; another one,
which touches no file, judges. A process that is stuck in native code, frozen, or waits for another that is, ends with its
stacks in RUN_DIR/alive/RANK.stacks and the culprit's number: no timeout of JAX fires for a rank that lives but does nothing.
Clocks of different hosts are never compared: what counts is when this process saw a change.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lnjax.distributed import Place
from lnjax.schema import ClusterConfig

STUCK = 76
"""Exit status of a process that is stuck, or waits for one that is."""
NORMAL = (0, 75)
NEIGHBOURS = 8
"""Others that a process reads, besides process 0; process 0 reads all."""
LAST_WORDS_S = 10.0
START = "start"
"""The phase until the first step; it has a deadline of its own."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a process says of itself."""

    attempt: str
    number: int
    """Grows with every sign of life."""
    step: str
    """`sft step 7`."""
    phase: str
    marks: int
    """Phases entered and left so far. All processes run the same code: the one with the fewest keeps the others waiting."""
    status: int | None = None
    """Exit status, once it ends."""
    why: str = ""

    def at(self) -> str:
        return f"in `{self.phase}` of {self.step}" if self.step else f"in `{self.phase}`"


@dataclass(slots=True)
class Seen:
    """A process as this one knows it; times are this one's clock."""

    beat: Beat
    heard: float
    marked: float


class Watch:
    """Judges by what was heard. No threads, no files."""

    def __init__(self, place: Place, *, c: ClusterConfig, clock: Callable[[], float]):
        self._place, self._c, self._clock = place, c, clock
        self._began = self._read = self._judged = clock()
        """When the process began, when it last could read the others, and when it last judged."""
        self.seen: dict[int, Seen] = {}

    def watched(self) -> list[int]:
        """Ranks whose silence this process must notice."""
        rank, count = self._place.rank, self._place.count
        ring = {(rank + i) % count for i in range(1, NEIGHBOURS + 1)}
        return sorted((set(range(count)) if rank == 0 else ring | {0}) - {rank})

    def hear(self, rank: int, beat: Beat) -> None:
        """A sign of life, perhaps one heard before. One of an earlier attempt is none."""
        if beat.attempt != self._place.attempt:
            return
        now, before = self._clock(), self.seen.get(rank)
        if before is None or beat.number != before.beat.number or beat.status != before.beat.status:
            marked = before.marked if before and before.beat.marks == beat.marks else now
            self.seen[rank] = Seen(beat, now, marked)

    def have_read(self) -> None:
        """All that is watched was read just now."""
        self._read = self._clock()

    def verdict(self) -> tuple[int, str] | None:
        """(exit status, reason) when this process should end."""
        c, now = self._c, self._clock()
        slept, self._judged = now - self._judged, now
        if slept > c.heartbeat_s:  # this process was frozen, with the others or alone: what it knows of them is old
            self._forgive(slept)
            return None
        silent = []
        for rank in self.watched():
            seen = self.seen.get(rank)
            if seen is None:
                if now - self._began > c.start_deadline_s:
                    silent.append(f"rank {rank} has not started within {c.start_deadline_s:g} s")
            elif seen.beat.status is not None:
                if seen.beat.status not in NORMAL:
                    return seen.beat.status, f"rank {rank} ended with status {seen.beat.status}: {seen.beat.why}"
            elif self._read - seen.heard > c.heartbeat_s:  # not `now`: reading may take long
                silent.append(
                    f"rank {rank} has given no sign of life for {self._read - seen.heard:.0f} s, {seen.beat.at()}; "
                    f"deadline {c.heartbeat_s:g} s"
                )
        if silent:
            return STUCK, "; ".join(silent)
        running = {r: s for r, s in sorted(self.seen.items()) if s.beat.status is None}
        if any(now - s.marked > self._limit(s.beat) for s in running.values()):
            fewest = min(s.beat.marks for s in running.values())
            return STUCK, "; ".join(
                f"rank {r} has been {s.beat.at()} for {now - s.marked:.0f} s; deadline {self._limit(s.beat):g} s"
                for r, s in running.items()
                if s.beat.marks == fewest
            )
        if now - self._read > c.step_deadline_s:
            return STUCK, f"rank {self._place.rank} could not read alive/ for {now - self._read:.0f} s"
        return None

    def _forgive(self, seconds: float) -> None:
        """Time that this process did not live through counts against nobody."""
        now = self._judged
        self._began, self._read = min(now, self._began + seconds), min(now, self._read + seconds)
        for seen in self.seen.values():
            seen.heard, seen.marked = min(now, seen.heard + seconds), min(now, seen.marked + seconds)

    def _limit(self, beat: Beat) -> float:
        return self._c.start_deadline_s if beat.phase == START else self._c.step_deadline_s


class Watchdog:
    """The watch with its threads, files and end. `close` it with the exit status; it ends the process by itself if it must."""

    def __init__(self, place: Place, *, run_dir: Path, c: ClusterConfig):
        self._place, self._c, self._folder = place, c, run_dir / "alive"
        self._watch = Watch(place, c=c, clock=time.monotonic)
        self._step, self._phases, self._marks, self._number = "", [START], 0, 0
        self._lock, self._done = threading.Lock(), threading.Event()
        self._stacks = None
        self._tick()
        if place.count > 1:  # alone there is nobody to read it
            self._folder.mkdir(parents=True, exist_ok=True)
            self._exchange()
            self._stacks = open(self._folder / f"{place.rank}.stacks", "a", encoding="utf-8")  # noqa: SIM115
        self._arm()
        self._every_s = min(3.0, c.heartbeat_s / 5, c.step_deadline_s / 5)
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), name=name, daemon=True)
            for name, work in (("alive", self._beat), ("watchdog", self._judge))
        ]
        for thread in self._threads:
            thread.start()

    def at(self, step: str) -> None:
        """The main thread begins a step."""
        self._step, self._phases[0] = step, "between phases"
        self._mark()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._mark()
        try:
            yield
        finally:
            self._phases.pop()
            self._mark()

    def close(self, status: int, why: str = "") -> None:
        """Tell the others how it ended."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(LAST_WORDS_S)
        self._tell(status, why)

    # Threads.

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._done.wait(self._every_s):
            work()

    def _mark(self) -> None:
        self._marks += 1
        self._tick()

    def _tick(self, status: int | None = None, why: str = "") -> Beat:
        with self._lock:
            self._number += 1
            beat = Beat(
                self._place.attempt, self._number, self._step, self._phases[-1], self._marks, status, why[:1000]
            )
            self._watch.hear(self._place.rank, beat)
            return beat

    def _arm(self) -> None:
        """For native code that holds Python's lock: no thread of ours runs then, faulthandler's does and ends with 1."""
        faulthandler.dump_traceback_later(2 * self._c.step_deadline_s, exit=True, file=self._stacks or sys.stderr)

    def _beat(self) -> None:
        self._arm()
        if self._place.count > 1:
            self._exchange()
        else:
            self._watch.have_read()

    def _exchange(self) -> None:
        """Write, then read. Not renamed into place: half a line is skipped and read whole the next time."""
        self._write(self._tick())
        for rank in self._watch.watched():
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
                self._watch.hear(rank, Beat(**json.loads((self._folder / f"{rank}.json").read_text())))
        self._watch.have_read()

    def _write(self, beat: Beat) -> None:
        (self._folder / f"{self._place.rank}.json").write_text(json.dumps(asdict(beat)) + "\n")

    def _tell(self, status: int, why: str) -> None:
        if self._place.count > 1:
            self._write(self._tick(status, why))

    def _judge(self) -> None:
        found = self._watch.verdict()
        if found is None:
            return
        status, why = found
        threading.Timer(LAST_WORDS_S, os._exit, (status,)).start()  # the last words may block on a dead file system
        line = f"error: rank {self._place.rank} ends with status {status}: {why}"
        for file in filter(None, (sys.stderr, self._stacks)):
            print(line, file=file, flush=True)
            if status == STUCK:
                faulthandler.dump_traceback(file=file, all_threads=True)
        self._tell(status, why)
        os._exit(status)


class Notice:
    """A request to stop, by SIGTERM or SIGUSR1 to any process; `reached` says at which step all of them do."""

    def __init__(self, place: Place):
        """Before `distributed.start`: with several processes JAX takes over SIGTERM, and tells the others of it."""
        self._count, self._asked, self._calls = place.count, "", 0
        self._before = {s: signal.signal(s, self._hear) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def _hear(self, number: int, frame: object) -> None:
        self._asked = signal.Signals(number).name
        if self._count > 1 and number == signal.SIGUSR1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Collective, once at the end of every step."""
        if self._count == 1:
            return bool(self._asked)
        from jax.experimental import multihost_utils  # noqa: PLC0415

        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
