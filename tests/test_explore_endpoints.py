"""The explorer's answers without a server: against plain formulas, merged weights and a separate evaluation."""

import inspect
import json
import re
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
import torch
import yaml
from explore_values import BAD, arguments, is_for_people
from explorer_load import write_sae
from tiny_merged import merged
from transformers import AutoModelForCausalLM

from resa_hf.errors import ExploreError
from resa_hf.evaluation.comparison import Answers, compare
from resa_hf.evaluation.engine import Sampling, answer
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.explore.accuracy import tiny_problems
from resa_hf.explore.endpoints import PROBLEM, SOURCE, TINY, Explorer
from resa_hf.explore.latents import tiny_texts
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import tiny_path

pytest_plugins = ("publishable",)

TEXT = "User: 8+7*1*8 mod 10\nAssistant: <think>8+7=5;5*1=5;5*8=0</think><answer>0</answer>"
LATENT = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_sae(tmp_path_factory.mktemp("explorer") / "sae")


@pytest.fixture(scope="module")
def sae(place) -> TopKSAE:
    return load_sae(place, ".")


@pytest.fixture(scope="module")
def explorer(place):
    explorer = Explorer([])
    explorer.saes["random"] = place
    return explorer


@torch.no_grad()
def dense(model, sae, ids) -> np.ndarray:
    """The latents of each token, all but the k largest set to zero: Gao et al., equations 1 and 2."""
    x = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
    before = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc).numpy()
    for row in before:
        row[np.argsort(row)[: -sae.k]] = 0
    return before


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_look_gives_the_values_of_every_token(explorer, sae, tiny_base, tiny_tokenizer, strength):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    expected = dense(merged(tiny_base, strength), sae, ids)
    chosen = int(expected.max(axis=0).argsort()[-3])
    html, table, plain = explorer.look(TINY, [SOURCE], strength, "random", "", TEXT, latent=chosen)
    assert plain["values"] == pytest.approx(expected[:, chosen], abs=1e-4)
    assert "".join(plain["tokens"]) == TEXT and plain["hookpoint"] == "layers.2"
    order = np.argsort(-expected.max(axis=0))[:10]
    assert [latent for latent, _ in plain["strongest"]] == order.tolist()
    assert [value for _, value in plain["strongest"]] == pytest.approx(expected.max(axis=0)[order], abs=1e-4)
    titles = {int(place): float(value) for place, value in re.findall(r'title="token (\d+): ([\d.e-]+)"', html)}
    assert titles == {n: float(f"{value:.3g}") for n, value in enumerate(plain["values"]) if value}
    assert [int(cell) for cell in re.findall(r'<th scope="row" dir="auto">(\d+)', table)] == order.tolist()


def test_look_at_one_token(explorer, sae, tiny_base, tiny_tokenizer):
    row = dense(tiny_base, sae, tiny_tokenizer(TEXT)["input_ids"])[30]
    html, table, plain = explorer.look(TINY, [], 1, "random", "layers.2", TEXT, token=30)
    assert [latent for latent, _ in plain["strongest"]] == np.argsort(-row)[: np.count_nonzero(row)].tolist()
    assert plain["latent"] == row.argmax()
    (chosen,) = re.findall(r'title="token (\d+)[^>]*aria-current="true"', html)
    assert chosen == "30" and "Strongest latents of token 30" in table


def test_the_examples_and_nearest_tokens_of_a_latent(explorer, sae, tiny_base, tiny_tokenizer):
    html, words, plain = explorer.latent(TINY, "random", "", LATENT)
    peaks = sorted(dense(tiny_base, sae, tiny_tokenizer(t)["input_ids"])[:, LATENT].max() for t in tiny_texts(64))
    found = [max(example["values"]) for example in plain["examples"]]
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx(peaks[::-1][: len(found)], abs=1e-4)
    with torch.no_grad():
        logits = tiny_base.lm_head(tiny_base.model.norm(sae.W_dec[LATENT]))
    order = logits.argsort(descending=True)[: len(plain["nearest"])]
    assert [token for token, _ in plain["nearest"]] == [tiny_tokenizer.decode(token) for token in order]
    assert [logit for _, logit in plain["nearest"]] == pytest.approx(logits[order].tolist(), abs=1e-4)
    assert html.count("<li>") == len(found) and f"Nearest to latent {LATENT} at layers.2" in words


