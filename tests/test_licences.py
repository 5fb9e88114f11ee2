"""Licences are read from cards that others wrote, and a name is checked before it is used."""

import pytest
from huggingface_hub import constants

from resa_hf.data import PRESETS
from resa_hf.errors import PublishError
from resa_hf.hub.licences import Licence, check_name, licence_of

QWEN = "license: other\nlicense_name: qwen-research\nlicense_link: https://huggingface.co/Qwen/x/blob/main/LICENSE"


def card(metadata):
    return f"---\n{metadata}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: apache-2.0", ("apache-2.0", None, None)),
        ("license: [mit]", ("mit", None, None)),
        ("license: Apache-2.0", ("apache-2.0", None, None)),
        ("license: llama3.2\nlicense_name: x", ("llama3.2", None, None)),
        (QWEN, ("other", "qwen-research", "https://huggingface.co/Qwen/x/blob/main/LICENSE")),
        # The Hub would refuse our card with an identifier that it does not know.
        ("license: my-own-licence", ("other", "my-own-licence", None)),
        ("license: other\nlicense_name: x\nlicense_link: LICENSE", ("other", "x", None)),
        # The Hub takes lower-case names only.
        ("license: other\nlicense_name: Some License", ("other", "some-license", None)),
        ("license: My_Licence (v1)", ("unknown", None, None)),
        ("license: Llama 3.1 Community", ("other", "llama-3.1-community", None)),
        # What is not said, or not plainly, is not guessed.
        ("language: en", ("unknown", None, None)),
        ("license: unknown", ("unknown", None, None)),
        ("license: [mit, apache-2.0]", ("unknown", None, None)),
        ("license: 1.0", ("unknown", None, None)),
        ("license: {mit: mit}", ("unknown", None, None)),
        ("license: |\n  mit\n  ---\n  tags: [x]", ("unknown", None, None)),
        ("license: <script>alert(1)</script>", ("unknown", None, None)),
        ("license: other\nlicense_name: '[x](https://evil.example)'", ("other", None, None)),
        ("license: other\nlicense_link: 'javascript:alert(1)'", ("other", None, None)),
        ("license: other\nlicense_link: 'https://x.example/) [y](https://z.example'", ("other", None, None)),
        ("license: other\nlicense_link: file:///etc/passwd", ("other", None, None)),
        ("1: 2\nlicense: mit", ("mit", None, None)),
        ("- license: mit", ("unknown", None, None)),
        ("license: !!python/object/apply:os.abort []", ("unknown", None, None)),
        (f"license: {'[' * 2000}", ("unknown", None, None)),
    ],
)
def test_a_card_in_a_folder(tmp_path, metadata, expected):
    (tmp_path / "README.md").write_text(card(metadata))
    found = licence_of(str(tmp_path))
    assert (found.id, found.name, found.link) == expected


def test_folders_without_a_card(tmp_path):
    assert licence_of(str(tmp_path)) == Licence()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert licence_of(str(tmp_path)) == Licence()
    (tmp_path / "README.md").write_text("# No metadata")
    assert licence_of(str(tmp_path)) == Licence()


def test_the_models_that_ship_here_have_our_licence():
    assert licence_of("resa_hf/tiny/base").id == "apache-2.0"


def test_cards_on_the_hub(hub):
    first = hub.create_repo("owner/base", files={"README.md": card("license: mit")})
    hub.commit("owner/base", {"README.md": card("license: gemma")})
    hub.create_repo("owner/bare", files={"config.json": "{}"})
    hub.create_repo("owner/questions", "dataset", files={"README.md": card("license: cc-by-4.0")})
    hub.create_repo("owner/named", "dataset", files={"README.md": card(QWEN)})
    assert licence_of("owner/base").id == "gemma"
    assert licence_of("owner/base", revision=first).id == "mit"
    assert licence_of("owner/base", revision="no-such") == licence_of("owner/bare") == licence_of("owner/nowhere")
    assert licence_of("owner/nowhere") == licence_of("not/a/repo") == Licence()
    names = ["owner/questions", "owner/named", "owner/nowhere", "mine.jsonl", "tiny-reasoner"]
    assert dict(licence_of("owner/bare", names).datasets) == {
        "owner/questions": "cc-by-4.0", "owner/named": "qwen-research", "owner/nowhere": None, "mine.jsonl": None,
        "tiny-reasoner": None,
    }  # fmt: skip


