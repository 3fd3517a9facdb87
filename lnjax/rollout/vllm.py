"""The rollout engine made of vLLM servers: every policy version published, loaded, attested; every token accounted for.

One event loop in a thread of its own talks to the servers, so samples go on while the learner updates and weights change
under them. A server that dies, hangs, answers nonsense or serves anything but what was published loses its requests to the
others and is started again; no prompt is given up and none is answered twice.
"""

import asyncio
import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lnjax.errors import CheckpointError, DeadlineExceeded, RolloutError
from lnjax.rollout.client import Client, ServerFault, Unattested
from lnjax.rollout.server import LocalServer, model_folder, new_key, write_model
from lnjax.schema import VllmConfig
from lnjax.types import Completion, Prompt, SamplingParams, WeightVersion

PROBE_EVERY_S = 2.0
START_EVERY_S = 0.5
BACK_OFF_S = 1.0
WARM_TOKENS = 2
MAX_FAILED_STARTS = 3
"""In a row, without serving once."""


class Publishes(Protocol):
    """What the engine needs of lnjax.checkpoint.publish.Publisher."""

    root: Path
    stats: Any

    @property
    def num_bytes(self) -> int: ...
    def publish(self, number: int, params: Any, *, troubled: Callable[[str], None]) -> WeightVersion: ...
    def repair(self, version: WeightVersion) -> list[str]: ...


class Member:
    """One server of the fleet."""

    def __init__(self, index: int, address: str = ""):
        self.index, self.address = index, address
        self.process: LocalServer | None = None
        self.client: Client | None = None
        self.ready = asyncio.Event()
        self.dropped = ""
        """Why it takes no further part."""
        self.starts, self.failed_starts, self.was_ready = 0, 0, False
        self.requests: set[asyncio.Task] = set()
        self.swapping = asyncio.Lock()
        self.label = ""
        """Of the version it attested last."""
        self.numbers: dict[str, int] = {}
        """{label: number} of what this process of it attested."""
        self.failed: asyncio.Event = asyncio.Event()
        """Set by whoever sees it misbehave; the watcher ends or resynchronises it."""


