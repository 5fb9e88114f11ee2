"""Loading and saving SAEs: both layouts against independent formulas, and every refusal."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae import checkpoint
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.sae.checkpoint import list_saes, load_sae, save_sae
from resa_hf.sae.layouts import sae_lens_hook_name

D_IN, LATENTS, K = 8, 24, 4


def make_sae(hookpoint: str | None = "layers.1", seed: int = 0) -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, K, hookpoint=hookpoint, seed=seed, metadata={"model_name": "tiny", "seed": seed})
    with torch.no_grad():
        sae.b_enc += torch.linspace(-0.2, 0.3, LATENTS)
        sae.b_dec += torch.linspace(-1, 1, D_IN)
    return sae


def make_x() -> Tensor:
    return torch.randn(5, 3, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5


def write_sparsify(folder: Path, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """An SAE in sparsify's layout, written by hand."""
    generator = torch.Generator().manual_seed(2)
    folder.mkdir(parents=True)
    W_dec = torch.randn(LATENTS, D_IN, generator=generator)
    tensors = {
        "encoder.weight": torch.randn(LATENTS, D_IN, generator=generator),
        "encoder.bias": torch.randn(LATENTS, generator=generator),
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(D_IN, generator=generator),
    }
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "sae.safetensors")
    defaults = {
        "activation": "topk",
        "d_in": D_IN,
        "expansion_factor": 32,
        "k": K,
        "multi_topk": False,
        "normalize_decoder": True,
        "num_latents": LATENTS,
        "skip_connection": False,
        "transcode": False,
    }
    (folder / "cfg.json").write_text(json.dumps({**defaults, **(config or {})}))
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a cfg.json, or tensors of a weight file; `None` takes the entry out."""
    content = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    content = {name: value for name, value in {**content, **changes}.items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))


def test_sae_lens_reads_what_is_saved(tmp_path: Path) -> None:
    sae, x = make_sae(), make_x()
    save_sae(sae, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert type(theirs) is sae_lens.TopKSAE
    torch.testing.assert_close(theirs(x), sae(x))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x))
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.hookpoint == "layers.1"
    assert theirs.cfg.metadata.model_name == "tiny"
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_sae_lens_from_pretrained_reads_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = make_sae(), make_x()
    save_sae(sae, tmp_path / "layers.1")

    def download(repo_id: str, filename: str, force_download: bool = False) -> str:
        assert repo_id == "someone/saes"
        if not (tmp_path / filename).exists():
            raise LocalEntryNotFoundError(filename)
        return str(tmp_path / filename)

    assert issubclass(LocalEntryNotFoundError, EntryNotFoundError)
    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    torch.testing.assert_close(sae_lens.SAE.from_pretrained("someone/saes", "layers.1")(x), sae(x))


def test_round_trip_keeps_every_bit_and_the_metadata(tmp_path: Path) -> None:
    sae = make_sae()
    save_sae(sae, tmp_path / "layers.1")
    for loaded in (load_sae(tmp_path), load_sae(str(tmp_path), "layers.1"), load_sae(tmp_path / "layers.1", ".")):
        assert isinstance(loaded, TopKSAE)
        for name, tensor in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert (loaded.d_in, loaded.num_latents, loaded.k, loaded.hookpoint) == (D_IN, LATENTS, K, "layers.1")
        assert loaded.metadata.items() >= sae.metadata.items()
        assert torch.equal(loaded(make_x()), sae(make_x()))


def test_dtype_and_overwriting(tmp_path: Path) -> None:
    save_sae(make_sae(seed=1), tmp_path)
    save_sae(make_sae(seed=0), tmp_path)
    narrow = load_sae(tmp_path, dtype=torch.bfloat16)
    assert next(narrow.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(make_x()), make_sae(seed=0)(make_x()), rtol=0.1, atol=0.1)
    save_sae(narrow, tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["W_dec"].dtype == torch.bfloat16
    assert sae_lens.SAE.load_from_disk(tmp_path).W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hookpoint", "name"),
    [
        ("layers.12", "blocks.12.hook_resid_post"),
        ("h.3", "blocks.3.hook_resid_post"),
        ("layers.12.mlp", "blocks.12.hook_mlp_out"),
        ("layers.0.self_attn", "blocks.0.hook_attn_out"),
        ("h.0.attn", "blocks.0.hook_attn_out"),
        ("layers.12.mlp.down_proj", "layers.12.mlp.down_proj"),
    ],
)
def test_hookpoints_in_the_words_of_sae_lens(hookpoint: str, name: str) -> None:
    assert sae_lens_hook_name(hookpoint) == name


@pytest.mark.parametrize("num_latents", [LATENTS, 0])
def test_sparsify_layout_equals_its_formula(tmp_path: Path, num_latents: int) -> None:
    config = {"num_latents": num_latents, "expansion_factor": LATENTS // D_IN}
    folder = write_sparsify(tmp_path / "layers.12.mlp", config)
    tensors, x = load_file(folder / "sae.safetensors"), make_x()
    pre = torch.relu(
        torch.nn.functional.linear(x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"])
    )
    values, indices = pre.topk(K, dim=-1)
    expected = torch.einsum("btk,btkd->btd", values, tensors["W_dec"][indices]) + tensors["b_dec"]
    for sae in (load_sae(tmp_path), load_sae(tmp_path, "layers.12.mlp"), load_sae(folder)):
        assert (sae.d_in, sae.num_latents, sae.k, sae.hookpoint) == (D_IN, LATENTS, K, "layers.12.mlp")
        torch.testing.assert_close(sae(x), expected)
    save_sae(load_sae(folder), tmp_path / "copy")
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path / "copy")(x), expected)


def test_sparsify_folder_of_another_name_knows_no_hookpoint(tmp_path: Path) -> None:
    assert load_sae(write_sparsify(tmp_path / "my-sae")).hookpoint is None


@pytest.mark.parametrize("options", [{"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}])
def test_options_of_sae_lens_topk_are_folded_exactly(tmp_path: Path, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D_IN, d_sae=LATENTS, k=K, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert isinstance(ours, TopKSAE)
    torch.testing.assert_close(ours(make_x()), theirs(make_x()))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_other_saes_of_sae_lens_are_read_and_saved(tmp_path: Path, architecture: str) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_class(architecture)
    # A TopK SAE that normalises its input cannot take our form either.
    extra = {"k": K, "normalize_activations": "layer_norm"} if architecture == "topk" else {}
    torch.manual_seed(0)
    theirs = sae_class(config_class(d_in=D_IN, d_sae=LATENTS, **extra))
    theirs.cfg.metadata.hook_name = "blocks.3.hook_mlp_out"
    theirs.save_model(tmp_path / "a")
    ours = load_sae(tmp_path / "a")
    assert isinstance(ours, SAELensSAE)
    assert (ours.d_in, ours.num_latents) == (D_IN, LATENTS)
    assert ours.k == (K if architecture == "topk" else None)
    assert ours.hookpoint == "blocks.3.hook_mlp_out"
    assert torch.equal(ours(make_x()), theirs(make_x()))
    save_sae(ours, tmp_path / "b")
    assert torch.equal(sae_lens.SAE.load_from_disk(tmp_path / "b")(make_x()), theirs(make_x()))
    assert torch.equal(load_sae(tmp_path / "b")(make_x()), theirs(make_x()))


def test_one_of_several_saes_has_to_be_chosen(tmp_path: Path) -> None:
    for seed, hookpoint in enumerate(("layers.0", "layers.1")):
        save_sae(make_sae(hookpoint, seed), tmp_path / hookpoint)
    save_sae(make_sae("layers.0", 5), tmp_path / "checkpoint-10" / "layers.0")
    with pytest.raises(IncompatibleSAEError, match=r"2 SAEs.*layers\.0, layers\.1"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, "layers.1").metadata["seed"] == 1
    assert load_sae(tmp_path, "checkpoint-10/layers.0").metadata["seed"] == 5
    with pytest.raises(IncompatibleSAEError, match=r"no folder 'layers\.7'.*layers\.0, layers\.1"):
        load_sae(tmp_path, "layers.7")
    assert list_saes(tmp_path) == ["checkpoint-10/layers.0", "layers.0", "layers.1"]
    shutil.rmtree(tmp_path / "layers.1")
    assert load_sae(tmp_path).metadata["seed"] == 0


@pytest.mark.parametrize("sae_id", ["../secret", "a/../../secret", "/etc", "..", "a\\..\\b", "C:/x", "a\0b"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, sae_id: str) -> None:
    save_sae(make_sae(), tmp_path / "secret")
    (tmp_path / "inside").mkdir()
    with pytest.raises(IncompatibleSAEError, match="sae_id"):
        load_sae(tmp_path / "inside", sae_id)


def corrupt(folder: Path, layout: str, case: str) -> None:
    weights = folder / ("sae_weights.safetensors" if layout == "sae-lens" else "sae.safetensors")
    encoder = "W_enc" if layout == "sae-lens" else "encoder.weight"
    tensors = load_file(weights)
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif case == "garbage":
        weights.write_bytes(b"not a safetensors file at all")
    elif case == "empty":
        weights.write_bytes(b"")
    elif case == "nan":
        tensors[encoder][3, 2] = torch.nan
        edit(weights, **{encoder: tensors[encoder]})
    elif case == "inf":
        edit(weights, b_dec=tensors["b_dec"] / 0)
    elif case == "shape":
        edit(weights, W_dec=tensors["W_dec"].t().contiguous())
    elif case == "dtype":
        edit(weights, b_dec=tensors["b_dec"].to(torch.int32))
    elif case == "missing tensor":
        edit(weights, W_dec=None)
    elif case == "extra tensor":
        edit(weights, W_skip=torch.zeros(D_IN, D_IN))
    elif case == "no weights":
        weights.unlink()
    elif case == "no config":
        (folder / "cfg.json").unlink()
    elif case == "bad json":
        (folder / "cfg.json").write_text("{'d_in': 8")
    elif case == "list":
        (folder / "cfg.json").write_text("[1]")
    elif case == "k":
        edit(folder / "cfg.json", k=LATENTS + 1)
    elif case == "k zero":
        edit(folder / "cfg.json", k=0)
    elif case == "d_in":
        edit(folder / "cfg.json", d_in="8")
    elif case == "other width":
        edit(folder / "cfg.json", d_in=D_IN + 1)


CASES = {
    "truncated": "corrupt or cut short",
    "garbage": "corrupt or cut short",
    "empty": "corrupt or cut short",
    "nan": r"(W_enc|encoder\.weight) has 1 entries that are NaN",
    "inf": "b_dec has 8 entries that are NaN or infinite",
    "shape": rf"W_dec has shape \[{D_IN}, {LATENTS}\].*\[{LATENTS}, {D_IN}\]",
    "dtype": "b_dec has dtype torch.int32",
    "missing tensor": "lacks the tensor W_dec",
    "extra tensor": "unexpected tensor W_skip",
    "no weights": "neither",
    "no config": "cfg.json is missing",
    "bad json": "not valid JSON",
    "list": "JSON object, not a list",
    "k": r"k is 25, more than the 24 latents",
    "k zero": "k must be a positive whole number, not 0",
    "d_in": "d_in must be a positive whole number, not '8'",
    "other width": r"has shape",
}


@pytest.mark.parametrize("layout", ["sae-lens", "sparsify"])
@pytest.mark.parametrize("case", CASES)
def test_a_broken_sae_is_refused_with_its_reason(tmp_path: Path, layout: str, case: str) -> None:
    folder = tmp_path / "layers.1"
    if layout == "sae-lens":
        save_sae(make_sae(), folder)
    else:
        write_sparsify(folder)
    load_sae(folder, ".")
    corrupt(folder, layout, case)
    with pytest.raises(IncompatibleSAEError, match=CASES[case]) as error:
        load_sae(folder, ".")
    assert "layers.1" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "transcoder"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
        ({"num_latents": 0, "expansion_factor": 0}, "expansion_factor"),
    ],
)
def test_other_coders_of_sparsify_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleSAEError, match=message):
        load_sae(write_sparsify(tmp_path / "layers.1", changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "transcoder"}, "transcoder"),
        ({"architecture": "skip_transcoder", "d_out": D_IN}, "transcoder"),
        ({"d_out": D_IN + 1}, "transcoder"),
        ({"architecture": "perceptron"}, "unknown architecture 'perceptron'"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"normalize_activations": "whatever"}, "whatever"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"metadata": 3}, "not a configuration"),
    ],
)
def test_other_coders_of_sae_lens_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_sae(make_sae(), tmp_path)
    edit(tmp_path / "cfg.json", **changes)
    with pytest.raises(IncompatibleSAEError, match=message):
        load_sae(tmp_path)


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["sae.pt", "sae_weights.pt", "sae_weights.safetensors", "sae.safetensors"])
def test_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    save_sae(make_sae(), tmp_path / "sae")
    (tmp_path / "sae" / "sae_weights.safetensors").unlink()
    (tmp_path / "sae" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for sae_id in (None, "sae"):
        with pytest.raises(IncompatibleSAEError):
            load_sae(tmp_path, sae_id)
    assert not (tmp_path / "exploded").exists()


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", "nowhere", "a/b/c"):
        with pytest.raises(IncompatibleSAEError, match="neither a folder nor"):
            load_sae(name)
    with pytest.raises(IncompatibleSAEError, match="holds no SAE"):
        load_sae(tmp_path)
    with pytest.raises(IncompatibleSAEError, match="revision"):
        load_sae(tmp_path, revision="main")
    with pytest.raises(IncompatibleSAEError, match="not downloaded yet"):
        load_sae("nobody/nothing")


class FakeHub:
    """One repository; remembers what was downloaded, and of which revision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloaded: list[str] = []
        self.revision: str | None = None

    def model_info(self, repo: str, revision: str | None = None) -> ModelInfo:
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        siblings = [{"rfilename": file} for file in files]
        return ModelInfo(id=repo, sha="0" * 40, siblings=siblings)

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        self.downloaded = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))
        self.revision = revision
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "HfApi", lambda: fake)
    monkeypatch.setattr(checkpoint, "snapshot_download", fake.snapshot_download)
    return fake