def test_a_licence_that_lies_in_the_repo(hub):
    text = card("license: other\nlicense_name: qwen-research\nlicense_link: LICENSE")
    commit = hub.create_repo("owner/base", files={"README.md": text})
    assert licence_of("owner/base").link == "https://huggingface.co/owner/base/blob/main/LICENSE"
    assert licence_of("owner/base", revision=commit).link.endswith(f"owner/base/blob/{commit}/LICENSE")
    hub.commit("owner/base", {"README.md": text.replace("LICENSE", "../../LICENSE")})
    assert licence_of("owner/base").link is None


def test_a_private_base_is_read_with_the_token(hub, monkeypatch):
    hub.create_repo("owner/secret", files={"README.md": card("license: mit")}, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    assert licence_of("owner/secret") == Licence()
    assert licence_of("owner/secret", token=hub.token).id == "mit"


def test_an_unread_licence_of_what_may_be_llama_is_warned_of(hub, caplog):
    licence_of("owner/base")
    assert not caplog.records
    licence_of("owner/My-LLaMA")
    (warning,) = caplog.messages
    assert "owner/My-LLaMA" in warning and "begin with 'Llama'" in warning


def test_presets_know_their_licence_or_their_repo_is_asked(hub):
    for name, preset in PRESETS.items():
        if preset.licence is not None:
            assert dict(licence_of("owner/bare", [name, preset.repo]).datasets) == {
                name: preset.licence, preset.repo: preset.licence
            }  # fmt: skip
    asked = [preset for preset in PRESETS.values() if preset.licence is None]
    for preset in asked:
        hub.create_repo(preset.repo, "dataset", files={"README.md": card("license: odc-by")})
        assert licence_of("owner/bare", [preset.repo]).datasets[preset.repo] == "odc-by"


def test_a_gated_base_shows_its_licence_to_everyone(hub, monkeypatch):
    hub.create_repo("meta/Llama", files={"README.md": card("license: llama3.2")}, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    assert licence_of("meta/Llama").id == "llama3.2"


def test_offline_the_cache_is_asked(hub, monkeypatch):
    hub.create_repo("owner/base", files={"README.md": card("license: mit")})
    assert licence_of("owner/base").id == "mit"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert licence_of("owner/base").id == "mit" and licence_of("owner/other") == Licence()


@pytest.mark.parametrize("fault", ["drop", 403])
def test_a_hub_that_does_not_answer_does_not_pass_for_no_licence(hub, fault):
    hub.create_repo("owner/base", files={"README.md": card("license: llama3.2")})
    hub.fail("HEAD", "README.md", fault, times=20)
    with pytest.raises(PublishError, match="licence of owner/base cannot be read: the Hub does not answer"):
        licence_of("owner/base")


@pytest.mark.parametrize(
    ("licence", "name", "suggested"),
    [
        (Licence("llama3.2"), "me/Llama-3.2-resa", None),
        (Licence("llama3.1"), "me/Llamantin", None),
        (Licence("llama3.3"), "me/resa-Llama", "me/Llama-resa-Llama"),
        (Licence("llama4"), "me/resa", "me/Llama-resa"),
        (Licence("llama3.2"), "me/llama-resa", "me/Llama-llama-resa"),
        (Licence("llama3.2"), "resa", "Llama-resa"),
        # Llama 3 itself asks for its number, too.
        (Licence("llama3"), "me/Llama-3-resa", None),
        (Licence("llama3"), "me/Llama3-resa", None),
        (Licence("llama3"), "me/Llama-resa", "me/Llama-3-Llama-resa"),
        (Licence("other", "llama-3.1-community"), "me/resa", "me/Llama-resa"),
        (Licence("other", "Llama 3 Community License"), "me/resa", "me/Llama-3-resa"),
        (Licence("llama2"), "me/resa", None),
        (Licence("other", "llama-2"), "me/resa", None),
        (Licence("gemma"), "me/resa", None),
        (Licence("other", "qwen-research"), "me/resa", None),
        (Licence("other"), "me/resa", None),
        (Licence(), "me/resa", None),
    ],
)
def test_names_that_a_licence_asks_for(licence, name, suggested):
    if suggested is None:
        check_name(name, licence)
        return
    with pytest.raises(PublishError, match=r"section 1.b.i\) demands .* begins with 'Llama") as caught:
        check_name(name, licence)
    assert f"{suggested} would do." in str(caught.value)
    check_name(suggested, licence)


def test_words_that_a_licence_asks_for():
    assert Licence("llama3").attribution == "Built with Meta Llama 3"
    assert Licence("llama3.2").attribution == Licence("llama4").attribution == "Built with Llama"
    named = [Licence("llama2"), Licence("llama3.2"), Licence("other", "llama-3.1"), Licence("mit"), Licence()]
    assert [bool(licence.lacks) for licence in named] == [True, True, True, False, False]
    assert Licence("llama2").attribution is Licence("mit").attribution is None
