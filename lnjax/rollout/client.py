"""HTTP to one vLLM server: sampling and changing weights, every wait under a deadline, every reply checked."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from lnjax.errors import ConfigError
from lnjax.types import Completion, SamplingParams, WeightVersion

RESUME_S = 10.0
NEW_CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection a request: the server closes a used one after 5 s, or with a traceback in the log after it answered 500, and
a request that goes out at that moment is lost with it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerFault(Exception):
    """A server did not do what was asked; `kind` is one word for logs and counters. Callers try elsewhere."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Unattested(ServerFault):
    """It answered with tokens of weights that nobody published or that it did not attest."""

    def __init__(self, detail: str):
        super().__init__("unattested", detail)


class Client:
    """One server. Raises ServerFault for whatever goes wrong on its side."""

    def __init__(self, address: str, *, key: str):
        self.address = address
        self._http = httpx.AsyncClient(
            base_url=address,
            headers={"Authorization": f"Bearer {key}"},
            limits=NEW_CONNECTIONS,
            timeout=None,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def check_locked(self) -> None:
        """Raises ConfigError for a server off this host that obeys without the key."""
        if urlsplit(self.address).hostname in LOOPBACK:
            return
        async with httpx.AsyncClient(base_url=self.address, timeout=10.0, trust_env=False) as anyone:
            for path in ("/is_paused", "/weight_info", "/v1/models"):
                if (await anyone.get(path)).status_code != 401:
                    raise ConfigError(
                        f"{self.address}{path} answers without a bearer key, and this is not a loopback address; start the "
                        "server with launch/serve.sh, which locks every route"
                    )

    async def healthy(self, *, deadline_s: float) -> bool:
        """Whether it answers at all; False while it starts."""
        try:
            async with asyncio.timeout(deadline_s):
                return (await self._http.get("/health")).status_code == 200
        except (httpx.HTTPError, TimeoutError):
            return False

    async def serving(self, *, deadline_s: float) -> str:
        """The label of the weights that its engine (not just its front) says it serves."""
        reply = await self._call("GET", "/weight_info", deadline_s=deadline_s)
        return str(reply.get("weight_version"))

    async def load(self, version: WeightVersion, *, deadline_s: float) -> list[dict[str, Any]]:
        """Change weights while requests wait; returns what every rank attests. The old weights stay where it is refused.

        Requests in flight keep their tokens; their KV is computed anew, so tokens after the change match the new weights.
        """
        async with _deadline(deadline_s, f"change to version {version.number}"):
            await self._call("POST", "/pause?mode=keep")
            try:
                await self._call("POST", "/init_weight_transfer_engine", {"init_info": {}})
                await self._call("POST", "/start_weight_update")
                info = {"number": version.number, "digest": version.digest, "path": version.path}
                await self._call("POST", "/update_weights", {"update_info": info})
                await self._call("POST", "/finish_weight_update", {"weight_version": version.label})
                reply = await self._call("POST", "/collective_rpc", {"method": "lnjax_attest"})
            except BaseException as error:  # also the deadline above
                try:
                    await self._call("POST", "/resume", deadline_s=RESUME_S)
                except ServerFault as then:  # the first fault decides what is done
                    if isinstance(error, ServerFault):
                        raise ServerFault(error.kind, f"{error.detail}; then {then}") from error
                raise
            await self._call("POST", "/resume", deadline_s=RESUME_S)
        ranks = reply.get("results") or []
        for rank in ranks:
            if (rank.get("number"), rank.get("digest")) != (version.number, version.digest):
                raise Unattested(
                    f"after its change to version {version.number} ({version.digest[:16]}…) a rank attests "
                    f"{rank.get('number')} ({str(rank.get('digest'))[:16]}…)"
                )
        if not ranks:
            raise Unattested("no rank attests anything")
        return ranks

    async def generate(
        self, token_ids: tuple[int, ...], *, num_samples: int, sampling: SamplingParams, seed: int, deadline_s: float
    ) -> list["Reply"]:
        """The completions of one prompt; sample i is drawn with seed + i."""
        params: dict[str, Any] = {
            "n": num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 0,
            "seed": seed,
        }
        body = {"token_ids": list(token_ids), "sampling_params": params, "model": "policy"}
        async with _deadline(deadline_s, f"{num_samples} completions of one prompt"):
            reply = await self._call("POST", "/inference/v1/generate", body)
        choices = sorted(reply.get("choices") or [], key=lambda c: c["index"])
        if [c["index"] for c in choices] != list(range(num_samples)):
            raise ServerFault("reply", f"{len(choices)} completions, expected {num_samples}")
        return [_reply(c) for c in choices]

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float | None = None
    ) -> dict[str, Any]:
        async with _deadline(deadline_s, path) if deadline_s else contextlib.nullcontext():
            try:
                reply = await self._http.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise ServerFault("connection", f"{path}: {type(error).__name__} {error}") from error
        if reply.status_code != 200:
            raise ServerFault("status", f"{path}: {reply.status_code} {' '.join(reply.text.split())[:500]}")
        try:
            return reply.json() if reply.content else {}
        except ValueError as error:
            raise ServerFault("reply", f"{path}: not JSON ({error})") from error


class Reply:
    """A completion with the labels of the weights that made it."""

    def __init__(self, token_ids: list[int], logprobs: list[float], spans: list[tuple[str, int]], *, finished: bool):
        self.token_ids, self.logprobs, self.spans, self.finished = token_ids, logprobs, spans, finished

    def completion(self, numbers: Mapping[str, int], *, oldest: int) -> Completion:
        """With version numbers for labels. Raises Unattested for a label not in `numbers`, or older than `oldest`."""
        versions: list[int] = []
        for label, end in self.spans:
            where = f"tokens {len(versions)} to {end} are of weights {label[:40]!r}"
            if label not in numbers:
                raise Unattested(f"{where}, which it never attested")
            if numbers[label] < oldest:
                raise Unattested(f"{where}, older than version {oldest}, which it served when asked")
            versions += [numbers[label]] * (end - len(versions))
        return Completion(tuple(self.token_ids), tuple(self.logprobs), tuple(versions), self.finished)


def _reply(choice: Mapping[str, Any]) -> Reply:
    try:
        tokens = [int(t) for t in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        logprobs = [float(x["logprob"]) for x in content]
        spans = [(str(s["version"]), int(s["start"]), int(s["end"])) for s in choice["weight_versions"] or []]
        reason = choice["finish_reason"]
        echoed = [int(x["token_id"]) for x in content]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerFault("reply", f"a completion without ids, logprobs or versions ({error!r})") from error
    if reason not in ("stop", "length"):
        raise ServerFault("reply", f"finish_reason {reason!r}")
    if echoed != tokens or not tokens:
        raise ServerFault("reply", f"{len(tokens)} tokens, and the ids beside their logprobs are others")
    edges = [0] + [end for _, _, end in spans]
    if [start for _, start, _ in spans] != edges[:-1] or edges[-1] != len(tokens):
        raise Unattested(f"version spans {spans} do not cover its {len(tokens)} tokens")
    return Reply(tokens, logprobs, [(label, end) for label, _, end in spans], finished=reason == "stop")


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str):
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ServerFault("deadline", f"{what}: no answer within {seconds:g} s") from error
