"""SAE repositories: one folder a hookpoint, which sae-lens, resa-hf and, on demand, sparsify read."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, constants
from safetensors.torch import save_file

from ..cards import sae_card
from ..errors import PublishError
from ..escaping import shown_all
from ..experiment.folder import read_json, write_json
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.checkpoint import load_sae, save_sae
from ..sae.layouts import CONFIG_FILE, SPARSIFY_WEIGHTS
from .folder_contents import Found, find, own_saes, reading_reports
from .licence_files import add_licence_files
from .licences import Licence, check_name, licence_of
from .staging import staged, write_evidence
from .upload import upload

SAE = TopKSAE | SAELensSAE


def push_sae_to_hub(
    sae: SAE | Mapping[str, SAE] | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    sparsify: bool = False,
    token: str | None = None,
    commit_message: str = "Upload SAEs with resa-hf",
) -> CommitInfo:
    """
    Publishes SAEs in one commit: one folder a hookpoint in sae-lens' layout, and a card.

    [`load_sae`] and `sae_lens.SAE.from_pretrained(repo_id, "layers.12")` read them, and with `sparsify=True` also
    `sparsify.SparseCoder.load_from_hub(repo_id, hookpoint="layers.12")`.

    Args:
        sae ([`TopKSAE`], [`SAELensSAE`], `Mapping` or `str`):
            An SAE that knows its hookpoint; several by their hookpoints; or the output folder of
            `resa-hf train-sae` or any other folder of SAEs, with the report of their training, if there is one.
        repo_id (`str`):
            `owner/name`; made if missing.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private. One that is there already must be.
        revision (`str`, *optional*):
            Branch, made if missing. `None`: `main`.
        sparsify (`bool`, *optional*, defaults to `False`):
            Also write sparsify's weights into the same folders, whose cfg.json then holds the keys of both. TopK only.
        token (`str`, *optional*):
            `None`: the saved one.
        commit_message (`str`, *optional*, defaults to `"Upload SAEs with resa-hf"`):
            Title of the commit.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit; as a `str`, its URL.

    Raises:
        `PublishError`: if they cannot be published; nothing was uploaded then.
        `IncompatibleSAEError`: if an SAE of the folder cannot be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(sae, str | os.PathLike):
            folder = Path(sae)
        else:
            folder = Path(temporary)
            for hookpoint, one in (sae if isinstance(sae, Mapping) else {sae.hookpoint or "": sae}).items():
                if one.hookpoint not in (None, hookpoint):
                    raise PublishError(f"The SAE of {hookpoint!r} says that it is one of {one.hookpoint!r}.")
                save_sae(one, folder / _checked(hookpoint))
        with reading_reports(folder):
            found = find(folder)
        with staged(folder, repo_id) as stage, reading_reports(folder):
            stage_saes(stage, repo_id, found.trained_with or found, sparsify=sparsify, token=token)
        return upload(stage, repo_id, private=private, branch=revision, message=commit_message, token=token)


def stage_saes(stage: Path, repo_id: str, found: Found, *, sparsify: bool, token: str | None = None) -> None:
    """
    Writes all files of an SAE repository.

    Args:
        stage (`Path`): an empty folder.
        repo_id (`str`): the repository.
        found ([`Found`]): with SAEs.
        sparsify (`bool`): whether to write sparsify's weights, too.
        token (`str`, *optional*): `None`: the saved one.

    Raises:
        `PublishError`: if there are none; if an SAE does not know its hookpoint, or sparsify has no form for it; or if
            the licence of the model that was read does not allow the repository's name.
    """
    if found.saes is None:
        raise PublishError("There is no SAE to publish: none was trained here.")
    record = found.record
    read = record.revisions.get("source", record.revisions.get("base", {}))
    licence = Licence()
    if name := read.get("name"):
        licence = licence_of(name, record.datasets, revision=read["commit"], token=token)
        check_name(repo_id, licence)
        licence = add_licence_files(stage, name, licence, revision=read["commit"], token=token)
    for name in own_saes(found.saes):
        sae = load_sae(found.saes, name)
        folder = stage / _checked(sae.hookpoint or ("" if name == "." else name))
        sae.metadata = _without_folders(sae.metadata)
        save_sae(sae, folder)
        if sparsify:
            _add_sparsify(sae, folder)
    write_evidence(stage, found)
    card = sae_card(repo_id, record, licence, sparsify=sparsify)
    (stage / constants.REPOCARD_NAME).write_text(card, encoding="utf-8")


def _without_folders(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folders of this machine, from which nobody else can load a model or a dataset."""
    unloadable = {key: None for key in ("model_name", "dataset_path") if Path(metadata.get(key) or "").is_absolute()}
    return {**shown_all(metadata), **unloadable}


def _checked(hookpoint: str) -> str:
    if re.fullmatch(r"\w[\w.-]*", hookpoint) is None:
        raise PublishError(
            f"{hookpoint!r} is not a hookpoint that can name a folder. Give the SAE one, such as 'layers.12': "
            'push_sae_to_hub({"layers.12": sae}, ...).'
        )
    return hookpoint


def _add_sparsify(sae: SAE, folder: Path) -> None:
    """sparsify's weights beside sae-lens', and its keys in the cfg.json of both: each drops those of the other."""
    if not isinstance(sae, TopKSAE):
        raise PublishError(f"sparsify has TopK SAEs only, and that of {sae.hookpoint!r} is another kind.")
    weights = {"encoder.weight": sae.W_enc.t(), "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / SPARSIFY_WEIGHTS, metadata={"format": "pt"})
    norms = sae.W_dec.detach().float().norm(dim=1)
    own = {
        "activation": "topk",
        "expansion_factor": sae.num_latents // sae.d_in,
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2)),
        "num_latents": sae.num_latents,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    write_json(folder / CONFIG_FILE, {**read_json(folder / CONFIG_FILE), **own})
