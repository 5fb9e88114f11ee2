"""The explorer by gradio_client and plain HTTP, on a real server: what is documented works; visitors do not meet."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from adapter_files import save_adapter
from explore_values import BAD, arguments, is_for_people
from explorer_server import APP, ExplorerServer
from hub_server import HubServer

from resa_hf.tiny import tiny_path

pytest.importorskip("gradio_client", reason="the extra `space` is not installed")
from explorer_load import PROBLEMS, at_once, connect, megabytes, requests, seconds_to_first_token, write_sae
from gradio_client import Client

pytestmark = pytest.mark.slow
pytest_plugins = ("publishable",)

README = APP.with_name("README.md")
ENDPOINTS = {"/solve", "/accuracy", "/look", "/latent", "/change", "/layers", "/report"}


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sae(tmp_path_factory.mktemp("explorer") / "sae")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def server(
    tiny_run: Path, sae: str, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExplorerServer]:
    folder = tmp_path_factory.mktemp("server")
    with ExplorerServer([tiny_run], folder / "log.txt", **hub.env(folder / "home"), RESA_SAES=sae) as server:
        connect(server.url).predict(api_name="/solve")  # until then torch is imported
        yield server


@pytest.fixture(scope="module")
def client(server: ExplorerServer) -> Client:
    return connect(server.url)


@pytest.fixture(autouse=True)
def _nothing_went_wrong(server: ExplorerServer) -> Iterator[None]:
    before = len(server.log)
    yield
    assert server.is_alive
    assert "An endpoint failed" not in server.log[before:]


def test_the_documented_endpoints_need_only_what_has_no_default(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert named.keys() == ENDPOINTS
    assert set(re.findall(r"^\| `(/\w+)` \|", README.read_text(), re.MULTILINE)) == ENDPOINTS
    for name, endpoint in named.items():
        required = {p["parameter_name"] for p in endpoint["parameters"] if not p["parameter_has_default"]}
        assert required == ({"latent"} if name in ("/latent", "/change") else set()), name
        found = client.predict(**dict.fromkeys(required, 3), api_name=name)
        assert "<" in (found if isinstance(found, str) else found[0])


def test_the_snippets_of_the_readme_run(server: ExplorerServer, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        assert '"me/resa-explorer"' in snippet
        exec(snippet.replace("me/resa-explorer", server.url), {})
    told = capsys.readouterr().out
    assert "4 True\n0 of 10 problems answered.\n" in told and "(95% interval" in told.splitlines()[-1]


def test_the_first_token_comes_soon(client: Client) -> None:
    # On a quiet machine a tenth of a second (benchmarks/RESULTS.md); here others may be at work.
    assert sorted(seconds_to_first_token(client, seed) for seed in range(5))[2] < 3


def test_cancelling_frees_the_place_in_the_queue(server: ExplorerServer) -> None:
    visitor = connect(server.url)
    longest = {"problem": f"8{'+7*1-8' * 20} mod 10", "api_name": "/solve"}
    for _ in range(6):  # more than are solved at once
        job = visitor.submit(**longest)
        step = next(iter(job))
        assert step[2]["base"]["tokens"] < 200
        job.cancel()
        with pytest.raises((CancelledError, KeyError)):
            job.result(timeout=30)
    started = time.monotonic()
    assert visitor.predict(problem=PROBLEMS[0], api_name="/solve")[2]["tuned"]["finished"]
    assert time.monotonic() - started < 10


@pytest.mark.long
def test_twenty_visitors_at_once_get_what_each_gets_alone(server: ExplorerServer, client: Client) -> None:
    visits: list[dict[str, Any]] = [
        {"api_name": "/solve", "problem": PROBLEMS[n % 5], "seed": n, "strength": round(n / 10 - 1, 1)}
        for n in range(20)
    ]
    alone = [client.predict(**visit) for visit in visits]
    assert len({json.dumps(answer) for answer in alone}) > 10
    assert at_once(server.url, visits) == alone


def ask(server: ExplorerServer, name: str, data: list[Any]) -> tuple[str, str]:
    """By plain HTTP, which sends what gradio_client would not: `complete` or `error`, and what was told."""
    url = f"{server.url}/gradio_api/call/{name}"
    begun = httpx.post(url, content=json.dumps({"data": data}), headers={"Content-Type": "application/json"})
    assert begun.status_code == 200, begun.text
    *_, last = httpx.get(f"{url}/{begun.json()['event_id']}", timeout=60).text.strip().split("\n\n")
    event, _, told = last.partition("\n")
    return event.removeprefix("event: "), told.removeprefix("data: ")


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.long) for n in ("solve", "accuracy", "look", "change")), "latent", "report"],
)
def test_bad_values_are_refused_in_words(server: ExplorerServer, sae: str, name: str) -> None:
    """A third of all; `test_explore_endpoints.py` has them all, without the server."""
    given = arguments(name, sae)
    pairs = [(key, value) for place, key in enumerate(given) for value in BAD[place % 3 :: 3]]

    def told(pair: tuple[str, Any]) -> tuple[str, str]:
        return ask(server, name, list((given | dict([pair])).values()))

    with ThreadPoolExecutor(4) as pool:
        for pair, (event, text) in zip(pairs, pool.map(told, pairs), strict=True):
            if event == "error":
                assert is_for_people(json.loads(text)["error"].replace(sae, "SAE")), (pair, text)
            else:
                html = "".join(part for part in json.loads(text) if isinstance(part, str))
                assert event == "complete" and "<script" not in html and "<img src=x" not in html


def test_repositories_that_cannot_be_had(
    server: ExplorerServer, hub: HubServer, make_model: Any, tmp_path: Path
) -> None:
    base = {path.name: path.read_bytes() for path in tiny_path("base").iterdir()}
    hub.create_repo("someone/gated", files=base, gated=True)
    hub.create_repo("someone/private", files=base, private=True)
    hub.create_repo("someone/pickle", files={"config.json": base["config.json"], "pytorch_model.bin": b"\x80\x04."})
    hub.create_repo("someone/other", folder=save_adapter(tmp_path / "adapter", make_model("qwen2")))
    deep = json.loads(base["config.json"]) | {"num_hidden_layers": 10**6}
    hub.create_repo("someone/deep", files=base | {"config.json": json.dumps(deep)})
    wanted = {
        "someone/nothing": "There is no public repository",
        "someone/private": "There is no public repository",
        "someone/gated": "is gated on the Hub",
        "someone/pickle": "safetensors",
        "someone/other": "is an adapter: choose it as one",
        "someone/deep": "1,000,000 layers",
    }
    for name, words in wanted.items():
        event, told = ask(server, "solve", list((arguments("solve", "") | {"model": name}).values()))
        assert event == "error" and words in told and is_for_people(json.loads(told)["error"])
    for name, words in (wanted | {"someone/other": "does not fit 'tiny reasoner'"}).items():
        if name in ("someone/pickle", "someone/deep"):
            words = "holds none of these: adapter_config.json"
        event, told = ask(server, "solve", list((arguments("solve", "") | {"adapters": [name]}).values()))
        assert event == "error" and words in told and is_for_people(json.loads(told)["error"]), told


def fetch(server: ExplorerServer, path: str) -> tuple[int, bytes]:
    """Without tidying the path up, as clients do."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_no_file_is_served(server: ExplorerServer, tiny_run: Path, hub: HubServer) -> None:
    files = ["/etc/passwd", str(APP), str(tiny_run / "report.json"), str(Path.home() / ".cache/huggingface/token")]
    files += ["/proc/self/environ", str(APP.relative_to(Path.cwd())), "README.md", "file:///etc/passwd"]
    climbing = ["../" * 9 + "etc/passwd", "..%2f" * 9 + "etc%2fpasswd", "%2fetc%2fpasswd", "%252fetc%252fpasswd"]
    paths = [f"/gradio_api/file{mark}{file}" for mark in "=/" for file in files + climbing]
    paths += [f"/{folder}/{file}" for folder in ("static", "assets") for file in climbing]
    for path in [*paths, "/gradio_api/proxy=https://example.com/"]:
        status, body = fetch(server, path)
        assert status in (400, 403, 404) and len(body) < 300, path
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/queue/status", "/theme.css"):
        status, body = fetch(server, path)
        assert status == 200
        for secret in (hub.token, str(Path.home()), str(tiny_run), str(APP.parents[2])):
            assert secret.encode() not in body, (path, secret)


def test_uploads_are_small(server: ExplorerServer) -> None:
    upload = f"{server.url}/gradio_api/upload"
    assert httpx.post(upload, files={"files": ("large.txt", b"x" * 2000)}).status_code == 413


def growth(server: ExplorerServer, client: Client, count: int, settling: int) -> float:
    """MB that are added from the median after settling to the median at the end."""
    sizes = []
    for request in islice(requests(), count):
        client.predict(**request)
        sizes.append(megabytes(server.process.pid))
    return float(np.median(sizes[-10:]) - np.median(sizes[settling : settling + 10]))


@pytest.mark.long
def test_memory_stays_the_same_over_many_visits(server: ExplorerServer, client: Client) -> None:
    assert growth(server, client, 500, 100) < 40
