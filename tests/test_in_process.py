"""The in-process engine: its draws, its adapters, and what it keeps of an interrupted evaluation."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, TopPLogitsWarper

from resa_hf.errors import DataError, IncompatibleAdapterError
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine, draw_tokens
from resa_hf.evaluation.share import Share
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import load_tiny_base, load_tiny_source, tiny_path
from resa_hf.tiny.task import make_rows

GREEDY = Sampling(temperature=0, max_new_tokens=64)


def prompts(tokenizer, count=12):
    rows = make_rows(count, seed=99)
    return [evaluation_prompt(row["problem"], template="chat", tokenizer=tokenizer) for row in rows]


def texts(completions):
    return [[completion.text for completion in row] for row in completions]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (2.0, 0.5)])
def test_draws_have_the_probabilities_of_transformers_own_settings(temperature, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3
    warped = TopPLogitsWarper(top_p)(None, logits / temperature) if top_p < 1 else logits / temperature
    count = 100_000
    # Evenly spaced numbers: each token's share is its probability to one part in `count`.
    uniform = torch.from_numpy(((np.arange(count) + 0.5) / count).astype(np.float32))
    drawn = draw_tokens(logits.expand(count, -1), uniform, Sampling(temperature=temperature, top_p=top_p))
    shares = torch.bincount(drawn, minlength=40) / count
    torch.testing.assert_close(shares, warped.softmax(-1)[0], atol=3e-5, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    edges = torch.tensor([0.0, 1 - 2**-24])  # the least and the largest number that can come
    for top_p in (0.4, 1.0):
        assert set(draw_tokens(logits.expand(2, -1), edges, Sampling(top_p=top_p)).tolist()) <= {1, 2}


@pytest.fixture
def two_adapters():
    """The base with the source's adapter, and with four times that, side by side."""
    model = PeftModel.from_pretrained(load_tiny_base(), tiny_path("source"), adapter_name="source")
    model.load_adapter(str(tiny_path("source")), adapter_name="large")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["large"] *= 4
    return model


def test_adapters_act_one_at_a_time_and_everything_is_put_back(two_adapters, tiny_tokenizer):
    asked = prompts(tiny_tokenizer)
    expected = {
        False: TransformersEngine(load_tiny_base(), tiny_tokenizer).generate(asked, GREEDY, progress=False),
        "source": TransformersEngine(load_tiny_source(), tiny_tokenizer).generate(asked, GREEDY, progress=False),
    }
    two_adapters.base_model.set_adapter("large")
    two_adapters.train()
    trained = {name for name, parameter in two_adapters.named_parameters() if parameter.requires_grad}
    ids = tiny_tokenizer(asked[0], return_tensors="pt").input_ids
    before = two_adapters(ids).logits
    for adapter in (False, "source", False):
        engine = TransformersEngine(two_adapters, tiny_tokenizer, adapter=adapter)
        assert engine.generate(asked, GREEDY, progress=False) == expected[adapter]
        assert two_adapters.active_adapters == ["large"] and two_adapters.training
        assert {name for name, parameter in two_adapters.named_parameters() if parameter.requires_grad} == trained
        assert torch.equal(two_adapters(ids).logits, before)
    # (The source's greedy answers are nearly all the base's.)
    as_set = TransformersEngine(two_adapters, tiny_tokenizer)
    assert as_set.generate(asked, GREEDY, progress=False) not in expected.values()
    assert as_set.name.endswith("base+large")


def test_adapters_that_were_off_stay_off(two_adapters, tiny_tokenizer):
    two_adapters.base_model.disable_adapter_layers()
    base = TransformersEngine(two_adapters, tiny_tokenizer)
    assert base.name.endswith("weights/base")
    asked = prompts(tiny_tokenizer, 2)
    first = base.generate(asked, GREEDY, progress=False)
    TransformersEngine(two_adapters, tiny_tokenizer, adapter="source").generate(asked, GREEDY, progress=False)
    assert base.generate(asked, GREEDY, progress=False) == first


def test_an_adapter_that_is_not_there_and_a_model_without_cache(two_adapters, tiny_tokenizer, tiny_base):
    with pytest.raises(
        IncompatibleAdapterError, match=r"no adapter 'other' in the model; it has \['source', 'large'\]"
    ):
        TransformersEngine(two_adapters, tiny_tokenizer, adapter="other")
    with pytest.raises(IncompatibleAdapterError, match="it has none"):
        TransformersEngine(tiny_base, tiny_tokenizer, adapter="other")
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaForCausalLM has no key-value cache"):
        TransformersEngine(mamba, tiny_tokenizer)


