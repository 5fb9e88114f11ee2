"""Whatever was named by a user or a repository comes out of a card as text."""

import ast
import json
import re
from dataclasses import replace

import pytest
import yaml
from card_reports import COMMIT, record_of, run_report
from huggingface_hub import ModelCard

from resa_hf.cards import adapter_card, sae_card
from resa_hf.escaping import as_yaml, code, prose, shown
from resa_hf.experiment.arms import Arm
from resa_hf.hub.licences import Licence

markdown_it = pytest.importorskip("markdown_it")

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![pixel](https://evil.example/p.png)",
    "https://evil.example and www.evil.example and me@evil.example",
    "a | b | c",
    "line\n\n# heading\n\n- list",
    "```\n\n</details><h1>out</h1>",
    "` [x](https://evil.example) `` ``` code",
    "{{ 7 * 7 }} {% for x in () %}",
    "x: y\n---\nlicense: mit\n---\n",
    "'\"\\ \t\x00\x1b[31m \u202eright to left",
    "**bold** _it_ ~~s~~ $$x$$",
]
MARK = "mark-of-a-name"
OUR_LINKS = re.compile(r"https://(huggingface\.co|pypi\.org/project/resa-hf|github\.com/(decoderesearch|EleutherAI))/")
OUR_HTML = {"<details>", "<summary>The whole recipe</summary>", "</details>"}


def tokens(text):
    renderer = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = renderer.parse(text)
    return [*found, *(child for token in found for child in token.children or [])]


