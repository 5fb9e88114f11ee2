"""What would fail after hours of a sweep, found before anything is done."""

from ..errors import DataError, HookpointError
from ..features.reasoning import CUES, R1_PROMPT, cued_prompt
from ..hookpoints import resolve_hookpoint
from ..models import load_skeleton, load_tokenizer
from .folder import check_settings
from .pipeline import free_sections
from .report import as_plain
from .sweep import HOOKPOINT, Point, Sweep


def check_sweep(sweep: Sweep) -> None:
    """Looks at what is there already, at the hookpoints, and at the prompt of the features. Writes nothing.

    Args:
        sweep ([`Sweep`]): what is to be done.

    Raises:
        `DataError`: if the folder of a point holds a run with other settings, or if the prompt lacks a cue.
        `HookpointError`: for a hookpoint that the model lacks, or that is not spelled as Stage I names its SAE.
    """
    for point in sweep.points:
        check_settings(point.root, as_plain(point.settings), free_sections(point.folder))
    models: dict[tuple[str, str | None], list[Point]] = {}
    for point in sweep.points:
        run = point.settings.run
        models.setdefault((run.model_name_or_path, run.model_revision), []).append(point)
    for (name, revision), points in models.items():
        if HOOKPOINT in points[0].values:
            skeleton = load_skeleton(name, revision=revision)
            for point in points:
                _check_hookpoint(point, resolve_hookpoint(skeleton, point.values[HOOKPOINT]))
    if sweep.features is not None:
        ((name, revision),) = models
        tokenizer = load_tokenizer(name, revision=revision)
        try:
            cued_prompt(tokenizer, sweep.features.prompt or R1_PROMPT, sweep.features.cues or CUES)
        except DataError as error:
            raise DataError(f"features: {error}") from error


def _check_hookpoint(point: Point, found: str) -> None:
    given = point.values[HOOKPOINT]
    if point.settings.run.sae is None and given != found:
        raise HookpointError(f"grid: hookpoint is {given!r}; the SAE that Stage I trains there is named {found!r}.")