def test_stored_answers_are_not_given_for_other_weights(two_adapters, tiny_tokenizer, tmp_path):
    asked, store = prompts(tiny_tokenizer, 2), tmp_path / "answers.jsonl"

    def run(adapter, path=store):
        engine = TransformersEngine(two_adapters, tiny_tokenizer, adapter=adapter, name="tiny")
        return engine.generate(asked, GREEDY, store=path, progress=False)

    kept = run("source")
    two_adapters.load_adapter(str(tiny_path("source")), adapter_name="another")  # does not matter
    assert run("source") == kept
    with pytest.raises(DataError, match="adapter '"):
        run("large")
    with pytest.raises(DataError, match="adapter '.*', now 'none'"):
        run(False)
    b = next(p for name, p in two_adapters.named_parameters() if "lora_B.source" in name)
    with torch.no_grad():
        b[0, 0] += 1e-3
    with pytest.raises(DataError, match="adapter '"):
        run("source")
    run(False, tmp_path / "base.jsonl")
    # The base is known as such, whatever is wrapped around it, and by its weights, not by its name.
    plain = load_tiny_base()
    TransformersEngine(plain, tiny_tokenizer, name="tiny").generate(asked, GREEDY, store=tmp_path / "base.jsonl")
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(DataError, match="base '"):
        TransformersEngine(plain, tiny_tokenizer, name="tiny").generate(asked, GREEDY, store=tmp_path / "base.jsonl")


EVALUATION = """
import sys
from pathlib import Path
import torch
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.tiny import load_tiny_base, load_tiny_tokenizer
from test_in_process import SAMPLED, prompts
torch.set_num_threads(1)
tokenizer = load_tiny_tokenizer()
TransformersEngine(load_tiny_base(), tokenizer).generate(prompts(tokenizer), SAMPLED, store=Path(sys.argv[1]))
"""
SAMPLED = Sampling(samples=6, max_new_tokens=64, batch_size=2, seed=11)


@pytest.mark.long
def test_a_killed_evaluation_ends_with_the_same_result(tiny_base, tiny_tokenizer, tmp_path):
    store = tmp_path / "answers.jsonl"
    batches = 0
    for _ in range(2):
        batches += random.SystemRandom().randint(1, 12)
        command = [sys.executable, "-c", EVALUATION, str(store)]
        process = subprocess.Popen(command, cwd=__file__.rpartition("/")[0], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not store.exists() or len(store.read_bytes().splitlines()) <= batches):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert batches < len(store.read_bytes().splitlines()) < 36  # of 36 batches, and a header
    engine, asked = TransformersEngine(tiny_base, tiny_tokenizer), prompts(tiny_tokenizer)
    expected = engine.generate(asked, SAMPLED, progress=False)
    assert engine.generate(asked, SAMPLED, store=store, progress=False) == expected
    assert len(store.read_bytes().splitlines()) == 37


@dataclass(frozen=True)
class InThreads(Share):
    """As processes would, with a shared list instead of a network."""

    meeting: threading.Barrier | None = None
    told: dict = field(default_factory=dict)

    def _exchanged(self, value):
        self.told[self.process] = value
        self.meeting.wait(60)
        told = dict(self.told)
        self.meeting.wait(60)
        return told

    def of_first(self, value):
        return self._exchanged(value)[0]

    def of_all(self, found):
        return {key: value for part in self._exchanged(found).values() for key, value in part.items()}


@pytest.mark.slow
def test_what_several_answer_together_is_what_one_answers(tiny_tokenizer, tmp_path):
    asked, sampling = prompts(tiny_tokenizer, 7), Sampling(samples=3, max_new_tokens=64, batch_size=4, seed=11)
    store = tmp_path / "answers.jsonl"

    models = [load_tiny_base() for _ in range(3)]

    def answer(share, path):
        engine = TransformersEngine(models[share.process], tiny_tokenizer, name="x", share=share)
        return engine.generate(asked, sampling, store=path, progress=False)

    expected = answer(Share(), None)
    for kept in (None, 2):  # from the start, and from the header and a first line
        if kept is not None:
            store.write_text("".join(store.read_text().splitlines(keepends=True)[:kept]))
        meeting, told = threading.Barrier(3), {}
        shares = [InThreads(number, 3, meeting, told) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(answer, shares, [store, tmp_path / "b.jsonl", tmp_path / "c.jsonl"]))
        assert all(completions == expected for completions in found)
        # Rounds of three batches of four; the first process alone keeps them.
        lines = [json.loads(line) for line in store.read_text().splitlines()[1:]]
        assert [len(line["completions"]) for line in lines] == [12, 9]
        assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
