"""Training problems in benchmarks: made-up pairs of each kind, and real files beside a list of others."""

import json

import pyarrow.parquet as pq
import pytest

from resa_hf.evaluation.contamination import KINDS, find_overlap

BAKER = "A baker sells $12$ loaves in the morning and twice as many in the afternoon. How many loaves does he sell?"
FUNCTION = r"Let $f(x) = \frac{1}{2}x^{2} - 3x$ for all real $x \le 10$. Determine the least value of $f(x) + 1,000$."
BENCHMARKS = {
    "bakery": [BAKER, "How long is a row of 7 bricks of 20 cm each, laid end to end?"],
    "algebra": [FUNCTION],
}


def only(train, benchmarks=BENCHMARKS):
    """The one overlap of one training problem."""
    (found,) = find_overlap([train], benchmarks).overlaps
    return found


def cells(markdown):
    """The rows of all tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_exact():
    found = only(f"  {BAKER}\n")
    assert (found.kind, found.benchmark, found.row, found.train_row, found.similarity) == ("exact", "bakery", 0, 0, 1)
    assert only(BAKER.replace(". How", ".\n\nHow")).kind == "exact"


@pytest.mark.parametrize(
    "same",
    [
        r"let \( f(x)=\dfrac12 x^2-3x \) for all real \(x\leq 10\), determine the least value of \(f(x)+1000\)",
        r"Let $f\left(x\right) = \tfrac 1 2 x^2 - 3x$ for all real $x\le10.$ Determine the least value of "
        r"\[f(x)\,+\,1{,}000.\]",
        "Let $f(x) = \\frac{1}{2}x^{2} − 3x$ for all \\textbf{real} $x \\le 10$: determine the least value of"
        "\n\\begin{align*}\nf(x) &+ 1,\\!000\n\\end{align*}",
    ],
)
def test_normalised(same):
    found = only(same)
    assert (found.kind, found.benchmark, found.similarity) == ("normalised", "algebra", 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        ("x^{2}", "x^{3}"),
        (r"\le 10", r"\le 100"),
        ("1,000", "1,001"),
        (r"\frac{1}{2}", r"\frac{12}{}"),
    ],
)
def test_another_number_is_another_problem(old, new):
    found = only(FUNCTION.replace(old, new))
    assert found.kind == "template"
    assert only(FUNCTION.replace(old, new).lower().replace("$", "")).kind == "template"


def test_operators_and_brackets_count():
    for old, new in (("- 3x", "+ 3x"), (r"\le", r"\ge"), ("f(x) + 1,000", "(f(x) + 1,000)")):
        assert only(FUNCTION.replace(old, new)).kind == "near"


def test_near_is_other_words_about_the_same_numbers():
    found = only(BAKER.replace("A baker", "Mr Smith, a baker,").replace("How many loaves does", "How many does"))
    assert (found.kind, found.row) == ("near", 0)
    # Numbers may be added: a problem that became multiple choice.
    assert only(BAKER + " (A) 24 (B) 36 (C) 40").kind == "near"
    assert only(BAKER.replace("12", "15").replace("A baker", "Mr Smith, a baker,")).kind == "template"


def test_similarity_is_the_share_of_trigrams():
    words = list("abcdefghij")
    for cut in range(8):
        train, benchmark = [*words[cut:], "x", "y"], words
        pairs = [{" ".join(text[i : i + 3]) for i in range(len(text) - 2)} for text in (train, benchmark)]
        jaccard = len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])
        found = find_overlap([" ".join(train)], {"letters": [" ".join(benchmark)]}).overlaps
        assert [one.similarity for one in found] == ([pytest.approx(jaccard)] if jaccard >= 0.5 else [])


def test_inside_a_longer_text():
    around = (
        "Here is your task for today, and please take all the time that it needs. {} Then write your answer down, "
        "check it with care, have a look at the units, and give it back to the person who handed you this sheet."
    )
    found = only(around.format(BAKER))
    assert (found.kind, found.similarity) == ("near", 1)
    assert not find_overlap([around.format(BAKER.replace("12", "15"))], BENCHMARKS).overlaps
    # Too short a problem stands in many texts.
    assert not find_overlap([around.format("What is 7 times 12?")], {"short": ["What is 7 times 12?"]}).overlaps


def test_each_benchmark_problem_once_with_its_strongest_kind():
    near, template = BAKER.replace("A baker", "One baker"), BAKER.replace("12", "15")
    report = find_overlap(iter([template, near, BAKER.lower(), template, BAKER.upper(), "What?"]), BENCHMARKS)
    (found,) = report.overlaps
    assert (found.kind, found.train_row, found.others) == ("normalised", 2, 1)
    assert (found.benchmark_text, found.train_text) == (BAKER[:80], BAKER.lower()[:80])
    assert report.train_problems == 6
    assert report.benchmark_problems == {"bakery": 2, "algebra": 1}
    assert report.counts() == {
        "bakery": {"exact": 0, "normalised": 1, "near": 0, "template": 0},
        "algebra": dict.fromkeys(KINDS, 0),
    }


def test_nothing_in_common():
    report = find_overlap(["What is the colour of the sky at noon?", ""], BENCHMARKS)
    assert report.overlaps == []
    assert ["bakery", "2", "0", "0", "0", "0"] in cells(report.as_markdown())
    assert "similarity" not in report.as_markdown()


def test_other_scripts_are_words_too():
    problems = {"other": ["Сколько будет два плюс два", "九加三等于多少"]}
    found = find_overlap(["сколько будет два плюс два?", "九加四等于多少"], problems).overlaps
    assert [(one.row, one.kind) for one in found] == [(0, "normalised")]


def test_plain_data_and_markdown():
    report = find_overlap([FUNCTION.lower() + " |x|", BAKER, BAKER.replace("12", "15")], BENCHMARKS)
    plain = json.loads(json.dumps(report.as_plain()))
    assert [one["kind"] for one in plain["overlaps"]] == ["exact", "near"]
    assert plain["counts"]["bakery"]["exact"] == 1
    table = cells(report.as_markdown())
    assert ["bakery", "2", "1", "0", "0", "0"] in table
    (row,) = (row for row in table if row[0] == "exact")
    assert row[:4] == ["exact", "1.00", "bakery 0", "1"]
    assert len(row) == 6 and r"\$12\$" in row[4]


@pytest.mark.long
def test_beside_a_list_made_by_others(shared_data):
    benchmarks = {
        path.stem: [json.loads(line)["problem"] for line in path.read_text().splitlines()]
        for path in sorted(shared_data.glob("*_test.jsonl"))
    }
    found = {
        (path.stem, one.benchmark, one.benchmark_text): one.kind
        for path in sorted(shared_data.glob("*_train.parquet"))
        for one in find_overlap(pq.read_table(path)["problem"].to_pylist(), benchmarks).overlaps
    }
    listed = [json.loads(line) for line in (shared_data / "train_benchmark_overlap.jsonl").read_text().splitlines()]
    ours = {"exact": [], "loose": [], "near": []}
    for one in listed:
        if one["benchmark"] in benchmarks and (shared_data / f"{one['train']}.parquet").exists():
            start = " ".join(one["problem"].split())[:80]
            ours[one["kind"]].append(found.get((one["train"], one["benchmark"], start)))
    assert ours["exact"] == ["exact"] * 6
    assert ours["loose"] == ["normalised"] * 8
    # Those that we leave out share the form of the question, not its content; most of the others differ by a number.
    assert ours["near"].count(None) == 9
    assert len(ours["near"]) == 57
    # Nothing that is word for word the same was missing from their list.
    assert list(found.values()).count("exact") == 6
