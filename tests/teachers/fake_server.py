"""A small OpenAI-compatible server in this process: a made-up language model, every shape of answer, faults on request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from limbeck.models.token_bytes import read_token_bytes

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


class MadeUpModel:
    """The next token depends on the last two, in a way that differs from place to place."""

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size

    def log_probs(self, ids: list[int]) -> np.ndarray:
        logits = np.random.default_rng([7, *ids[-2:]]).normal(size=self.vocabulary_size) * 3
        return logits - np.logaddexp.reduce(logits)


class FakeServer:
    """What it does is in its attributes, which a test sets; what it was asked is in `bodies` and `headers`.

    shape: "chat" or "classic". names: how tokens are told: any of "id", "bytes", "token"; in the classic shape
    "token_id" or "token". echo, prompt_logprobs: whether prompts are scored; echo_shift, written_shift: by how many places wrongly.
    faults: by number of the request, a function that is given the handler and may answer in the server's stead
    (returning True). alter: changes an answer before it is sent.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.token_bytes = read_token_bytes(tokenizer)
        self.model = MadeUpModel(len(tokenizer))
        self.shape, self.names = "chat", ("id", "bytes", "token")
        self.echo, self.prompt_logprobs, self.echo_shift, self.written_shift = False, False, 0, 0
        self.scaled_by_temperature = False
        self.most_logprobs: int | None = None
        self.faults: dict[int, Callable] = {}
        self.alter: Callable[[dict], dict] = lambda answer: answer
        self.end_after: int | None = None
        self.delay_seconds = 0.0
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.under_way, self.most_under_way = 0, 0
        self.lock = threading.Lock()
        self.url = ""

    @contextmanager
    def running(self):
        """Serve until the block ends."""
        handler = type("Handler", (_Handler,), {"owner": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def told(self, number: int) -> dict:
        piece = self.token_bytes.pieces[number] or b""
        if "id" not in self.names and not piece:
            piece = self.token_bytes.special_names[number].encode()
        parts = {"id": number, "bytes": list(piece), "token": piece.decode("utf-8", "replace")}
        return {name: parts[name] for name in ("token", "bytes", "id") if name in self.names}

    def spelled(self, number: int) -> str:
        return f"token_id:{number}" if "token_id" in self.names else self.told(number)["token"]

    def top(self, ids: list[int], k: int, temperature: float) -> list[tuple[int, float]]:
        log_probs = self.said(ids, temperature)
        k = min(k, self.most_logprobs or k)
        return [(int(one), float(log_probs[one])) for one in np.argsort(-log_probs)[:k]]

    def said(self, ids: list[int], temperature: float) -> np.ndarray:
        log_probs = self.model.log_probs(ids)
        if self.scaled_by_temperature and temperature:
            log_probs = log_probs / temperature
            log_probs = log_probs - np.logaddexp.reduce(log_probs)
        return log_probs

    def write(self, ids: list[int], body: dict) -> list[int]:
        chance = np.random.default_rng([body.get("seed") or 0, *ids])
        written: list[int] = []
        most = body.get("max_tokens", body.get("max_completion_tokens"))
        for _ in range(min(most, most if self.end_after is None else self.end_after)):
            log_probs = self.model.log_probs(ids + written)
            greedy = not body.get("temperature")
            choice = log_probs.argmax() if greedy else chance.choice(len(log_probs), p=np.exp(log_probs))
            written.append(int(choice))
        return written

    def answer(self, path: str, body: dict) -> dict:
        is_chat = path.endswith("/chat/completions")
        if is_chat:
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        else:
            ids = body["prompt"]
        written = self.write(ids, body)
        text = self.token_bytes.join(written).decode("utf-8", "replace")
        choice = {"index": 0, "finish_reason": "length" if self.end_after is None else "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        k = body.get("top_logprobs") if is_chat else body.get("logprobs")
        if k:
            choice["logprobs"] = self.logprobs(ids, written, k, body)
        if self.prompt_logprobs and body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [None] + [
                {
                    str(one): {"logprob": value, "rank": 1}
                    for one, value in self.scored(ids, place, body["prompt_logprobs"])
                }
                for place in range(1, len(ids))
            ]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written)}
        return {"choices": [choice], "usage": usage, "model": body["model"]}

    def scored(self, ids: list[int], place: int, k: int) -> list[tuple[int, float]]:
        """The top tokens at a place of the prompt, and the one that is there."""
        before = ids[: place + self.echo_shift]
        top = self.top(before, k, 1.0)
        if ids[place] not in dict(top):
            top.append((ids[place], float(self.model.log_probs(before)[ids[place]])))
        return top

    def logprobs(self, ids: list[int], written: list[int], k: int, body: dict) -> dict:
        temperature = body.get("temperature", 1.0)
        entries: list[tuple[int, float | None, list | None]] = []
        if self.echo and body.get("echo"):
            entries.append((ids[0], None, None))
            for place in range(1, len(ids)):
                top = self.scored(ids, place, k)
                entries.append((ids[place], dict(top)[ids[place]], top))
        for place, number in enumerate(written):
            before = (ids + written)[: len(ids) + place + self.written_shift]
            entries.append((number, float(self.said(before, temperature)[number]), self.top(before, k, temperature)))
        if self.shape == "chat":
            return {"content": [self.chat_entry(*entry) for entry in entries]}
        return {
            "tokens": [self.spelled(number) for number, _, _ in entries],
            "token_logprobs": [own for _, own, _ in entries],
            "top_logprobs": [
                None if top is None else {self.spelled(one): value for one, value in top} for _, _, top in entries
            ],
            "text_offset": [0] * len(entries),
        }

    def chat_entry(self, number: int, own: float | None, top: list | None) -> dict:
        listed = [self.told(one) | {"logprob": value} for one, value in top or []]
        return self.told(number) | {"logprob": own, "top_logprobs": listed}


class _Handler(BaseHTTPRequestHandler):
    owner: FakeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with owner.lock:
            number = len(owner.bodies)
            owner.bodies.append(body)
            owner.headers.append(dict(self.headers))
            owner.under_way += 1
            owner.most_under_way = max(owner.most_under_way, owner.under_way)
        try:
            time.sleep(owner.delay_seconds)
            fault = owner.faults.get(number, owner.faults.get(-1))
            if fault is None or not fault(self):
                self.send(200, owner.alter(owner.answer(self.path, body)))
        finally:
            with owner.lock:
                owner.under_way -= 1

    def send(self, status: int, answer: object, **headers: str) -> bool:
        """Answer; strings are sent as they are, all else as JSON."""
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        return True

    def log_message(self, *_):
        pass


def status(code: int, message: str = "a fault", **headers: str) -> Callable:
    """A fault: answer with this status."""
    return lambda handler: handler.send(code, {"error": {"message": message}}, **headers)


def raw(text: str) -> Callable:
    """A fault: answer 200 with this text."""
    return lambda handler: handler.send(200, text)


def truncated(handler) -> bool:
    """A fault: promise more bytes than are sent."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
    return True


def slow(seconds: float) -> Callable:
    """A fault: answer only after this time."""

    def wait(handler) -> bool:
        time.sleep(seconds)
        return False

    return wait


def trickle(seconds: float) -> Callable:
    """A fault: a byte every twentieth of a second, so that no single read is late."""

    def drip(handler) -> bool:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        try:
            for _ in range(int(seconds * 20)):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        handler.close_connection = True
        return True

    return drip


def asked(server: FakeServer) -> Counter:
    """How often each body came."""
    return Counter(json.dumps(body, sort_keys=True) for body in server.bodies)