def test_only_the_files_of_one_sae_are_downloaded(hub: FakeHub) -> None:
    for seed, name in enumerate(("layers.1", "layers.[1]", "layers.12")):
        save_sae(make_sae(seed=seed), hub.folder / name)
    (hub.folder / "README.md").write_text("")
    write_sparsify(hub.folder / "layers.3.mlp")
    assert load_sae("someone/saes", "layers.1", revision="v1").metadata["seed"] == 0
    assert hub.downloaded == ["layers.1/cfg.json", "layers.1/sae_weights.safetensors"]
    assert hub.revision == "v1"
    assert load_sae("someone/saes", "layers.[1]").metadata["seed"] == 1
    assert hub.downloaded == ["layers.[1]/cfg.json", "layers.[1]/sae_weights.safetensors"]
    assert load_sae("someone/saes", "layers.3.mlp").hookpoint == "layers.3.mlp"
    assert hub.downloaded == ["layers.3.mlp/cfg.json", "layers.3.mlp/sae.safetensors"]
    with pytest.raises(IncompatibleSAEError, match=r"4 SAEs.*layers\.12"):
        load_sae("someone/saes")
    with pytest.raises(IncompatibleSAEError, match=r"no SAE 'layers\.9'.*layers\.12"):
        load_sae("someone/saes", "layers.9")
    assert list_saes("someone/saes") == ["layers.1", "layers.12", "layers.3.mlp", "layers.[1]"]


