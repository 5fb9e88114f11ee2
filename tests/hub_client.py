"""The side of the clients: this process's Hugging Face libraries use the local Hub, or find the disk full."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants, hf_api
from transformers.utils import hf_api as transformers_api


def point_clients_at(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do to a process that has imported the libraries what `hub.env(home)` does to a fresh one.

    They read the environment once, when imported.
    """
    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
    hub_constants = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, constant in hub_constants.items():
        monkeypatch.setattr(constants, name, constant)
    for api in (hf_api.api, transformers_api()):
        monkeypatch.setattr(api, "endpoint", hub.endpoint)
    datasets_constants = {
        "HF_ENDPOINT": hub.endpoint,
        "HUB_DATASETS_URL": hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_CACHE_HOME": str(home),
        "HF_DATASETS_CACHE": home / "datasets",
        "HF_MODULES_CACHE": home / "modules",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }
    for name, constant in datasets_constants.items():
        monkeypatch.setattr(datasets.config, name, constant)
    # Both keep what they learnt of another endpoint.
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()


@contextmanager
def full_disk(suffix: str) -> Iterator[None]:
    """Files whose names end so are written to /dev/full, where the kernel itself says that there is no space."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    opened = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        full = "w" in mode and self.name.endswith(suffix)
        return opened(Path("/dev/full") if full else self, mode, *args, **kwargs)

    with patch.object(Path, "open", open_full):
        yield
