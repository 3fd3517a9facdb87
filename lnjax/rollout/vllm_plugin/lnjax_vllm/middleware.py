"""A bearer key on every route but /health. vLLM's own check leaves the weight routes open."""

import hmac
import os
from typing import Any

KEY = "LNJAX_SERVER_KEY"
OPEN = ("/health",)


class RequireKey:
    """ASGI middleware; the key comes from the environment, so that no process list shows it."""

    def __init__(self, app: Any):
        self._app, self._expected = app, f"Bearer {os.environ[KEY]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b'{"error": "missing or wrong bearer key"}'})
                return
        await self._app(scope, receive, send)
