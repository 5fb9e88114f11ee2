"""The work of `resa-hf features`, and its report: to read, to parse, to look at, and all as one page."""

from dataclasses import asdict

from ..evaluation.cost import current_device
from ..features.arguments import FeatureArguments
from ..features.firings import check_latents
from ..features.page import write_page
from ..hookpoints import resolve_hookpoint
from ..provenance import Revisions, base_revisions, data_revisions, model_revisions, sae_revision
from .feature_tests import attribution_part, effects_part, matching_part, own_answers
from .features import (
    Part,
    Parts,
    Subject,
    claim_folder,
    examples_part,
    layers_part,
    load_subject,
    mixture_part,
    quality_part,
)
from .features_pictures import draw_pictures
from .features_text import features_text
from .folder import write_json, write_whole
from .report import versions


def run_features(args: FeatureArguments) -> str:
    """Does what is missing in the output folder, and writes report.md, report.json, report.html and the pictures.

    Returns:
        `str`: the report, for the terminal.

    Raises:
        `DataError`: if data or prompt cannot be used, or the folder holds something that was made with other settings.
        `HookpointError`, `IncompatibleSAEError`: if the SAEs do not fit the model.
    """
    subject = load_subject(args)
    folder = claim_folder(args)  # once the settings are known to be of use
    part = Parts(folder)
    found: Part = {"layers": part("layers", lambda: layers_part(subject))}
    found["quality"] = part("quality", lambda: quality_part(subject))
    found["mixture"] = mixture_part(found["layers"], args)
    hookpoint = _tested_hookpoint(subject, found)
    layer = next(layer for layer in found["layers"] if layer["hookpoint"] == hookpoint)
    reasoning = layer["latents"]
    answers = own_answers(subject)
    named = reasoning[: args.tested] if args.test_latents is None else (
        check_latents(args.test_latents, layer["num_latents"]).tolist()
    )  # fmt: skip
    # Latents that attribution chooses are tested on other texts than those on which it does.
    chosen_on, tested_on = (answers, answers) if named else answers.halves()
    found["attribution"] = part("attribution", lambda: attribution_part(subject, hookpoint, chosen_on, named))
    latents = named or found["attribution"]["largest"][: args.tested]
    found["tested"] = {"hookpoint": hookpoint, "latents": latents, "reasoning": bool(set(latents) <= set(reasoning))}
    found["effects"] = part("effects", lambda: effects_part(subject, hookpoint, tested_on, latents))
    found["examples"] = part("examples", lambda: examples_part(subject, hookpoint, latents))
    if args.has_other:
        found["matching"] = part("matching", lambda: matching_part(subject, hookpoint, answers))
    found["revisions"] = _revisions(subject)
    cues = [place for cue in subject.prompt.spans for span in cue for place in span]
    text, pictures = features_text(args, found), draw_pictures(folder / "pictures", subject.prompt.tokens, cues, found)
    title = f"Where the reasoning sits in {args.model_name_or_path}"
    write_whole(folder / "report.md", f"# {title}\n\n{text}\n")
    write_json(
        folder / "report.json",
        {
            "settings": asdict(args),
            "prompt": {"tokens": subject.prompt.tokens, "cues": subject.prompt.spans},
            **found,
            "device": current_device(),
            "versions": versions(),
        },
    )
    write_page(folder / "report.html", title, f"# {title}\n\n{text}", pictures)
    return text


def _revisions(subject: Subject) -> Revisions:
    """The models, SAEs and the dataset."""
    args, data = subject.args, subject.data
    found = base_revisions(args) | sae_revision("sae", args.saes, None)
    if args.has_other:
        name = args.other_model or args.model_name_or_path
        found |= model_revisions("other", name, args.other_revision, args.other_adapter)
    read = {"dataset": args.dataset, "dataset_repo": data.repo, "dataset_commit": data.commit}
    return found | sae_revision("other_sae", args.other_saes, None) | data_revisions(read)


def _tested_hookpoint(subject: Subject, found: Part) -> str:
    """The one that the settings name, or the first that is suggested and has reasoning latents, or the first."""
    if subject.args.test_hookpoint is not None:
        return resolve_hookpoint(subject.model, subject.args.test_hookpoint)
    counted = {layer["hookpoint"]: len(layer["latents"]) for layer in found["layers"]}
    suggested = [] if found["mixture"] is None else found["mixture"]["suggested"]
    return next((name for name in (*suggested, *counted) if counted[name]), next(iter(counted)))
