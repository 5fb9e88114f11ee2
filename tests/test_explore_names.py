"""What visitors may type as the name of a repository."""

import subprocess
import sys

import pytest

from resa_hf.errors import ExploreError
from resa_hf.explore.names import hub_name, hub_uri


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("owner/name", "owner/name"),
        ("  owner/name\n", "owner/name"),
        ("hf://owner/name", "owner/name"),
        (
            "Tina-Yi/R1-Distill-Qwen-1.5B-STILL@main/checkpoint-2000",
            "Tina-Yi/R1-Distill-Qwen-1.5B-STILL@main/checkpoint-2000",
        ),
        ("owner/name/layers.12.mlp", "owner/name/layers.12.mlp"),
        ("owner/name@a%2Fbranch/sub/folder", "owner/name@a%2Fbranch/sub/folder"),
        ("owner/name@refs/pr/3", "owner/name@refs%2Fpr%2F3"),
    ],
)
def test_names_on_the_hub_are_made_plain(typed, plain):
    assert hub_name(typed, "model") == plain
    assert hub_name(plain, "model") == plain


def test_the_parts_of_a_name():
    uri = hub_uri("owner/name@a%2Fbranch/sub/folder", "model")
    assert (uri.id, uri.revision, uri.path_in_repo) == ("owner/name", "a/branch", "sub/folder")


PATHS = [
    "/etc/passwd",
    "//etc/passwd",
    "../a/b",
    "a/../b",
    "a/b/../../c",
    "./a/b",
    "a/./b",
    "a//b",
    "a/b/",
    "~/a",
    "~root/a",
]
OTHER_SPELLINGS = [
    "C:\\a",
    "c:/a/b",
    "a\\b",
    "\\\\host\\a",
    "file:///etc/passwd",
    "https://huggingface.co/a/b",
    "a/b:c",
]
CLIMBING = ["a/b@..%2F..%2Fetc", "a/b@%2e%2e/c", "a/b@x/../c"]
NO_MODELS = ["datasets/a/b", "hf://datasets/a/b", "spaces/a/b", "hf://buckets/a/b"]
NO_NAMES = [
    "",
    "  ",
    "gpt2",
    "a b/c",
    "a/b c",
    "a/b\x00",
    "a\nb/c",
    "a/b\u202e",
    "é/b",
    "<b>a</b>/c",
    "a/b@",
    "x" * 99 + "/" + "y" * 101,
]


@pytest.mark.parametrize("typed", [*PATHS, *OTHER_SPELLINGS, *CLIMBING, *NO_MODELS, *NO_NAMES])
def test_all_else_is_refused(typed):
    with pytest.raises(ExploreError, match="adapter on the Hub") as raised:
        hub_name(typed, "adapter")
    assert len(str(raised.value)) < 300


def test_a_folder_of_that_name_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name@v1", "model") == "owner/name@v1"
    with pytest.raises(ExploreError):
        hub_name(str(tmp_path / "owner"), "model")


def test_importing_it_is_quick():
    heavy = "{'torch', 'transformers', 'peft', 'sae_lens', 'scipy', 'matplotlib'}"
    code = f"import sys, resa_hf.explore.names; sys.exit(sorted({heavy} & sys.modules.keys()) or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
