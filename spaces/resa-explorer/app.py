"""The resa-explorer: try a reasoning adapter in a browser, and look inside it.

    python spaces/resa-explorer/app.py runs/demo runs/tiny-reasoner/features

The folders are outputs of resa-hf: their reports, adapters and SAEs can be chosen, beside the tiny reasoner that ships
in the package and public repositories on the Hub. Without any, `results` beside this file is taken.
"""

import argparse
import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from resa_hf.errors import ExploreError, HookpointError, IncompatibleAdapterError, IncompatibleSAEError
from resa_hf.explore.endpoints import PROBLEM, SOURCE, TINY, Explorer
from resa_hf.explore.html import STYLE
from resa_hf.explore.results import STYLE as REPORT_STYLE

FOR_VISITORS = ExploreError, HookpointError, IncompatibleAdapterError, IncompatibleSAEError, ConnectionError
TITLE = """# resa-explorer
A model solves a problem twice: as it is, and with a reasoning adapter. Press **Solve** and watch both think. Then
**Look inside**: at the latents of a sparse autoencoder (SAE) while they do."""
# Without thinking the base guesses the first; both solve the second; it guesses the third right.
PROBLEMS = [PROBLEM, "5-7+2+4+9 mod 10", "4+2*5-7 mod 10"]
TEXT = "User: 8+7*1*8 mod 10\nAssistant: <think>8+7=5;5*1=5;5*8=0</think><answer>0</answer>"
LINKED = ("model", "adapters", "problem", "sae", "hookpoint", "text", "token", "latent")
TABS = ("solve", "look", "layers", "results")
LINK = f"""(...values) => {{ const url = new URL(location.origin + location.pathname);
  {list(LINKED)}.forEach((name, place) => [values[place] ?? []].flat().forEach(
    (value) => url.searchParams.append(name, value)));
  url.searchParams.set("tab", document.querySelector("[role=tab][aria-selected=true]").dataset.tabId);
  history.replaceState(null, "", url); return url.href; }}"""
# Of what is clicked in our HTML the number: a token has it in its title, a latent in its row.
CLICKED = """element.addEventListener("click", (event) => {
  const token = event.target.closest("[title^='token ']"), row = event.target.closest("tbody tr");
  if (token) trigger("click", {number: parseInt(token.title.slice(6))});
  else if (row) trigger("click", {number: parseInt(row.cells[0].textContent)}); });"""
CSS = """
.resa-tokens span, .resa-wide tbody tr { cursor: pointer; }
.side h2 { font-size: var(--text-lg); margin: 0; }
.recipe textarea { font-family: var(--font-mono); }
.dark { --color-accent: var(--primary-400); }
:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
input[type=range]::-webkit-slider-thumb { border: 1px solid var(--body-text-color-subdued); }
input[type=range]::-moz-range-thumb { border: 1px solid var(--body-text-color-subdued); }
input[role=combobox] { padding-right: 2em; text-overflow: ellipsis; }
.fillable.app { padding: min(3vw, var(--size-8)); }
@media (max-width: 640px) { button[role=tab] { padding: 0 var(--size-2); } }
"""
# Gradio's own subdued text, main buttons and selected tabs have too little contrast in light.
THEME = gr.themes.Default(
    primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
).set(
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    color_accent="*primary_700",
)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong, in words for visitors; our own mistakes go to the log, and no trace of them to the browser."""

    def error(cause: Exception) -> gr.Error:
        if isinstance(cause, FOR_VISITORS):
            # Gradio shows it as HTML, and what somebody typed may be in it.
            return gr.Error(escape(str(cause), quote=False), duration=None, print_exception=False)
        logging.getLogger(__name__).error("An endpoint failed.", exc_info=cause)
        return gr.Error("Something went wrong on the server. Its log says what.", print_exception=False)

    @functools.wraps(function)
    def whole(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as cause:
            raise error(cause) from None

    @functools.wraps(function)
    def streamed(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except Exception as cause:
            raise error(cause) from None

    return streamed if inspect.isgeneratorfunction(function) else whole


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """ZeroGPU lends its GPU to functions that are marked; on other hardware there is nothing to mark."""
    if "SPACES_ZERO_GPU" not in os.environ:
        return told(function)
    # Not by `import`: for a type checker this folder is in one of that name. Around `told`, since it says itself when
    # a visitor's quota is used up.
    return importlib.import_module("spaces").GPU(duration=120)(told(function))


def build(explorer: Explorer) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="resa-explorer", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        with gr.Row():
            model = choice(
                explorer.models, TINY, "Model", "From the list, or owner/name of a public model on the Hub."
            )
            info = "Up to four, acting together; from the list or the Hub."
            adapters = choice(explorer.adapters, [SOURCE], "Adapters", info, multiselect=True, max_choices=4)
            strength = gr.Slider(-2, 2, 1, step=0.1, label="Adapter strength", info="1 is as trained, 0 is the base.")
        with gr.Accordion("Sampling", open=False), gr.Row():
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="The same seed gives the same text.")
            temperature = gr.Slider(0, 2, 1, step=0.1, label="Temperature", info="0 always takes the likeliest token.")
            longest = gr.Slider(1, 4096, 512, step=1, label="Longest answer", info="In tokens.")
        who, sampling = [model, adapters, strength], [seed, temperature, longest]
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Solve", id="solve"):
                problem, written = solve_tab(explorer, who, sampling)
            with gr.Tab("Look inside", id="look"):
                looked = look_tab(explorer, who, sampling, problem, written)
            with gr.Tab("Layers", id="layers") as layers:
                shown = gr.HTML()
                layers.select(told(explorer.layers), outputs=shown, api_name="layers")
            with gr.Tab("Results", id="results"):
                results_tab(explorer)
        linked = [model, adapters, problem, *looked]
        link = gr.Button("Make the link", size="sm")
        info = "An address that carries model, adapters, problem, text and latent."
        address = gr.Textbox(label="Link to this view", info=info, buttons=["copy"], interactive=False)
        link.click(None, linked, address, js=LINK)
        page.load(from_link, outputs=[*linked, tabs], show_progress="hidden", api_visibility="private")
    return page


def from_link(request: gr.Request) -> list[Any]:
    """What the page's address says: what a link carries, and the tab."""
    query = request.query_params
    values: dict[str, Any] = {name: query.get(name, gr.skip()) for name in LINKED}
    values["adapters"] = query.getlist("adapters") or gr.skip()
    for name in ("token", "latent"):
        # Without a value Gradio's own page shows 0, and gives that.
        values[name] = None
        try:
            values[name] = int(query[name][:9]) if name in query else None
        except ValueError:
            gr.Warning(f"The address has a {name} that is no number.")
    return [*values.values(), gr.Tabs(selected=query["tab"]) if query.get("tab") in TABS else gr.skip()]


