"""The server engine, against a small server that can be made to fail, and against `transformers serve`."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from peft import PeftModel

from resa_hf.errors import DataError, JobError
from resa_hf.evaluation import server
from resa_hf.evaluation.adapter_check import check_served_adapter
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.evaluation.server import ServerEngine
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import load_tiny_base, tiny_path
from resa_hf.tiny.task import make_rows

PROMPTS = [f"problem {number}" for number in range(6)]
SAMPLED = Sampling(samples=3, temperature=0.6, top_p=0.9, max_new_tokens=9, seed=5)


class Stub:
    """Answers with what it was asked; `fault(number)` decides how the request of that number fails, if it does."""

    def __init__(self):
        self.requests = []
        self.tokens = []
        self.fault = lambda number: None
        self.side_by_side = self.most = 0
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.requests.append(body)
                    stub.tokens.append(self.headers.get("Authorization"))
                    fault = stub.fault(len(stub.requests) - 1)
                    stub.side_by_side += 1
                    stub.most = max(stub.most, stub.side_by_side)
                time.sleep(0.01)
                with lock:
                    stub.side_by_side -= 1
                if fault == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                text = f"{body['prompt']} {body['seed']}"
                choice = {"text": text, "finish_reason": "length" if body["prompt"].endswith("3") else "stop"}
                reply = json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()
                self.send_response(fault or 200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(server, "_FIRST_WAIT", 0.001)
    found = Stub()
    thread = threading.Thread(target=found.http.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.http.shutdown()
    thread.join()
    found.http.server_close()


def test_requests_and_their_order(stub, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("RESA_API_KEY", raising=False)
    found = ServerEngine(stub.url, "mine", tiny_tokenizer, concurrency=4).generate(PROMPTS, SAMPLED, progress=False)
    assert len(stub.requests) == 18 and 1 < stub.most <= 4
    assert [[c.text.rpartition(" ")[0] for c in row] for row in found] == [[prompt] * 3 for prompt in PROMPTS]
    assert [[c.truncated for c in row] for row in found] == [[prompt.endswith("3")] * 3 for prompt in PROMPTS]
    assert {c.length for row in found for c in row} == {7}
    seeds = [body.pop("seed") for body in stub.requests]
    assert len(set(seeds)) == 18 and all(0 <= seed < 2**31 for seed in seeds)
    for body in stub.requests:
        assert body.pop("prompt") in PROMPTS
        assert body == {"model": "mine", "max_tokens": 9, "temperature": 0.6, "top_p": 0.9}
    assert set(stub.tokens) == {None}
    # The seeds belong to the samples, not to the order in which threads come.
    assert ServerEngine(stub.url, "mine", tiny_tokenizer, concurrency=1).generate(PROMPTS, SAMPLED) == found


def test_dropped_connections_and_busy_servers_are_asked_again(stub, tiny_tokenizer):
    engine = ServerEngine(stub.url, "mine", tiny_tokenizer)
    expected = engine.generate(PROMPTS, SAMPLED, progress=False)
    stub.requests.clear()
    faults = random.Random(0).choices([None, "drop", 429, 500, 503], weights=[15, 2, 1, 1, 1], k=1000)
    stub.fault = faults.__getitem__
    assert engine.generate(PROMPTS, SAMPLED, progress=False) == expected
    assert len(stub.requests) == 18 + sum(fault is not None for fault in faults[: len(stub.requests)])


def test_what_a_server_answered_before_it_died_is_kept(stub, tiny_tokenizer, tmp_path):
    engine = ServerEngine(stub.url, "mine", tiny_tokenizer, concurrency=3)
    expected = engine.generate(PROMPTS, SAMPLED, progress=False)
    store = tmp_path / "answers.jsonl"
    stub.requests.clear()
    stub.fault = lambda number: "drop" if number >= 10 else None
    with pytest.raises(JobError, match=r"127.0.0.1:\d+ did not answer a request for 'mine' in 8 attempts .*is kept"):
        engine.generate(PROMPTS, SAMPLED, store=store, progress=False)
    assert len(store.read_text().splitlines()) == 11
    stub.requests.clear()
    stub.fault = lambda number: None
    assert engine.generate(PROMPTS, SAMPLED, store=store, progress=False) == expected
    assert len(stub.requests) == 8
    with pytest.raises(DataError, match="engine 'mine', now 'other'"):
        ServerEngine(stub.url, "other", tiny_tokenizer).generate(PROMPTS, SAMPLED, store=store)


def test_stored_answers_of_another_served_model_with_the_same_display_name_are_refused(stub, tiny_tokenizer, tmp_path):
    store = tmp_path / "answers.jsonl"
    ServerEngine(stub.url, "v1", tiny_tokenizer, name="mine").generate(PROMPTS, SAMPLED, store=store)
    asked = len(stub.requests)
    with pytest.raises(DataError, match="of another evaluation: model 'v1', now 'v2'. Delete"):
        ServerEngine(stub.url, "v2", tiny_tokenizer, name="mine").generate(PROMPTS, SAMPLED, store=store)
    assert len(stub.requests) == asked


def test_a_refusal_is_told_at_once_and_the_key_is_not(stub, tiny_tokenizer, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RESA_API_KEY", "sk-secret")
    stub.fault = lambda number: 404
    engine = ServerEngine(stub.url, "mine", tiny_tokenizer, concurrency=1)
    with pytest.raises(JobError, match="refused a request for 'mine', or is no such server: status 404") as error:
        engine.generate(PROMPTS, SAMPLED, store=tmp_path / "answers.jsonl")
    assert len(stub.requests) <= 2 and set(stub.tokens) == {"Bearer sk-secret"}
    seen = capfd.readouterr()
    assert "sk-secret" not in f"{error.value} {seen.out} {seen.err} {(tmp_path / 'answers.jsonl').read_text()}"


def test_no_server_at_all(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(server, "_FIRST_WAIT", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        engine = ServerEngine(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "mine", tiny_tokenizer)
        with pytest.raises(JobError, match="ConnectError"):
            engine.generate(PROMPTS[:1], Sampling())


def test_a_bos_is_not_doubled(stub, tiny_tokenizer):
    class WithBos:
        """Writes a BOS before a text, as Llama's tokenizer and DeepSeek-R1's do."""

        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text, add_special_tokens=True):
            ids = [1 if piece == "<s>" else 2 for piece in text.replace("<s>", "<s> ").split()]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    ServerEngine(stub.url, "mine", WithBos(), concurrency=1).generate(["<s>chat", "plain"], Sampling())
    assert [body["prompt"] for body in stub.requests] == ["chat", "plain"]


@contextlib.contextmanager
def transformers_serve(folder, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "from transformers.cli.transformers import main; main()"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "serve", *flags], cwd=folder, stdout=file, stderr=file, env={**os.environ}
        )
    try:
        for _ in range(240):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.long
def test_greedy_answers_of_an_adapter_are_those_of_transformers_serve(tiny_tokenizer, tmp_path):
    pytest.importorskip("fastapi")
    rows = make_rows(24, seed=17)
    prompts = [evaluation_prompt(row["problem"], template="chat", tokenizer=tiny_tokenizer) for row in rows]
    greedy = Sampling(temperature=0, max_new_tokens=64)
    model = PeftModel.from_pretrained(load_tiny_base(torch.bfloat16), tiny_path("source"), adapter_name="source")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # the source's greedy answers are nearly all the base's
                parameter.mul_(4)
    shutil.copytree(tiny_path("base"), tmp_path / "base")
    # `transformers serve` loads an adapter from a folder that has its base's files as well.
    shutil.copytree(tiny_path("base"), tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned", selected_adapters=["source"])
    for file in (tmp_path / "tuned" / "source").iterdir():
        file.rename(tmp_path / "tuned" / file.name)
    with transformers_serve(tmp_path, tmp_path / "log") as url:
        served = {
            name: ServerEngine(url, str(tmp_path / name), tiny_tokenizer, concurrency=4) for name in ("base", "tuned")
        }
        found = {name: engine.generate(prompts, greedy, progress=False) for name, engine in served.items()}
        check_served_adapter(served["base"], served["tuned"], prompts[:8])
    for name, adapter in (("base", False), ("tuned", "source")):
        expected = TransformersEngine(model, tiny_tokenizer, adapter=adapter).generate(prompts, greedy)
        for i in range(len(prompts)):
            (ours,), (theirs,) = expected[i], found[name][i]
            assert (ours.text, ours.length, ours.truncated) == (theirs.text, theirs.length, theirs.truncated)
            assert tiny_tokenizer(theirs.text)["input_ids"] == list(
                ours.tokens[: len(ours.tokens) - (not ours.truncated)]
            )
    assert found["base"] != found["tuned"]
