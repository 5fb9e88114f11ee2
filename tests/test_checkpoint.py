"""Loading and saving SAEs: both layouts against independent formulas, folders and repositories."""

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
from sae_files import D_IN, LATENTS, K, make_sae, make_x, write_sparsify
from safetensors.torch import load_file
from torch import Tensor

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae import checkpoint
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.sae.checkpoint import list_saes, load_sae, save_sae
from resa_hf.sae.layouts import sae_lens_hook_name


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
    difference = (narrow(make_x()) - make_sae(seed=0)(make_x())).abs().amax(-1)
    # Of two latents that are nearly as large, rounding may choose the other one.
    assert difference.median() < 0.02 and (difference > 0.1).sum() <= difference.numel() // 10
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
    with pytest.raises(OSError, match=r"sae cannot be written: No space left"):
        save_sae(make_sae(seed=1), tmp_path / "sae")
    assert load_sae(tmp_path).metadata["seed"] == 0
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match=r"taken/sae cannot be written: Not a directory"):
        save_sae(make_sae(), tmp_path / "taken" / "sae")


def test_checkpoints_inside_a_run_folder_do_not_count_either(tmp_path: Path) -> None:
    # `resa-hf run` keeps Stage I's checkpoints in a folder of their own beside the finished SAE.
    save_sae(make_sae("layers.0", 3), tmp_path / "layers.0")
    save_sae(make_sae("layers.0", 5), tmp_path / "run" / "checkpoint-50" / "layers.0")
    assert load_sae(tmp_path).metadata["seed"] == 3
