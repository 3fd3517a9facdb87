"""One POST to a server that rewards hang on: its body, or in words why there is none. Imports no jax."""

import os
from typing import Any

import httpx

from lnjax.errors import ConfigError

MAX_REPLY_BYTES = 1 << 20
MAX_DETAIL = 200
"""Characters of a refusal that are shown."""
REFUSED = "refused with status"
"""Begins what the same request would only get again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""Before the second try and, doubled from try to try, at most."""


def check_address(address: str, *, key: str) -> str:
    """Without a slash at its end. Raises ConfigError for what is no address, naming the config's key."""
    try:
        httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{key}={address}: {error}; expected http://host:port") from error
    return address.rstrip("/")


def connect(*, key: str, concurrency: int) -> httpx.AsyncClient:
    """With the bearer key in the environment variable `key`, where it is set. Callers bring a deadline."""
    headers = {"Authorization": f"Bearer {os.environ[key]}"} if os.environ.get(key) else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False)


async def post(http: httpx.AsyncClient, url: str, body: Any) -> bytes | str:
    """One try. A str says what went wrong and begins with REFUSED where another try is in vain."""
    try:
        async with http.stream("POST", url, json=body) as reply:
            data = b""
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    return f"a reply of more than {MAX_REPLY_BYTES} bytes"
            if reply.status_code == 200:
                return data
            if reply.status_code >= 500 or reply.status_code in (408, 429):
                return f"status {reply.status_code}"
            detail = " ".join(data.decode("utf-8", "replace").split())[:MAX_DETAIL]
            return f"{REFUSED} {reply.status_code}: {detail}"
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}".strip()