def choice(names: Iterable[str], value: Any, label: str, info: str, **settings: Any) -> gr.Dropdown:
    """One of what this server offers, or a name on the Hub."""
    settings |= {"label": label, "info": info, "allow_custom_value": True, "min_width": 240}
    return gr.Dropdown(list(names), value=value, **settings)


def beside(*labels: str, scales: tuple[int, int] = (1, 1), **settings: Any) -> list[gr.HTML]:
    """Two texts side by side; on a phone one below the other."""
    shown = []
    with gr.Row():
        for label, scale in zip(labels, scales, strict=True):
            with gr.Column(scale=scale, min_width=300):
                if label:
                    gr.Markdown(f"## {label}", elem_classes="side")
                shown.append(gr.HTML(label=label, **settings))
    return shown


def with_stop(name: str) -> tuple[gr.Button, gr.Button]:
    """What starts something, and beside it what stops it."""
    with gr.Row():
        return gr.Button(name, variant="primary", scale=3, min_width=200), gr.Button("Stop", scale=1, min_width=80)


def answers(
    triggers: list[Any], stop: gr.Button, solving: Callable[..., Any], values: list[Any], shown: list[gr.HTML]
) -> gr.JSON:
    """Streams two answers into what is shown, until they are finished or stopped; returns them as plain values."""
    plain = gr.JSON(visible=False)
    event = gr.on(
        triggers,
        on_gpu(solving),
        values,
        [*shown, plain],
        api_name=solving.__name__,
        preprocess=False,
        concurrency_limit=4,
        show_progress="minimal",
    )
    stop.click(None, cancels=event)
    return plain


def solve_tab(explorer: Explorer, who: list[Any], sampling: list[Any]) -> tuple[gr.Textbox, gr.JSON]:
    """Returns the problem, and what was written last."""
    with gr.Row():
        problem = gr.Textbox(
            PROBLEM,
            label="Problem",
            max_lines=8,
            scale=3,
            min_width=240,
            info="For the tiny reasoner: a chain, from left to right, modulo 10.",
        )
        gold = gr.Textbox("", label="Right answer", min_width=240, info="If known; the tiny reasoner's is worked out.")
    gr.Examples(PROBLEMS, problem, label="Examples")
    solve, stop = with_stop("Solve")
    shown, values = beside("Base", "With adapters"), [*who, problem, gold, *sampling]
    plain = answers([solve.click, problem.submit], stop, explorer.solve, values, shown)
    with gr.Accordion("How often is it right? Run 50 problems", open=False):
        own = gr.Textbox(
            "",
            label="Problems of your own",
            lines=3,
            max_lines=10,
            info="A line each: question, tab, answer. Empty: chains that the tiny reasoner was not trained on.",
        )
        count = gr.Slider(10, 200, 50, step=10, label="How many", info="Where you give none of your own.")
        run, halt = with_stop("Run problems")
        found, numbers = gr.HTML(), gr.JSON(visible=False)
        values, measured = [*who, own, count, *sampling], [found, numbers]
        event = run.click(
            on_gpu(explorer.accuracy), values, measured, api_name="accuracy", preprocess=False, concurrency_limit=2
        )
        halt.click(None, cancels=event)
    return problem, plain


