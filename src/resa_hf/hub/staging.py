"""The folder in which a repository is put together, before any of it is uploaded; it stays for the user to look at."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ..errors import PublishError
from ..escaping import shown_all
from ..experiment.folder import write_json
from ..experiment.stages import STAGE1
from .folder_contents import REPORT, Found, read_report
from .record import Record
from .upload import check_repo_id

PUBLISHED, PICTURE = "published", "report.png"


@contextmanager
def staged(folder: Path, repo_id: str) -> Iterator[Path]:
    """
    An empty folder, `published/<repository's name>` in the folder that is published from, for the block to fill.

    Raises:
        `PublishError`: if something cannot be read or written, such as for lack of space; or for what is no name.
    """
    check_repo_id(repo_id)
    stage = folder / PUBLISHED / repo_id.rpartition("/")[2]
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
    except (OSError, SafetensorError) as error:
        raise PublishError(f"{repo_id} was not published. It could not be put together in {stage}: {error}") from error


def write_evidence(stage: Path, found: Found) -> None:
    """What the card speaks of: the reports with their pictures, and the recipe; without the paths of this machine."""
    write_recipe(stage, found.record)
    reports: dict[Path, tuple[Mapping[str, Any] | None, Path | None]] = {
        stage: (found.record.report, found.report),
        stage / "evaluation": (found.record.evaluation, found.evaluation),
    }
    if found.trained_with is not None and found.trained_with.report != found.report:
        reports[stage / "sae"] = (found.trained_with.record.report, found.trained_with.report)
    for target, (content, home) in reports.items():
        if content is None:
            continue
        # Not the file itself: the token that its settings may hold has been taken out.
        write_json(target / REPORT, shown_all(content))
        if home is not None and (home / PICTURE).is_file() and not (home / PICTURE).is_symlink():
            shutil.copyfile(home / PICTURE, target / PICTURE)
    saes = (found.trained_with or found).saes
    if saes is not None and (saes / STAGE1).is_file():
        write_json(stage / STAGE1, shown_all(read_report(saes / STAGE1)))


def write_recipe(stage: Path, record: Record) -> None:
    """recipe.yaml, as `--config` takes it."""
    if record.recipe:
        text = yaml.safe_dump(shown_all(record.recipe), sort_keys=False, allow_unicode=True)
        (stage / "recipe.yaml").write_text(text, encoding="utf-8")