def check_inert(card):
    """No HTML, link or picture but our own; no table whose rows differ in length; no other heading."""
    parsed = tokens(card.text)
    html = [
        line for token in parsed if token.type in ("html_block", "html_inline") for line in token.content.split("\n")
    ]
    assert {line for line in html if line} <= OUR_HTML
    assert not [token for token in parsed if token.type == "image"]
    links = [token.attrGet("href") for token in parsed if token.type == "link_open"]
    assert links and all(OUR_LINKS.match(link) for link in links)
    # Some renderers make links of bare addresses: of text, not of code.
    for token in parsed:
        if token.type == "text" and not any(token.content == link for link in links):
            assert not re.search(r"https?://\S|www\.\S|\S@\w", token.content.replace("\u200b", " "))
    for block in re.findall(r"(?:^\|.*\|\n)+", card.text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)[|]", line)) for line in block.splitlines()}) == 1
    headings = [parsed[at + 1].content for at, token in enumerate(parsed) if token.type == "heading_open"]
    assert not {"heading", "out"} & set(headings)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A report in which the names to come stand as a mark."""
    arms = [Arm(f"a {MARK}"), Arm(f"control {MARK}", tuning={"control": "noise"}), Arm("0", "none", "zero_adapter")]
    shares = {arms[0].name: 0.9, arms[1].name: 0.6}
    tasks = (f"resa:{MARK}", "held_out")
    return json.dumps(run_report(tmp_path_factory.mktemp("run"), shares, arms=arms, tasks=tasks, tried=["x", "y"]))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_acts_nowhere(marked, name):
    report = json.loads(marked.replace(MARK, json.dumps(name)[1:-1]))
    report["data"] |= {"rows": name, "fingerprint": name}
    report["device"] = {"kind": "cpu", "name": name, "count": 1}
    report["versions"] = {name: name}
    report["tasks"] = {f"resa:{name}": {"name": name, "commit": name}}
    report["overlap"] = {"benchmark_problems": {name: 1}, "counts": {name: {name: 1}}}
    report["harness_check"] = [{"arm": name, "expected": name, "got": name}]
    roles = ("base", "source", "source_adapter", "evaluate_on", "sae", "dataset", "trigger_dataset")
    record = replace(
        record_of(report, f"a {name}"),
        revisions={role: {"name": name, "commit": name if role == "dataset" else None} for role in roles},
        saes={name: {"d_in": 1, "num_latents": 2, "k": 1, "fvu": 0.5}},
    )
    record = replace(record, recipe={**record.recipe, name: [name, {"deeper": name}]})
    licence = Licence("mit", datasets={name: name})
    cards = [
        adapter_card("me/x", record, licence, adapter_config={"r": 1, "lora_alpha": 2}, merged=merged)
        for merged in (False, True)
    ]
    cards.append(adapter_card("me/x", record, licence, adapter_config={"r": name, "lora_alpha": name}))
    cards += [sae_card("me/x", record, licence, sparsify=True)]
    report["harness_check"] = []
    cards += [adapter_card("me/x", record, licence, adapter_config={"r": 1, "lora_alpha": 2})]
    for card in map(ModelCard, cards):
        check_inert(card)
        assert card.data.license == "mit" and card.data.base_model is None and "49" not in card.text
        assert "\x1b" not in card.text and "\u202e" not in card.text
        block = re.search(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)[1]
        assert yaml.safe_load(block)[name] == [name, {"deeper": name}]
        assert card.data.eval_results is None


def test_every_python_snippet_stays_one_call(tmp_path):
    name = 'x")\n```\nimport os; os.abort() #'
    text = sae_card("me/x", record_of(run_report(tmp_path, {"m": 0.9}), "m", saes={name: {"d_in": 1}}), Licence())
    snippets = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        (call,) = (node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call))
        assert [ast.literal_eval(argument) for argument in call.args] == ["me/x", name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane doe/runs/mine", "mine"),
        ("/home/jane/runs/mine/", "mine"),
        ("~/runs/mine", "mine"),
        ("~jane/runs/mine", "mine"),
        ("../../jane/mine.jsonl", "mine.jsonl"),
        ("C:\\Users\\jane\\mine", "mine"),
        ("file:///home/jane/mine", "mine"),
        ("best=/home/jane/mine", "best=mine"),
        ("owner/name@main/sub/folder", "owner/name@main/sub/folder"),
        ("runs/mine", "runs/mine"),
        ("/no_think", "/no_think"),
        ("resa:aime24", "resa:aime24"),
    ],
)
def test_folders_of_whoever_published_it_are_not_told(text, expected):
    assert shown(text) == expected and code(text) == f"`{expected}`"
    assert yaml.safe_load(as_yaml({"a": [text]})) == {"a": [expected]}


def test_no_folder_of_the_user_is_in_a_card(tmp_path):
    home = "/home/jane doe/work"
    arms = [Arm(f"{home}/adapter", "none", adapter=f"{home}/adapter"), Arm(f"{home}/mine")]
    shares = {f"{home}/mine": 0.9, f"{home}/adapter": 0.9}
    report = run_report(
        tmp_path, shares, arms=arms, output_dir=f"{home}/run", dataset=f"{home}/q.jsonl", evaluate_on=f"{home}/model"
    )
    revisions = {role: {"name": f"{home}/{role}", "commit": None} for role in ("base", "source", "dataset")}
    for arm in arms:
        text = adapter_card(
            "me/x", record_of(report, arm.name, revisions=revisions), Licence(),
            adapter_config={"r": 1, "lora_alpha": 2},
        )  # fmt: skip
        assert not re.findall(".*jane.*", text)
        assert f"`{arm.name.rpartition('/')[2]}`" in text and "The base is not known to be on the Hub" in text
        assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sentence_is_shown_as_it_was_written(name):
    (inline,) = [token for token in tokens(prose(f"x {name}")) if token.type == "inline"]
    assert {child.type for child in inline.children} == {"text"}
    shown_text = "".join(child.content for child in inline.children).replace("\u200b", "")
    assert shown_text.split() == ["x", *"".join(c if c.isprintable() else " " for c in name).split()]
    assert re.fullmatch("`[^`|<>]+`", code(name))


def test_sentences_keep_their_words():
    sentence = "SAE-Tuning is better than base: +2.0 points (95% interval +1.0 to +3.0, p < 0.0001, 500 problems)"
    (inline,) = [token for token in tokens(prose(sentence, ["base"])) if token.type == "inline"]
    assert "".join(child.content for child in inline.children) == sentence
    assert [child.content for child in inline.children if child.type == "code_inline"] == ["base"]
    assert prose("baseline", ["base"]) == "baseline" and prose("a b", [""]) == "a b"


def test_yaml_reads_back_as_itself():
    value = {"a": 1e-4, "b": None, "c": [True, "yes", "1", "null", "ü"], "x <y>": {"`": "> a\n\n- b"}, "n": 2**70}
    assert yaml.safe_load(as_yaml(value)) == value
    assert not re.search("[<>`]", as_yaml(value))
    # A revision is no number, and a commit of digits alone is none either.
    assert yaml.safe_load(as_yaml({"r": COMMIT[:10], "s": "1" * 40})) == {"r": COMMIT[:10], "s": "1" * 40}
