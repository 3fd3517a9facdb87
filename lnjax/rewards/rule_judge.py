"""A judge without a model, on loopback: answers by comparing the last numbers. For proxies of large runs, and for tests."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RULE = "rule"
"""The address in a config that starts this judge."""
SECTION = "<{name}>\n(.*?)\n</{name}>"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def judge(content: str) -> str:
    """YES when the last number of the student's answer is the reference's, or both texts are equal."""
    found = []
    for name in ("reference", "student"):
        section = re.search(SECTION.format(name=name), content, re.DOTALL)
        text = section[1].strip() if section else ""
        numbers = NUMBER.findall(text)
        found.append(float(numbers[-1]) if numbers else text)
    return "YES" if found[0] == found[1] else "NO"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # one packet a reply: on a connection that stays open a second one waits for a delayed ACK

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": judge(body["messages"][-1]["content"])}
        reply = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""


class RuleJudge:
    """The server, in threads of this process."""

    def __init__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="rule judge", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
