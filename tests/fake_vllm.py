"""A server that speaks the routes of vLLM's that the fleet uses, and misbehaves on request."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FakeServer:
    """Answers like a vLLM server with the plugin. `trouble` names what it does wrong; `calls` is what it was asked."""

    def __init__(self, *, key="k", host="127.0.0.1", trouble="", delay_s=0.0):
        self.key, self.trouble, self.delay_s = key, trouble, delay_s
        self.served: list[str] = ["none"]
        """Labels, the last one is current."""
        self.staged = {"number": -1, "digest": ""}
        self.attested = {}
        self.calls: list[str] = []
        self.answered: list[tuple[int, ...]] = []
        """Prompts whose completions were sent, warm-up left out."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer()

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, reply = fake.reply(
                    urlsplit(self.path).path, self.headers.get("Authorization"), json.loads(body) if body else {}
                )
                if status == 0:  # hang up without a word
                    self.close_connection = True
                    return
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                if status == 500:  # as vLLM's server: it logs a traceback, then closes what may carry a request by now
                    time.sleep(0.05)
                    self.close_connection = True

        self.server = ThreadingHTTPServer((host, 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://{host}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path, authorization, body):
        if path == "/health":
            return 200, {}
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": "key"}
        self.calls.append(path)
        if path == "/weight_info":
            return 200, {"weight_version": self.served[-1]}
        if path == "/update_weights":
            if self.trouble.startswith("refuses once"):
                self.trouble = self.trouble.removeprefix("refuses once").strip()
                return 500, {"error": "chunk 0 is altered"}
            self.staged = body["update_info"]
        if path == "/resume" and self.trouble == "and drops a resume":
            self.trouble = ""
            return 0, {}
        if path == "/finish_weight_update":
            self.attested = {"number": self.staged["number"], "digest": self.staged["digest"], "rank": 0}
            self.attested |= {"bytes_read": 1, "bytes_needed": 1}
            if self.trouble == "attests another digest":
                self.trouble = ""
                self.attested["digest"] = "0" * 64
            self.served.append(body["weight_version"])
        if path == "/collective_rpc":
            return 200, {"results": [self.attested]}
        if path == "/inference/v1/generate":
            return self.generate(body)
        return 200, {}

    def generate(self, body):
        prompt, params = tuple(body["token_ids"]), body["sampling_params"]
        if prompt == (0,):
            return 200, {"choices": [self.choice(0, 0, 2)]}
        time.sleep(self.delay_s)
        trouble = self.trouble
        if trouble == "status 500":
            return 500, {"error": "engine died"}
        if trouble == "status 400":
            return 400, {"error": "prompt too long"}
        if trouble == "hangs":
            time.sleep(3.0)
        if trouble == "hangs up":
            return 0, {}
        if trouble == "not json":
            return 200, b"<html>"
        choices = [self.choice(i, params["seed"] + i, params["max_tokens"]) for i in range(params["n"])]
        last = choices[-1]
        if trouble == "a completion too few":
            choices.pop()
        elif trouble == "unpublished label":
            last["weight_versions"][0]["version"] = "7:f00d"
        elif trouble == "older label":
            last["weight_versions"][0]["version"] = self.served[1]
        elif trouble == "no label":
            last["weight_versions"] = None
        elif trouble == "a gap between spans":
            last["weight_versions"][0]["end"] -= 1
        elif trouble == "other ids beside the logprobs":
            last["logprobs"]["content"][0]["token_id"] += 1
        elif trouble == "aborted":
            last["finish_reason"] = "abort"
        if not trouble:
            self.answered.append(prompt)
        return 200, {"choices": choices}

    def choice(self, index, seed, count):
        """Tokens depend on the seed alone, as a seeded server's do."""
        tokens = [(seed * 31 + i) % 97 for i in range(count)]
        return {
            "index": index,
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": t, "logprob": -1.0} for t in tokens]},
            "weight_versions": [{"version": self.served[-1], "start": 0, "end": count}],
            "finish_reason": "length",
        }
