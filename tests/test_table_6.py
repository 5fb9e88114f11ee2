"""The example of table 6: its numbers are the paper's, and what its README says is what it prints."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).parents[1] / "examples" / "table_6"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("table_6", FOLDER / "layers_of_table_6.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_readme_holds_what_is_printed(example, tmp_path):
    found = example.examine()
    readme = (FOLDER / "README.md").read_text()
    tables = [line for line in example.describe(found).splitlines() if line.startswith("|")]
    assert len(tables) == 12
    assert [line for line in tables if line not in readme] == []
    # 53 latents at 22 of 26 layers, 0 to 5 each, and scores of 45.48 (layer 14) to 49.42 (layer 18): the paper's text.
    counts, scores = np.array(found["counts"]), np.array(found["scores"])
    assert (len(counts), counts.min(), counts.max()) == (26, 0, 5)
    assert (scores.argmin() + 2, scores.min(), scores.argmax() + 2, scores.max()) == (14, 45.48, 18, 49.42)
    spearman = stats.spearmanr(counts, scores).statistic
    assert found["correlations"]["counts and scores, Spearman"]["estimate"] == pytest.approx(spearman)
    example.draw(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.png", "scores.png"]
