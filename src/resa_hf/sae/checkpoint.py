"""Load an SAE from the Hub or a folder, save one to a folder. Weights are safetensors, and nothing is unpickled."""

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import sae_lens
import torch
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

from ..downloads import hub_errors
from ..errors import IncompatibleSAEError
from ..places import Place, check_inside, parse_place
from ..writing import writing
from .autoencoder import SAELensSAE, TopKSAE
from .layouts import CONFIG_FILE, SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS, read_sae, sae_lens_hook_name

_WEIGHTS = (SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS)


def load_sae(
    name_or_path: str | os.PathLike[str],
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TopKSAE | SAELensSAE:
    """
    Loads an SAE from a folder or from the Hub, in sae-lens' or sparsify's layout, found by its files.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder, or a Hub repository such as `"EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k"`, also as
            `owner/name@revision/sub/folder`. From a repository only the files of this SAE are downloaded.
        sae_id (`str`, *optional*):
            The folder of the SAE inside, for example `"layers.12.mlp"`; `"."` is the folder itself. Without it, the
            only SAE inside is taken; checkpoints of a training run (`checkpoint-*`) do not count.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to put the SAE.
        dtype (`torch.dtype`, *optional*):
            dtype of its weights. `None` means that of the file.

    Returns:
        [`TopKSAE`] or [`SAELensSAE`]: a module with `forward(x)`, `encode(x)`, `decode(z)`, and `d_in`, `num_latents`,
        `k` (`None` if not TopK), `hookpoint`, `metadata`. Its weights require gradients, as those of any new module.

    Raises:
        `IncompatibleSAEError`: if there is no such SAE, or several and no `sae_id`; if it is a transcoder; if a file
            is missing or corrupt; if a tensor has the wrong shape or dtype, or is not finite. The message names the
            file and the tensor.
        `OSError`: if the Hub cannot be reached, or the disk is full; a rerun goes on from there.
    """
    place = _place(name_or_path, revision)
    if sae_id is not None:
        sae_id = _checked(sae_id, "sae_id")
    root = Path(place.name)
    if not place.is_folder:
        root, sae_id = _download(place, sae_id)
    if sae_id is None:
        sae_id = _only_sae(place, _local_saes(root))
    if not os.path.isdir(root / sae_id):
        raise IncompatibleSAEError(
            f"{str(place)!r} has no folder {sae_id!r}. SAEs there: {_listed(_local_saes(root))}."
        )
    return read_sae(root / sae_id, root).to(device=device, dtype=dtype)


def list_saes(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> list[str]:
    """
    The SAEs in a folder or Hub repository, as the `sae_id`s that [`load_sae`] takes.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder, or a Hub repository, as [`load_sae`] takes them.
        revision (`str`, *optional*): branch, tag or commit of the repository.

    Returns:
        `list[str]`: sorted; `"."` stands for the folder itself.

    Raises:
        `IncompatibleSAEError`: if there is no such folder or repository.
    """
    place = _place(name_or_path, revision)
    if place.is_folder:
        return sorted(_local_saes(Path(place.name)))
    with hub_errors(place.name, place.revision, IncompatibleSAEError):
        return sorted(_local_saes(_cached(place)) if constants.HF_HUB_OFFLINE else _hub_saes(place))


def save_sae(sae: TopKSAE | SAELensSAE, folder: str | os.PathLike[str]) -> None:
    """
    Saves an SAE in sae-lens' layout: `sae_lens.SAE.load_from_disk(folder)` and [`load_sae`] read it.

    The metadata get `hook_name` as sae-lens spells it, and `hookpoint` as resa-hf does. Each file is first written
    beside the folder's own and then renamed, so that an interrupted save leaves no half file.

    Args:
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE.
        folder (`str` or `os.PathLike`):
            Where to save it; made if missing.

    Raises:
        `OSError`: if the folder cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(sae).items()}
    config = json.dumps(_config(sae), indent=2)
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            save_file(weights, Path(temporary) / SAE_LENS_WEIGHTS, metadata={"format": "pt"})
            (Path(temporary) / CONFIG_FILE).write_text(config, encoding="utf-8")
            for name in (SAE_LENS_WEIGHTS, CONFIG_FILE):
                os.replace(Path(temporary) / name, folder / name)


def _state(sae: TopKSAE | SAELensSAE) -> dict[str, torch.Tensor]:
    inner = sae.sae if isinstance(sae, SAELensSAE) else sae
    return dict(inner.state_dict())


def _config(sae: TopKSAE | SAELensSAE) -> dict[str, Any]:
    """The content of cfg.json. The metadata come from the SAE, so that nothing stale in sae-lens' config survives."""
    metadata = {**sae.metadata, "sae_lens_version": sae_lens.__version__, "hookpoint": sae.hookpoint}
    if sae.hookpoint is not None:
        metadata["hook_name"] = sae_lens_hook_name(sae.hookpoint)
    if isinstance(sae, SAELensSAE):
        config = sae.sae.cfg.to_dict()
    else:
        config = sae_lens.TopKSAEConfig(d_in=sae.d_in, d_sae=sae.num_latents, k=sae.k).to_dict()
    dtype = next(sae.parameters()).dtype
    stored = SAEMetadata(**metadata).to_dict()
    return {**config, "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "metadata": stored}


def _place(name_or_path: str | os.PathLike[str], revision: str | None) -> Place:
    try:
        return parse_place(os.fspath(name_or_path), revision=revision)
    except ValueError as error:
        raise IncompatibleSAEError(f"No SAE can be loaded: {error}") from error


def _checked(path: str, what: str) -> str:
    try:
        return check_inside(path, what)
    except ValueError as error:
        raise IncompatibleSAEError(str(error)) from error


def _local_saes(root: Path) -> list[str]:
    """Folders below `root`, relative to it, that hold an SAE."""
    folders = [path.parent for path in root.rglob(CONFIG_FILE)]
    return [
        folder.relative_to(root).as_posix()
        for folder in folders
        if any((folder / name).is_file() for name in _WEIGHTS)
    ]


def _listed(found: list[str]) -> str:
    return ", ".join(sorted(found)) or "none"


def without_checkpoints(sae_ids: Iterable[str]) -> list[str]:
    """Leaves out the checkpoints of a training run, and the copies that were published from it."""
    return [sae_id for sae_id in sae_ids if not re.search(r"(^|/)(checkpoint-\d+|published)(/|$)", sae_id)]


def _only_sae(place: Place, found: list[str]) -> str:
    usual = without_checkpoints(found)
    if len(usual) == 1:
        return usual[0]
    if not usual:
        raise IncompatibleSAEError(
            f"{str(place)!r} holds no SAE: no folder with {CONFIG_FILE} and {' or '.join(_WEIGHTS)}. Pickles are not "
            "read."
        )
    raise IncompatibleSAEError(f"{str(place)!r} holds {len(usual)} SAEs. Choose one by sae_id: {_listed(usual)}.")


def _hub_saes(place: Place) -> list[str]:
    """Folders inside a place on the Hub that hold an SAE."""
    info = HfApi().model_info(place.name, revision=place.revision)
    files = [PurePosixPath(sibling.rfilename) for sibling in info.siblings or []]
    root = PurePosixPath(place.subfolder or "")
    found = saes_among(path.relative_to(root) for path in files if path.is_relative_to(root))
    return [_checked(folder, "the folder") for folder in found]


def saes_among(paths: Iterable[PurePosixPath]) -> list[str]:
    """The folders that hold an SAE, of all files' paths."""
    files = set(paths)
    folders = [path.parent for path in files if path.name == CONFIG_FILE]
    return [folder.as_posix() for folder in folders if any(folder / name in files for name in _WEIGHTS)]


def _cached(place: Place) -> Path:
    """The place in the local cache; `snapshot_download` refuses a repository of which it holds some files only."""
    for cached in scan_cache_dir(constants.HF_HUB_CACHE).repos:
        if cached.repo_id == place.name and cached.repo_type == "model":
            for snapshot in cached.revisions:
                if (place.revision or "main") in snapshot.refs or snapshot.commit_hash == place.revision:
                    return snapshot.snapshot_path / (place.subfolder or "")
    raise LocalEntryNotFoundError(f"{place} is not in the cache.")


def _download(place: Place, sae_id: str | None) -> tuple[Path, str | None]:
    """Fetches the files of one SAE; returns the local root and the id."""
    with hub_errors(place.name, place.revision, IncompatibleSAEError):
        if constants.HF_HUB_OFFLINE:
            return _cached(place), sae_id
        found = _hub_saes(place)
        if sae_id is None:
            sae_id = _only_sae(place, found)
        elif sae_id not in found:
            raise IncompatibleSAEError(f"{str(place)!r} has no SAE {sae_id!r}. SAEs there: {_listed(found)}.")
        folder = PurePosixPath(place.subfolder or "", sae_id)
        wanted = [glob.escape((folder / name).as_posix()) for name in (CONFIG_FILE, *_WEIGHTS)]
        # By the name of the revision and not its commit: only then is it found again offline.
        root = Path(snapshot_download(place.name, revision=place.revision, allow_patterns=wanted))
        return root / (place.subfolder or ""), sae_id
