"""How recipes and flags name models and adapters."""

import pytest

from resa_hf.places import Place, check_inside, parse_place
from resa_hf.tiny import tiny_path

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("gpt2", Place("gpt2")),
        ("owner/name", Place("owner/name")),
        ("owner/name@main", Place("owner/name", "main")),
        (f"Tina-Yi/R1-Distill@{COMMIT}/checkpoint-2000", Place("Tina-Yi/R1-Distill", COMMIT, "checkpoint-2000")),
        ("owner/name/sub/folder", Place("owner/name", None, "sub/folder")),
        ("owner/name@refs/pr/3/sub", Place("owner/name", "refs/pr/3", "sub")),
        ("owner/name@feature%2Fone/sub", Place("owner/name", "feature/one", "sub")),
        ("hf://owner/name@v1", Place("owner/name", "v1")),
    ],
)
def test_places_on_the_hub(text, place):
    assert parse_place(text) == place
    assert not place.is_folder
    assert parse_place(str(place)) == place


def test_a_folder_is_itself_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine@v1/adapter", "gpt2"):
        assert not parse_place(name).is_folder
        (tmp_path / name).mkdir(parents=True)
        assert parse_place(name) == Place(name) and parse_place(name).is_folder
    assert parse_place(str(tmp_path)) == Place(str(tmp_path))
    with pytest.raises(ValueError, match="revision 'main' is for Hub repositories, and 'gpt2' is a folder"):
        parse_place("gpt2", revision="main")


def test_what_ships_here():
    assert parse_place("resa_hf/tiny/source") == Place(str(tiny_path("source")))


@pytest.mark.parametrize(
    "text",
    ["", "/no/such", "../x", "./x/y", "a/../b", "datasets/a/b", "a/b@", "a b/c", "a/b\0", "C:\\x", "C:/x", "x@y"],
)
def test_what_is_no_place(text):
    with pytest.raises(ValueError, match="is no folder here, and no place on the Hub"):
        parse_place(text)


@pytest.mark.parametrize("text", ["a" * 300, "/a" * 3000])
def test_what_is_too_long_to_be_a_folder(text):
    with pytest.raises(ValueError, match="is no folder here, and no place on the Hub"):
        parse_place(text)


@pytest.mark.parametrize(
    "text", ["a/b/../c", "a/b@../x", "a/b@r/..", "a/b@..%2F..%2Fx", "a/b/c:d", "a/b@r/c\\d", "a/b/c\nd"]
)
def test_nothing_leads_out_of_a_repository(text):
    with pytest.raises(ValueError, match="must lie inside"):
        parse_place(text)


def test_what_is_given_beside_a_name():
    assert parse_place("a/b", revision="v1", subfolder="c//d/") == Place("a/b", "v1", "c/d")
    assert parse_place("a/b@v1", revision="v1").revision == "v1"
    with pytest.raises(ValueError, match="'a/b@v1' names the revision 'v1', and 'v2' is given beside it"):
        parse_place("a/b@v1", revision="v2")
    with pytest.raises(ValueError, match="names the subfolder 'c', and 'd' is given"):
        parse_place("a/b/c", subfolder="d")
    with pytest.raises(ValueError, match="revision '../x' must lie inside"):
        parse_place("a/b", revision="../x")


def test_relative_paths_made_plain():
    assert [check_inside(path, "x") for path in ("a//b/", "./a", ".", "é")] == ["a/b", "a", ".", "é"]