class VllmEngine:
    """Implements RolloutEngine."""

    def __init__(
        self,
        c: VllmConfig,
        *,
        publisher: Publishes,
        model: Mapping[str, Any],
        run_dir: Path,
        note: Callable[[str], None],
    ):
        """`model`: config.json of the policy. Servers start at once, in the background."""
        self._c, self._publisher, self._run_dir, self._note = c, publisher, run_dir, note
        self._key = new_key()
        self._model = model_folder(publisher.root)
        write_model(self._model, config=model)
        self._current: WeightVersion | None = None
        self._faults = open(run_dir / "faults.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._totals = {"seconds": 0.0, "swaps": 0, "bytes_read": 0, "bytes_needed": 0, "attested": 0}
        self._counts: dict[str, int] = {"requests": 0, "resent": 0, "refused_tokens": 0, "restarts": 0}
        self._attestations: dict[int, list[dict[str, Any]]] = {}
        """The last of every server, by rank."""
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._members = [Member(i, address) for i, address in enumerate(c.addresses)]
        self._members += [Member(i) for i in range(len(c.addresses), len(c.addresses) + c.num_servers)]
        self._watchers = [self._spawn(self._watch(m)) for m in self._members]

    # RolloutEngine.

    def load_weights(self, number: int, params: Any) -> WeightVersion:
        """Publish, then change every ready server; the others load it before they answer. Raises when none serves it."""
        start = time.monotonic()
        version = self._publisher.publish(number, params, troubled=partial(self._record, "publisher", "disk"))
        if self._current != version:
            self._current = version
            self._run(self._swap_all(version))
            self._totals["swaps"] += 1
            self._totals["seconds"] += time.monotonic() - start
        return version

    def generate(
        self, prompts: list[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """P x G completions. Raises RolloutError when no server is left, or for a request that no server takes."""
        if self._current is None:
            raise RolloutError("engine.generate was called before load_weights; load a weight version first")
        return self._run(self._generate_all(prompts, num_samples, sampling, seed))

    def report(self) -> dict[str, Any]:
        """Sections `sync` and `fleet`."""
        stats = self._publisher.stats
        sync = {
            **self._totals,
            "publish_seconds": stats.seconds,
            "version_bytes": self._publisher.num_bytes,
            "bytes_written": stats.bytes_written,
            "changed_share": stats.bytes_written / max(1, stats.num_bytes),
            "repaired": stats.repaired,
            "last": [{"server": i, **rank} for i, ranks in sorted(self._attestations.items()) for rank in ranks],
        }
        return {"sync": sync, "fleet": dict(self._counts)}

    def close(self) -> None:
        """End every server that was started here."""
        if self._closing:
            return
        self._closing = True
        self._run(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._faults.close()

    # Plumbing.

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        async def start() -> asyncio.Task:
            return asyncio.ensure_future(work)

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _fault(self, member: Member, kind: str, detail: str) -> None:
        self._record(f"server {member.index}", kind, detail)

    def _record(self, who: str, kind: str, detail: str) -> None:
        """One line a fault, for people and for tests. Any thread."""
        line = {"time": round(time.time(), 3), "who": who, "kind": kind, "detail": " ".join(detail.split())}
        self._faults.write(json.dumps(line) + "\n")
        self._faults.flush()
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._note(f"{who}: {kind}: {line['detail'][:300]}")

    # The life of a server.

    async def _watch(self, member: Member) -> None:
        """Start it, bring it to the current version, probe it, and begin again when it fails."""
        last = ""
        while not self._closing and not member.dropped:
            try:
                member.was_ready = False
                await self._start(member)
                await self._catch_up(member)
                member.was_ready = True
                member.ready.set()
                await self._probe_until_failure(member)
            except ServerFault as fault:
                self._fault(member, fault.kind, fault.detail)
                last = f"{fault.kind}: {fault.detail}"
            member.failed_starts = 0 if member.was_ready else member.failed_starts + 1
            await self._take_down(member)
            await asyncio.sleep(BACK_OFF_S)
            if member.starts > self._c.max_restarts or member.failed_starts >= MAX_FAILED_STARTS:
                member.dropped = f"server {member.index} was started {member.starts} times; {last}"
                self._fault(member, "dropped", member.dropped)

    async def _start(self, member: Member) -> None:
        member.starts += 1
        self._counts["restarts"] += member.starts > 1
        member.failed.clear()
        member.numbers, member.label = {}, ""
        if not self._c.addresses or member.index >= len(self._c.addresses):
            member.process = LocalServer(
                self._c,
                index=member.index - len(self._c.addresses),
                model=self._model,
                root=self._publisher.root,
                key=self._key,
                log=self._run_dir / "servers" / f"{member.index}.log",
            )
            member.address = member.process.address
        client = member.client = Client(member.address, key=self._key)
        start = time.monotonic()
        while not await client.healthy(deadline_s=self._c.probe_deadline_s):
            if member.process and (ended := member.process.ended()):
                raise ServerFault("died", f"while starting: {ended}")
            if time.monotonic() - start > self._c.start_deadline_s:
                raise ServerFault("deadline", f"not healthy {self._c.start_deadline_s:g} s after its start")
            await asyncio.sleep(START_EVERY_S)
        await client.check_locked()
        left = max(1.0, self._c.start_deadline_s - (time.monotonic() - start))
        warm = SamplingParams(1.0, 1.0, 0, WARM_TOKENS, ())
        await client.generate((0,), num_samples=1, sampling=warm, seed=0, deadline_s=left)  # compiles what it compiles

    async def _catch_up(self, member: Member) -> None:
        while self._current is None:
            if member.process and (ended := member.process.ended()):
                raise ServerFault("died", ended)
            await asyncio.sleep(START_EVERY_S)
        async with member.swapping:
            while member.label != self._current.label:  # it may change while we load
                await self._load(member, self._current)

    async def _probe_until_failure(self, member: Member) -> None:
        """Returns or raises when the server must be started anew; mends one that lost its weights."""
        assert member.client
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.failed.wait(), PROBE_EVERY_S)
            if member.process and (ended := member.process.ended()):
                raise ServerFault("died", ended)
            if member.failed.is_set():
                return
            if member.swapping.locked():
                continue  # that has a deadline of its own
            label = await member.client.serving(deadline_s=self._c.probe_deadline_s)
            if label != member.label and not member.swapping.locked():
                raise ServerFault(
                    "unattested", f"it says that it serves {label[:40]!r}, it attested {member.label[:40]!r}"
                )

    async def _take_down(self, member: Member) -> None:
        """Its requests go to others; its processes end."""
        member.ready.clear()
        for task in list(member.requests):
            task.cancel()
        if member.process:
            process, member.process = member.process, None
            await asyncio.to_thread(process.stop)
        async with member.swapping:  # a change under way hears that its server is gone, or meets its deadline
            if member.client:
                await member.client.close()
                member.client = None

    async def _end_all(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(self._take_down(m) for m in self._members))

    # Weights.

    async def _swap_all(self, version: WeightVersion) -> None:
        async def swap(member: Member) -> None:
            async with member.swapping:
                if not member.ready.is_set() or member.label == version.label:
                    return
                try:
                    await self._load(member, version)
                except ServerFault as fault:
                    self._fault(member, fault.kind, fault.detail)
                    member.ready.clear()
                    member.failed.set()

        if self._c.swap == "rolling":
            for member in self._members:
                await swap(member)
        else:
            await asyncio.gather(*(swap(m) for m in self._members))
        await self._some_ready()

    async def _load(self, member: Member, version: WeightVersion) -> None:
        """Change one server; a version that was damaged on disk is repaired and tried once more."""
        assert member.client
        try:
            ranks = await member.client.load(version, deadline_s=self._c.swap_deadline_s)
        except ServerFault as fault:
            if fault.kind != "status":
                raise
            self._fault(member, "refused", fault.detail)
            try:
                mended = await asyncio.to_thread(self._publisher.repair, version)
            except CheckpointError as error:
                raise ServerFault("version", str(error)) from error
            self._note(f"version {version.number}: wrote {', '.join(mended) or 'nothing'} again")
            ranks = await member.client.load(version, deadline_s=self._c.swap_deadline_s)
        member.label = version.label
        member.numbers[version.label] = version.number
        self._totals["attested"] += 1
        self._totals["bytes_read"] += sum(r["bytes_read"] for r in ranks)
        self._totals["bytes_needed"] += sum(r["bytes_needed"] for r in ranks)
        self._attestations[member.index] = ranks

    async def _some_ready(self) -> list[Member]:
        """Servers to send to. Waits for a start; raises when there is nothing to wait for."""
        start = time.monotonic()
        while True:
            if ready := [m for m in self._members if m.ready.is_set()]:
                return ready
            for watcher in self._watchers:
                failure = watcher.exception() if watcher.done() and not watcher.cancelled() else None
                if failure:
                    raise failure
            if all(m.dropped for m in self._members):
                raise RolloutError(
                    f"no server is left: {'; '.join(m.dropped for m in self._members)}; see faults.jsonl"
                )
            if time.monotonic() - start > self._c.start_deadline_s * 2:
                raise DeadlineExceeded(
                    f"no server became ready within {self._c.start_deadline_s * 2:g} s; see {self._run_dir}/servers/*.log"
                )
            await asyncio.sleep(0.05)

    # Samples.

    async def _generate_all(
        self, prompts: list[Prompt], num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        tasks = [asyncio.create_task(self._generate(p, num_samples, sampling, seed)) for p in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(
        self, prompt: Prompt, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[Completion]:
        """One prompt's group, from one server, however many have to be asked."""
        if len(prompt.token_ids) + sampling.max_new_tokens > self._c.max_len:
            raise RolloutError(
                f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {sampling.max_new_tokens} new ones exceed "
                f"engine.max_len={self._c.max_len}; raise it or shorten the prompt"
            )
        number = zlib.crc32(f"{seed} {prompt.id}".encode()) << 16  # room for the sample's index
        while True:
            member = min(await self._some_ready(), key=lambda m: len(m.requests))
            assert member.client
            numbers, client, oldest = member.numbers, member.client, member.numbers[member.label]
            request = asyncio.create_task(
                client.generate(
                    prompt.token_ids,
                    num_samples=num_samples,
                    sampling=sampling,
                    seed=number,
                    deadline_s=self._c.request_deadline_s,
                )
            )
            member.requests.add(request)
            self._counts["requests"] += 1
            replies = []
            try:
                await asyncio.wait([request])
                if not request.cancelled():
                    replies = request.result()
                    if member.swapping.locked():  # it may have resumed before we heard what it attests
                        async with member.swapping:
                            pass
                    return [r.completion(numbers, oldest=oldest) for r in replies]
            except Unattested as fault:
                self._counts["refused_tokens"] += sum(len(r.token_ids) for r in replies)
                self._fault(member, fault.kind, fault.detail)
                member.failed.set()
            except ServerFault as fault:
                if fault.kind == "status" and " 400 " in fault.detail:
                    raise RolloutError(f"prompt {prompt.id}: no server takes it: {fault.detail}") from fault
                self._fault(member, fault.kind, fault.detail)
                member.failed.set()
            finally:
                request.cancel()
                member.requests.discard(request)
            member.ready.clear()
            self._counts["resent"] += 1
