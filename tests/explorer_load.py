"""Visitors of a running explorer, for its tests and its benchmark: they ask through the documented API."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradio_client import Client

from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae

PROBLEMS = ["7*4-2+8 mod 10", "8+7*1*8 mod 10", "5-7+2+4+9 mod 10", "4+2*5-7 mod 10", "3*3*3-1 mod 10"]


def write_sae(folder: Path) -> str:
    """An SAE of random weights for the tiny reasoner; its place, for RESA_SAES."""
    save_sae(TopKSAE(128, 256, 8, hookpoint="layers.2"), folder)
    return str(folder)


def connect(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def requests() -> Iterator[dict[str, Any]]:
    """Arguments of `predict`, without an end: solve, look, latent, change and accuracy in turn."""
    number = 0
    while True:
        problem, seed = PROBLEMS[number % len(PROBLEMS)], {"seed": number}
        strength = {"strength": round(number % 41 / 10 - 2, 1)}
        yield {"api_name": "/solve", "problem": problem, **seed, **strength}
        yield {"api_name": "/look", "text": f"User: {problem}\nAssistant: <think>", "latent": number % 256, **strength}
        yield {"api_name": "/latent", "latent": number % 256}
        yield {"api_name": "/change", "latent": number % 256, "factor": number % 10, "problem": problem, **seed}
        yield {"api_name": "/accuracy", "count": 10, **seed}
        number += 1


def megabytes(process: int) -> float:
    """What a process has in memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1000


def seconds_to_first_token(client: Client, seed: int) -> float:
    """From asking until the first step of the stream is here."""
    started = time.perf_counter()
    job = client.submit(api_name="/solve", problem=PROBLEMS[0], seed=seed)
    next(iter(job))
    waited = time.perf_counter() - started
    job.result()
    return waited


def at_once(url: str, visits: list[dict[str, Any]]) -> list[Any]:
    """What visitors get who all ask at the same time, each by a client of its own; an error is its own answer."""
    clients = [connect(url) for _ in visits]

    def ask(client: Client, visit: dict[str, Any]) -> Any:
        try:
            return client.predict(**visit)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(visits)) as pool:
        return list(pool.map(ask, clients, visits))
