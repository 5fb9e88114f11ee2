"""What `resa-hf features` has found, in sentences and tables."""

from collections.abc import Sequence
from typing import Any

from ..evaluation.tables import markdown
from ..features.arguments import FeatureArguments
from ..features.matching import MOST_LATENTS
from ..features.mixture import layer_entropy
from ..provenance import Revisions

Part = dict[str, Any]
ALPHA = 0.05


def features_text(args: FeatureArguments, found: Part) -> str:
    """The report in Markdown, without its title."""
    parts = [
        "## In short",
        "\n".join(f"- {line}" for line in _in_short(args, found)),
        "## Reasoning latents by layer",
        _layers_intro(args, found),
        "![Reasoning latents per layer](pictures/counts.png)",
        _layers_table(found),
        _mixture_lines(found),
        "![Reasoning latents by token of the prompt](pictures/prompt.png)" if _counted(found) else "",
        "## Quality of the SAEs",
        "![Quality of the SAE of each layer](pictures/quality.png)",
        _quality_table(found),
        "## What the latents do",
        _effects_intro(args, found),
        "![Effect of editing latents](pictures/effects.png)" if found["effects"]["edits"] else "",
        _effects_table(found),
        "## Attribution",
        _attribution_lines(args, found),
        _attribution_table(found),
        *(_matching(found["matching"]) if "matching" in found else []),
        "## Top activating examples",
        *(_examples(one) for one in found["examples"]),
        "## What was read",
        _revisions_table(found["revisions"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _counted(found: Part) -> int:
    return sum(len(layer["latents"]) for layer in found["layers"])


def _in_short(args: FeatureArguments, found: Part) -> list[str]:
    layers, total = found["layers"], _counted(found)
    cues = " and ".join(f"`{cue}`" for cue in args.cues)
    lines = [
        f"Reasoning latents, active at {cues} and at no other token of the prompt: {total}, at "
        f"{sum(bool(layer['latents']) for layer in layers)} of {len(layers)} hookpoints."
    ]
    if total:
        frequency = layers[0]["totals"]["same_frequency"]
        more = "more than" if frequency["p_value"] <= ALPHA else "not distinguishably more than"
        about = "about " if layers[0]["frequency_gap"] else ""
        lines.append(
            f"That is {more} other tokens that occur {about}as often have: {frequency['mean']:.1f} on average "
            f"(95% of {frequency['controls']} choices: {frequency['low']:g} to {frequency['high']:g}; "
            f"p = {frequency['p_value']:.2g})."
        )
        by_cue = sum(len(layer["cue_token_latents"]) for layer in layers)
        lines.append(
            f"Latents of the cue's tokens among them, active at the same cues in ordinary prose, too, in more than "
            f"half of {args.passages} passages: {by_cue}. The others, for which the cues alone do not suffice: "
            f"{total - by_cue}."
        )
    if found["mixture"] is not None:
        lines.append(f"Suggested hookpoints: {', '.join(found['mixture']['suggested'])}.")
    return [*lines, _verdict(found)]


def _verdict(found: Part) -> str:
    """The one test that was set beforehand: all tested latents ablated together, by answers if there are any."""
    hookpoint, edits = found["tested"]["hookpoint"], found["effects"]["edits"]
    primary = next((edit for edit in edits if edit["change"] == "ablate" and edit["together"]), None)
    if primary is None:
        reason = " ".join(found["effects"]["without_null"]) or "no latent to test is active on the text."
        return f"What was to be tested at {hookpoint} could not be: {reason}"
    count, kind = len(primary["latents"]), "reasoning latent" if found["tested"]["reasoning"] else "latent"
    what = f"the tested {kind} of {hookpoint}" if count == 1 else f"the {count} tested {kind}s of {hookpoint} together"
    if primary["accuracy"] is None:
        measured, null = f"moves the next token by {_kl(primary['kl'])} nats of KL", primary["nulls"]["kl"]
        changed, like = "it", f"{null['mean']:.3g} nats (95%: {null['low']:.3g} to {null['high']:.3g})"
    else:
        line, null = primary["accuracy"], primary["nulls"]["accuracy"]
        measured = (
            "changes no answer from right to wrong or back"
            if line["low"] == line["high"] == 0
            else f"changes accuracy by {100 * line['estimate']:+.1f} points (95%: {100 * line['low']:+.1f} to "
            f"{100 * line['high']:+.1f})"
        )
        changed = "accuracy"
        like = f"{100 * null['mean']:+.1f} points (95%: {100 * null['low']:+.1f} to {100 * null['high']:+.1f})"
    alike = (
        f"{null['n']} " + ("" if count == 1 else f"sets of {count} ") + "random latents of like firing rate and norm"
    )
    return f"Ablating {what} {measured}; {alike} change {changed} by {like} on average. {_decided(null)}"


def _decided(null: Part) -> str:
    if 1 / (1 + null["n"]) > ALPHA:
        return f"**Too few random latents to tell** (p = {null['p_value']:.2g})."
    more = null["p_value"] <= ALPHA
    decided = "More than random latents do" if more else "Not distinguishable from random latents"
    return f"**{decided}** (p = {null['p_value']:.2g})."


def _layers_intro(args: FeatureArguments, found: Part) -> str:
    where = "each occurrence" if args.every_occurrence else "at least one occurrence"
    gap = found["layers"][0]["frequency_gap"]
    near = f" (their frequencies differ from the cues' by up to {gap})" if gap else ""
    return (
        f"A reasoning latent is active at {where} of each cue and nowhere else in the prompt. Beside its count: the "
        f"same count for other tokens of the prompt that occur as often{near}, and for the same cues at the same "
        "positions in ordinary prose. p: the share of other tokens with at least as many, the cues "
        "counted as one; not corrected for the number of hookpoints."
    )


def _layers_table(found: Part) -> str:
    head = ["hookpoint", "latents", "other tokens", "95% range", "p", "in prose", "95% range ", "cue-token", "context"]
    head.append("which")
    rows = []
    for layer in found["layers"]:
        frequency, prose = layer["same_frequency"], layer["prose"]
        rows.append(
            [
                layer["hookpoint"],
                str(len(layer["latents"])),
                f"{frequency['mean']:.2f}",
                f"{frequency['low']:g} to {frequency['high']:g}",
                f"{frequency['p_value']:.2g}",
                f"{prose['mean']:.2f}",
                f"{prose['low']:g} to {prose['high']:g}",
                str(len(layer["cue_token_latents"])),
                str(len(layer["context_latents"])),
                _listed(layer["latents"]),
            ]
        )
    return markdown(head, rows)


def _listed(latents: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, latents[:most])) + (f" and {len(latents) - most} more" if len(latents) > most else "")


def _mixture_lines(found: Part) -> str:
    mixture = found["mixture"]
    if mixture is None:
        return "No mixture is fitted: no latent was counted at any layer."
    means, weights = (", ".join(f"{value:.{digits}f}" for value in values) for values, digits in (
        (mixture["means"], 1), ([100 * weight for weight in mixture["weights"]], 0)
    ))  # fmt: skip
    entropy = layer_entropy([len(layer["latents"]) for layer in found["layers"]])
    return (
        f"Gaussian mixture ({len(mixture['means'])}) over the layers (numbered from 0), weighted by the counts: "
        f"means {means}; weights {weights}%; BIC {mixture['bic']:.1f}. Entropy of the counts over the layers: "
        f"{entropy:.3f} nats. The hookpoints nearest to the means, the heaviest first: "
        f"{', '.join(mixture['suggested'])}. That is where to try first, not a result: `resa-hf sweep` tests it."
    )


def _quality_table(found: Part) -> str:
    names = {"fvu": "FVU", "l0": "L0", "dead_share": "dead share", "ce_recovered": "CE recovered"}
    rows = [
        [hookpoint, *("" if quality[key] is None else f"{quality[key]:.4g}" for key in names)]
        for hookpoint, quality in found["quality"].items()
    ]
    return markdown(["hookpoint", *names.values()], rows)


def _effects_intro(args: FeatureArguments, found: Part) -> str:
    tested, silent = found["tested"], found["effects"]["silent"]
    of_all = next(len(layer["latents"]) for layer in found["layers"] if layer["hookpoint"] == tested["hookpoint"])
    if args.test_latents:
        kind = "What is tested are the latents that the settings name"
    elif tested["reasoning"]:
        first = f", the first {len(tested['latents'])} of {of_all}" if len(tested["latents"]) < of_all else ""
        kind = f"What is tested are its reasoning latents{first}"
    else:
        kind = (
            "It has no reasoning latents, so that those with the largest attribution on the first half of the texts "
            "are tested, on the other half"
        )
    text = "problems with the model's own answers" if args.problems else "held-out text"
    lines = [
        f"The SAE of {tested['hookpoint']} is spliced in with its error term kept, so that nothing else changes. "
        f"{kind}: {_listed(tested['latents'], 20)}. KL is of the next token, untouched against edited, on {text}. "
        "Null: the same edit of random latents of like firing rate and norm (mean and 95% range). The test that "
        "counts is the ablation of all together; the other p values are not corrected for their number, and none can "
        "be below 1 / (1 + number of nulls)."
    ]
    if silent:
        lines.append(f"Not tested, since they are never active on {text}: {_listed(silent, 20)}.")
    lines += found["effects"]["without_null"]
    return " ".join(lines)


def _effects_table(found: Part) -> str:
    head = ["edit", "latents", "KL, nats a token", "95% interval", "null", "p", "accuracy, points", "95% interval "]
    head += ["null ", "p ", "length, tokens", "95% interval  ", "null  ", "p  "]
    rows = []
    for edit in found["effects"]["edits"]:
        cells = [edit["change"], _listed(edit["latents"], 4), *_measure(edit, "kl", 1, ".3g")]
        rows.append([*cells, *_measure(edit, "accuracy", 100, "+.1f"), *_measure(edit, "length", 1, "+.2f")])
    return markdown(head, rows) if rows else ""


def _measure(edit: Part, name: str, scale: float, form: str) -> list[str]:
    if edit[name] is None:
        return [""] * 4
    line, null = edit[name], edit["nulls"][name]
    middle, low, high, mean, bottom, top = (
        f"{scale * value:{form}}"
        for value in (line["estimate"], line["low"], line["high"], null["mean"], null["low"], null["high"])
    )
    return [middle, f"{low} to {high}", f"{mean} ({bottom} to {top})", f"{null['p_value']:.2g}"]


def _kl(interval: Part) -> str:
    return f"{interval['estimate']:.3g} (95%: {interval['low']:.3g} to {interval['high']:.3g})"


def _attribution_lines(args: FeatureArguments, found: Part) -> str:
    part = found["attribution"]
    texts = "of the model's own answers (right ones, if there are any)" if args.problems else "held-out texts"
    by = {name: "not defined" if value is None else f"{value:.2f}" for name, value in part["rank_correlation"].items()}
    return (
        f"What each latent contributes to the log-likelihood of {part['answers']} {texts}, in nats a text: by "
        "gradient times activation, by integrated gradients (from all latents at 0), and by really ablating it alone. "
        f"Rank correlation with the ablation over {len(part['checked'])} latents (those tested, those with the "
        f"largest attribution, and random ones): {by['gradient_times_activation']} and {by['integrated_gradients']}."
    )


def _attribution_table(found: Part) -> str:
    names = ("gradient_times_activation", "integrated_gradients", "ablation")
    ordered = sorted(found["attribution"]["checked"], key=lambda line: -abs(line["ablation"]))
    rows = [[str(line["latent"]), *(f"{line[name]:+.3g}" for name in names)] for line in ordered]
    return markdown(["latent", "gradient x activation", "integrated gradients", "ablation"], rows)


def _matching(part: Part) -> list[str]:
    two = part["read_on_two"]
    lines = [
        "## The same latents in the other model",
        f"The SAE read on both models at the same tokens: {_survive(two, 'latents go with themselves')}. FVU "
        f"{two['fvu'][0]:.3g} on the first, {two['fvu'][1]:.3g} on the other.",
    ]
    if "decoder" in part:
        lines += [
            f"Latents of the SAE that fire, the most frequent {MOST_LATENTS:,} at most, paired with those of the "
            "other model's own. By decoder: "
            f"{_survive(part['decoder'], 'pairs are alike')}. By activation: "
            f"{_survive(part['activation'], 'pairs are alike')}.",
        ]
        if part["same_start"]:
            lines.append(
                "Both SAEs were trained from the same random weights, their seed being the same. That alone makes "
                "decoders alike: train one of them with another `--seed`."
            )
        lines.append("![Latents matched across models](pictures/matching.png)")
    return lines


def _survive(part: Part, what: str) -> str:
    share, (low, high) = part["share"], part["null_share"]
    if high < ALPHA:  # of a null without ties 5% lie above its threshold
        return (
            f"too few tokens to tell how many of the {what}: so many similarities of the null are equal that "
            f"{100 * high:.1f}% of a draw at most, and not 5%, are above the 95th percentile ({part['threshold']:.3g})"
        )
    return (
        f"{100 * share['estimate']:.1f}% ({100 * share['low']:.1f} to {100 * share['high']:.1f}) of the {what} more "
        f"than 95% of the null do ({100 * low:.1f} to {100 * high:.1f}% in draws of the null)"
    )


def _revisions_table(revisions: Revisions) -> str:
    rows = [
        [role, "/".join(filter(None, (one["name"], one.get("subfolder")))), one["commit"] or ""]
        for role, one in revisions.items()
    ]
    return markdown(["what", "place", "commit"], rows)


def _examples(one: Part) -> str:
    words = ", ".join(f"`{token}` {value:+.1f}" for token, value in one["nearest_tokens"])
    lines = [f"### Latent {one['latent']}", f"Nearest tokens of its decoder row: {words}."]
    if not one["examples"]:
        lines.append("Not active on held-out text.")
    for example in one["examples"]:
        peak = max(range(len(example["values"])), key=lambda i: example["values"][i])
        text = [*example["text"]]
        text[peak] = f"[[{text[peak]}]]"
        lines.append(f"    {example['value']:.2f}  row {example['row']}: {''.join(text)}".replace("\n", "↵"))
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])