def look_tab(
    explorer: Explorer, who: list[Any], sampling: list[Any], problem: gr.Textbox, written: gr.JSON
) -> list[Any]:
    """Returns what a link to this tab carries."""
    names = list(explorer.saes)
    with gr.Row():
        info = "From the list, or owner/name of a public SAE on the Hub."
        sae = choice(names, names[0] if names else None, "SAE", info)
        info = "Such as layers.2. Empty: the first that has an SAE."
        hookpoint = gr.Textbox("", label="Hookpoint", min_width=240, info=info)
    text = gr.Textbox(TEXT, label="Text", lines=3, max_lines=12, info="A prompt, or what a model wrote.")
    with gr.Row():
        read = gr.Button("Read the text", variant="primary")
        take = gr.Button("Take the last answer from Solve")
    with gr.Row():
        token = gr.Number(None, precision=0, label="Token", info="Click one. Empty: the whole text.")
        latent = gr.Number(None, precision=0, label="Latent", info="Click one. Empty: the strongest.")
    tokens, strongest = beside("", "", scales=(3, 1), js_on_load=CLICKED)
    examine = gr.Button("Show examples of the latent")
    examples, words = beside("", "", scales=(3, 1))
    linked, plain = [sae, hookpoint, text, token, latent], gr.JSON(visible=False)
    look: dict[str, Any] = {
        "preprocess": False,
        "fn": on_gpu(explorer.look),
        "inputs": [*who, *linked],
        "outputs": [tokens, strongest, plain],
    }
    gr.on([read.click, token.submit, latent.submit], **look, api_name="look")
    private: dict[str, Any] = {"api_visibility": "private"}
    tokens.click(clicked_token, outputs=[token, latent], **private).then(**look, **private)
    strongest.click(clicked_latent, outputs=latent, **private).then(**look, **private)
    take.click(told(last_answer), written, text, **private)
    examine.click(
        on_gpu(explorer.latent),
        [who[0], sae, hookpoint, latent],
        [examples, words, plain],
        api_name="latent",
        preprocess=False,
    )
    factor = gr.Slider(
        -5, 10, 0, step=0.5, label="Factor", info="0 ablates it, 1 changes nothing. The problem is Solve's."
    )
    change, stop = with_stop("Solve the problem with the latent changed")
    shown, values = beside("Unchanged", "Changed"), [*who, sae, hookpoint, latent, factor, problem, *sampling]
    answers([change.click], stop, explorer.change, values, shown)
    return linked


def clicked_token(event: gr.EventData) -> tuple[int, None]:
    """Its number; the latent is then the strongest there."""
    return event.number, None


def clicked_latent(event: gr.EventData) -> int:
    """Its number."""
    return event.number


def last_answer(written: dict[str, Any] | None) -> str:
    """Prompt and answer as the model read and wrote them."""
    if not written:
        raise ExploreError("Nothing is solved yet: go to Solve first.")
    return written["prompt"] + (written["tuned"] or written["base"])["text"]


def results_tab(explorer: Explorer) -> None:
    """A report, and its recipe."""
    names = list(explorer.results)
    info = "From the list, or owner/name of what resa-hf published on the Hub."
    result = choice(names, names[0] if names else None, "Result", info)
    show = gr.Button("Show the report", variant="primary")
    shown = gr.HTML()
    with gr.Accordion("Recipe", open=False):
        recipe = gr.Textbox(
            label="YAML", lines=4, max_lines=24, interactive=False, buttons=["copy"], elem_classes="recipe"
        )
    show.click(told(explorer.report), result, [shown, recipe], api_name="report", preprocess=False)


def main(results: Sequence[Path] = (), *, open_browser: bool = False) -> None:
    """Serves the page until it is interrupted.

    Args:
        results (sequence of `Path`, *optional*): outputs of resa-hf; by default `results` beside this file.
        open_browser (`bool`, *optional*, defaults to `False`): whether to show it at once.
    """
    models, adapters, saes = (os.environ.get(f"RESA_{kind}", "").split() for kind in ("MODELS", "ADAPTERS", "SAES"))
    folders = results or [Path(__file__).with_name("results")]
    explorer = Explorer(folders, models=models, adapters=adapters, saes=saes)
    page = build(explorer).queue(max_size=100)
    page.launch(
        theme=THEME,
        css=STYLE + REPORT_STYLE + CSS,
        footer_links=["api", "settings"],
        inbrowser=open_browser,
        max_file_size="1kb",
        prevent_thread_lock=True,
        ssr_mode=False,
    )
    explorer.warm_up()
    page.block_thread()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="output folders of resa-hf")
    main(parser.parse_args().results)
