"""Every spelling of a hookpoint leads to one name, everything else to our own error, and no name out of a folder."""

import copy
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from resa_hf.errors import HookpointError, IncompatibleSAEError
from resa_hf.hookpoints import hooked_module, layer_index, resolve_hookpoint
from resa_hf.places import check_inside
from resa_hf.sae.checkpoint import load_sae

# By architecture: the layer list's name in the backbone, the backbone's in the model, and where attention lies.
KINDS = {"qwen2": ("layers", "model", "self_attn"), "gpt2": ("h", "transformer", "attn")}
LAYERS = 3
anything = st.text(st.sampled_from("layers.mp0129blockhk_urdgtw/\\ :-\0\n٣²")) | st.text()


@pytest.fixture(scope="module")
def models(make_model):
    plain = {kind: make_model(kind) for kind in KINDS}
    wrapped = {
        kind: get_peft_model(
            copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
        )
        for kind, model in plain.items()
    }
    return {
        **{(kind, False): model for kind, model in plain.items()},
        **{(kind, True): m for kind, m in wrapped.items()},
    }


def names_of(model, kind):
    """The canonical names, from the modules of the plain model alone."""
    path, outer, _ = KINDS[kind]
    start = f"{outer}."
    names = {name.removeprefix(start) for name, _ in model.named_modules() if name.startswith(f"{start}{path}.")}
    return {name for name in names if name.split(".")[1].isdecimal()}


@given(st.data())
def test_every_spelling_leads_to_one_name(models, data):
    kind, wrapped = data.draw(st.sampled_from(sorted(models)))
    _, outer, attention = KINDS[kind]
    name = data.draw(st.sampled_from(sorted(names_of(models[kind, False], kind))))
    _, index, *inside = name.split(".", 2)
    suffix = f".{inside[0]}" if inside else ""
    spellings = {name, f"{outer}.{name}", f"layers.{index}{suffix}", f"model.layers.{index}{suffix}", index + suffix}
    lens = {"": "resid_post", ".mlp": "mlp_out", f".{attention}": "attn_out"}
    if suffix in lens:
        spellings.add(f"blocks.{index}.hook_{lens[suffix]}")
    if not suffix:
        spellings |= {int(index), f"blocks.{int(index) + 1}.hook_resid_pre", f"0{index}"}
    spelled = data.draw(st.sampled_from(sorted(spellings, key=str)))
    if isinstance(spelled, str):
        spelled = data.draw(st.sampled_from(["", " ", "\t"])) + spelled + data.draw(st.sampled_from(["", "\n"]))
    model = models[kind, wrapped]
    assert resolve_hookpoint(model, spelled) == name == resolve_hookpoint(model, name)
    assert layer_index(model, spelled) == int(index)
    if not wrapped:
        assert hooked_module(model, spelled) is model.get_submodule(f"{outer}.{name}")


@example("layers.0.")
@example("layers.-1")
@example("layers.٣")
@example("blocks.0.hook_resid_pre")
@example("layers.0..mlp")
@example("layers.0/../../1")
@example(True)
@given(anything | st.integers() | st.floats() | st.none() | st.booleans() | st.lists(st.integers()))
def test_anything_else_is_refused_in_our_own_words(models, spelled):
    for kind in KINDS:
        names = names_of(models[kind, False], kind)
        try:
            found = resolve_hookpoint(models[kind, False], spelled)
        except HookpointError as error:
            told = str(error)
        else:
            assert found in names
            assert isinstance(spelled, int | str) and not isinstance(spelled, bool)
            continue
        assert f"{KINDS[kind][0]}.0 to {KINDS[kind][0]}.{LAYERS - 1}" in told


@given(st.text(st.sampled_from("ab./\\:~\0 \n٣")) | st.text(max_size=20))
def test_no_path_of_an_artifact_leads_out_of_its_folder(path):
    root = Path("/some/folder")
    try:
        inside = check_inside(path, "path")
    except ValueError as error:
        told = str(error)
    else:
        place = Path(root, inside)
        assert place.is_relative_to(root) and ".." not in place.parts and "\\" not in inside
        assert check_inside(inside, "path") == inside
        return
    assert repr(path) in told


@given(st.text(st.sampled_from("layers.01/\\:~\0 ")) | st.sampled_from(["..", "../..", "/etc", "a/../../x", "~"]))
def test_an_sae_of_any_name_is_one_of_the_folder_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "no-saes-here"
    folder.mkdir(exist_ok=True)
    with pytest.raises(IncompatibleSAEError) as told:
        load_sae(folder, name)
    assert 20 < len(str(told.value)) < 2000
