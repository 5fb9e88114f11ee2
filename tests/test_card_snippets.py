"""Every Python snippet of a card runs as it stands, in a process of its own, on what was published."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard

from resa_hf.cli import main
from resa_hf.tiny import tiny_path

pytest_plugins = ("publishable",)

# Each snippet in a namespace of its own; `resa_hf` cannot be imported where a card does not say that it must be.
RUN = """
import json, sys, torch
torch.set_num_threads(1)
snippets = json.load(sys.stdin)
if not any("resa_hf" in snippet for snippet in snippets):
    sys.modules["resa_hf"] = None
for snippet in snippets:
    print("ran:", snippet.splitlines()[0])
    exec(compile(snippet, snippet, "exec"), {})
"""


def execute(hub: HubServer, home: Path, snippets: list[str]) -> str:
    environment = {**os.environ, **hub.env(home)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(snippets), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_all_snippets_of_all_cards(hub: HubServer, run: Path, tmp_path: Path) -> None:
    commit = hub.create_repo("you/base", folder=tiny_path("base"))
    folder = str(run)
    flags = ["--sae_repo_id", "me/saes", "--sparsify", "true", "--base", "you/base"]
    assert main(["publish", "--folder", folder, "--repo_id", "me/adapter", *flags]) == 0
    assert main(["publish", "--folder", folder, "--repo_id", "me/merged", "--merge", "true"]) == 0
    cards = {name: ModelCard(hub.files(name)["README.md"].decode()) for name in ("me/adapter", "me/merged", "me/saes")}
    found = {name: re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) for name, card in cards.items()}
    assert {name: len(snippets) for name, snippets in found.items()} == {"me/adapter": 3, "me/merged": 1, "me/saes": 3}
    assert f'revision="{commit}"' in found["me/adapter"][0]
    snippets = [snippet for several in found.values() for snippet in several]
    if importlib.util.find_spec("sparsify") is None:
        snippets = [snippet for snippet in snippets if "sparsify" not in snippet]
    with_resa = [snippet for snippet in snippets if "resa_hf" in snippet]
    without = [snippet for snippet in snippets if "resa_hf" not in snippet]
    assert len(with_resa) == 2 and len(without) >= 4
    printed = execute(hub, tmp_path / "one", without)
    # The question, as the base's chat template has it, and an answer to it.
    assert printed.count("Assistant: <think>") == 2 and printed.count("ran:") == len(without)
    assert execute(hub, tmp_path / "two", with_resa).count("ran:") == 2
    # PEFT and TRL write tags of their own when they save; what is published has ours.
    assert cards["me/adapter"].data.tags == ["resa-hf", "sae-tuning", "trl", "lora"]
    assert cards["me/adapter"].data.base_model == "you/base"
    assert [row.count(commit) for row in cards["me/adapter"].text.splitlines() if row.startswith("| base |")] == [1]