def test_the_only_sae_of_a_repository_is_taken(hub: FakeHub) -> None:
    save_sae(make_sae(), hub.folder)
    assert load_sae("someone/saes").metadata["seed"] == 0
    assert hub.downloaded == ["cfg.json", "sae_weights.safetensors"]


def test_what_was_downloaded_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--someone--saes"
    for seed, name in enumerate(("layers.1", "layers.2")):  # of a repository that may hold more
        save_sae(make_sae(seed=seed), cached / "snapshots" / ("a" * 40) / name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_sae("someone/saes", "layers.2").metadata["seed"] == 1
    assert load_sae("someone/saes", "layers.1", revision="a" * 40).metadata["seed"] == 0
    assert list_saes("someone/saes") == ["layers.1", "layers.2"]
    with pytest.raises(IncompatibleSAEError, match=r"no folder 'layers\.3'.*layers\.1, layers\.2"):
        load_sae("someone/saes", "layers.3")
    with pytest.raises(IncompatibleSAEError, match="not downloaded yet"):
        load_sae("someone/saes", "layers.2", revision="v2")


def test_a_failed_save_leaves_the_old_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(make_sae(seed=0), tmp_path / "sae")

    def full(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be saved: No space left.*sae"):
        save_sae(make_sae(seed=1), tmp_path / "sae")
    assert load_sae(tmp_path).metadata["seed"] == 0
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match=r"cannot be saved.*taken"):
        save_sae(make_sae(), tmp_path / "taken" / "sae")