def test_what_changing_a_latent_does(explorer, sae, tiny_base, tiny_tokenizer):
    factor, latent = -900.0, int(dense(tiny_base, sae, tiny_tokenizer(TEXT)["input_ids"]).sum(axis=0).argmax())

    def edit(module, args, output):
        z = torch.relu((output - sae.b_dec) @ sae.W_enc + sae.b_enc)
        z = torch.where(z >= z.topk(sae.k).values[..., -1:], z, 0)[..., latent, None]
        return output + (factor - 1) * z * sae.W_dec[latent]

    model = merged(tiny_base, 1.0)
    prompt = evaluation_prompt(PROBLEM, template="chat", tokenizer=tiny_tokenizer)
    sampling = Sampling(seed=3, max_new_tokens=64)
    engine = TransformersEngine(model, tiny_tokenizer)
    plain_text = engine.generate([prompt], sampling, progress=False)[0][0].text
    model.model.layers[2].register_forward_hook(edit)
    edited_text = engine.generate([prompt], sampling, progress=False)[0][0].text
    settings = {"factor": factor, "problem": PROBLEM, "seed": 3, "max_new_tokens": 64}
    *_, (_, _, plain) = explorer.change(TINY, [SOURCE], 1, "random", "", latent, **settings)
    assert (plain["base"]["text"], plain["tuned"]["text"]) == (plain_text, edited_text)
    assert edited_text != plain_text


def test_accuracies_are_those_of_a_separate_evaluation(explorer, tiny_base, tiny_tokenizer):
    html, plain = list(explorer.accuracy(TINY, [SOURCE], 1, count=20, seed=4, max_new_tokens=64))[-1]
    problems = tiny_problems(20, 4)
    prompts = [evaluation_prompt(problem, template="chat", tokenizer=tiny_tokenizer) for problem, _ in problems]
    settings = (tiny_tokenizer, prompts, [gold for _, gold in problems], Sampling(seed=4, max_new_tokens=64))
    base = answer(tiny_base, *settings, progress=False).correct
    tuned = answer(merged(tiny_base, 1.0), *settings, progress=False).correct
    verdict = compare(Answers("base", {"t": [base]}), [Answers(SOURCE, {"t": [tuned]})], 0.02, {SOURCE: ()})[1].verdict
    assert (plain["verdict"], plain["sentence"]) == (verdict.word, f"{verdict.sentence}.")
    cells = [unescape(cell) for cell in re.findall(r'<td dir="auto">(.*?)</td>', html)]
    shown = np.array(cells, dtype=object).reshape(2, -1)[:, 0].astype(float)
    assert shown.tolist() == pytest.approx([100 * base.mean(), 100 * tuned.mean()], abs=0.051)
    assert f"<strong>{verdict.word}</strong>" in html


def test_solving_streams_and_judges(explorer, tiny_base, tiny_tokenizer):
    steps = list(explorer.solve(TINY, [SOURCE], 1, "7*4-2+8 mod 10", seed=1))
    prompt = evaluation_prompt("7*4-2+8 mod 10", template="chat", tokenizer=tiny_tokenizer)
    for side, model in ((0, tiny_base), (1, None)):
        model = model or merged(tiny_base, 1.0)
        text = TransformersEngine(model, tiny_tokenizer).generate([prompt], Sampling(seed=1), progress=False)
        written = steps[-1][2][("base", "tuned")[side]]
        assert written["text"] == text[0][0].text
        right = re.search(r"<answer>(.*?)</answer>", written["text"])[1] == "4"  # ((7*4)-2)+8
        assert written["correct"] is right and ("✓ right" if right else "✗ wrong") in steps[-1][side]
    assert steps[0][2]["base"]["tokens"] == 1 and "1 tokens so far" in steps[0][0]


def test_reports_and_layers_of_a_run(run):
    explorer = Explorer([run])
    report = json.loads((run / "report.json").read_text())
    (label,) = explorer.results
    html, recipe = explorer.report(label)
    assert yaml.safe_load(recipe)["stage2"]["learning_rate"] == report["settings"]["stage2"]["learning_rate"]
    assert "hf_secret" not in html + recipe and str(run) not in html + recipe
    for arm in report["arms"]:
        assert arm["name"] in html
    layers = explorer.layers()
    for hookpoint in ("layers.1", "layers.2"):
        assert f"<code>{hookpoint}</code>" in layers
    assert len(explorer.saes) >= 1 and len(explorer.adapters) == 2


HEAVY = {"torch", "transformers", "peft", "scipy", "matplotlib", "datasets", "trl", "sae_lens", "sklearn"}


def test_nothing_heavy_is_imported_until_a_model_is_needed(run):
    code = "import json, sys; from pathlib import Path; from resa_hf.explore.endpoints import Explorer\n"
    code += f"explorer = Explorer([Path({str(run)!r})])\nassert explorer.adapters and explorer.results\n"
    code += "print(json.dumps(sorted(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(json.loads(told))


def test_the_tiny_reasoner_runs_in_the_precision_of_its_reports(explorer):
    assert {tensor.dtype for tensor in explorer.bench.open(TINY, [SOURCE]).tuned.parameters()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype="auto").dtype == torch.bfloat16


def refusal(ask) -> str | None:
    try:
        found = ask()
        list(found) if inspect.isgenerator(found) else found
    except ExploreError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solve", "accuracy", "look", "latent", "change", "report"])
def test_any_value_is_answered_or_refused_in_words(explorer, name):
    method = getattr(explorer, name)
    given = arguments(name, "random")
    for key in given:
        for value in BAD:
            told = refusal(lambda: method(**given | {key: value}))  # noqa: B023, called at once
            assert told is None or is_for_people(told), (name, key, value, told)
