"""Every picture of features: that it carries its data, and that all of it can be read, in light and dark."""

import warnings

import matplotlib
import numpy as np
import pytest
from colours import contrast
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from resa_hf.features.plots import Curve, plot_counts, plot_effects, plot_matching, plot_quality, plot_scores
from resa_hf.features.prompt_plot import plot_prompt
from resa_hf.features.theme import DARK, LIGHT

LAYERS = list(range(2, 28))
COUNTS = [1, 4, 3, 2, 2, 3, 0, 3, 3, 1, 1, 3, 3, 3, 0, 3, 0, 5, 3, 0, 1, 2, 2, 1, 2, 2]  # the paper's Table 6
X = np.linspace(-20, 50, 2001)
LONG = "ablate 20 cue-token latents of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B at model.layers.12, twice over"
PROMPT = [
    "A",
    " conversation",
    ".",
    "\n",
    "<think>",
    " </think>",
    " reasoning",
    " process",
    "$x^2$ $",
    "中文",
    "\x1b[31m",
    "Wide" * 9,
]


def curve(*means):
    weights = [1 / len(means)] * len(means)
    parts = [np.exp(-((X - mean) ** 2) / 8) / np.sqrt(8 * np.pi) / len(means) for mean in means]
    return Curve(X, np.sum(parts, axis=0), means, tuple(weights))


def prompt(path, tokens, latents, dark, name="layer {}: 65535"):
    words, rng = (PROMPT * tokens)[:tokens], np.random.default_rng(0)
    cues = [at for at, word in enumerate(words) if "think>" in word]
    values = np.zeros((tokens, latents))
    values[cues] = rng.gamma(2, 3, (len(cues), latents))
    return plot_prompt(path, words, [name.format(at) for at in range(latents)], values, cues, dark=dark)


def counts(path, layers, values, dark, mixture=None, **others):
    return plot_counts(path, layers, values, mixture, dark=dark, **others)


def effects(path, names, dark, null=(0.0, -0.1, 0.1), spread=0.1):
    middle = np.linspace(-1, 1, len(names))
    return plot_effects(path, names, middle, middle - spread, middle + spread, null, f"KL, {LONG}", dark=dark)


def scores(path, layers, values, dark):
    middle = np.linspace(0.4, 0.5, len(layers))
    base = (0.41, 0.40, 0.42)
    return plot_scores(path, layers, middle, middle - 0.01, middle + 0.01, base, values, dark=dark)


CONTROL = ([1.0] * 26, [0.5] * 26, [2.0] * 26)
PICTURES = {
    "prompt of 60": lambda path, dark: prompt(path, 60, 5, dark),
    "prompt of 200": lambda path, dark: prompt(path, 200, 52, dark),
    "prompt of 999": lambda path, dark: prompt(path, 999, 99, dark, LONG),
    "one latent": lambda path, dark: prompt(path, 12, 1, dark),
    "no latent": lambda path, dark: prompt(path, 12, 0, dark),
    "26 counts": lambda path, dark: counts(path, LAYERS, COUNTS, dark, curve(4.9, 14.5, 22.7), control=CONTROL),
    "4 counts": lambda path, dark: counts(path, [0, 1, 2, 3], [0, 3, 1, 0], dark, curve(1.0)),
    "60 counts": lambda path, dark: counts(path, range(60), [12345] * 60, dark, curve(*range(5, 35, 5))),
    "counts of 0": lambda path, dark: counts(path, [0, 1, 2, 3], [0] * 4, dark),
    "one count": lambda path, dark: counts(path, [12], [1], dark),
    "effects": lambda path, dark: effects(path, [LONG, "b", "W" * 200, "patch $x$", "中文"], dark),
    "one effect": lambda path, dark: effects(path, ["a"], dark, null=None),
    "no interval": lambda path, dark: effects(path, ["a", "b"], dark, spread=np.inf),
    "26 scores": lambda path, dark: scores(path, LAYERS, COUNTS, dark),
    "4 scores": lambda path, dark: scores(path, [0, 1, 2, 3], None, dark),
    "quality": lambda path, dark: plot_quality(path, LAYERS, *np.random.default_rng(0).random((3, 26)), dark=dark),
    "quality of one": lambda path, dark: plot_quality(path, [3], [0.2], None, None, dark=dark),
    "matching": lambda path, dark: plot_matching(path, [0.9, -0.3], [0.1, 0.2], 0.2, LONG, dark=dark),
    "no pairs": lambda path, dark: plot_matching(path, [], [0.1], 0.1, "cosine", dark=dark),
}  # fmt: skip


@pytest.fixture(scope="module", params=[(name, dark) for name in PICTURES for dark in (False, True)], ids=str)
def drawn(request, tmp_path_factory):
    """A picture, its theme, its file, and the texts that are really drawn."""
    (name, dark), path = request.param, tmp_path_factory.mktemp("pictures") / "one.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks, a layout that does not fit
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib 3.10 by its parser
        figure = PICTURES[name](path, dark)
    texts, draw = [], Text.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Text, "draw", lambda text, renderer: (texts.append(text), draw(text, renderer)))
        figure.draw_without_rendering()
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    return figure, DARK if dark else LIGHT, path, texts


def test_every_text_is_inside_clear_of_the_data_and_of_other_texts(drawn):
    figure, _, _, texts = drawn
    assert texts and figure.bbox.width == 800
    boxes = np.array([text.get_window_extent().extents for text in texts])
    panes = np.array([axes.patch.get_window_extent().extents for axes in figure.axes]).reshape(-1, 4)
    assert (panes[:, 2] - panes[:, 0] > 100).all() and (panes[:, 3] - panes[:, 1] >= 5).all()
    outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > [figure.bbox.width, figure.bbox.height]).any(axis=1)
    assert not outside.any(), [text.get_text() for text, out in zip(texts, outside, strict=True) if out]
    for others, apart in ((panes, 0.5), (boxes, 1.0)):
        across = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(
            boxes[:, None, :2], others[None, :, :2]
        )
        overlap = (across > apart).all(axis=2)
        if others is boxes:
            np.fill_diagonal(overlap, False)
        assert not overlap.any(), [(texts[i].get_text(), j) for i, j in np.argwhere(overlap)]


def test_texts_are_large_and_stand_out(drawn):
    _, theme, _, texts = drawn
    for text in texts:
        assert text.get_fontsize() >= 7.5 and not text.get_parse_math()
        assert contrast(to_hex(text.get_color()), theme.paper) >= 4.5


def test_marks_stand_out(drawn):
    figure, theme, _, _ = drawn
    for axes in figure.axes:
        for mark in axes.collections:
            if mark.get_array() is None:
                colours = [*mark.get_facecolor(), *mark.get_edgecolor()]
                assert max(contrast(colour[:3], theme.paper) for colour in colours) >= 3
        for line in axes.lines:
            assert contrast(line.get_color(), theme.paper) >= 3


def test_the_file_is_a_whole_png_of_the_theme(drawn):
    figure, theme, path, _ = drawn
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        image.load()
        assert image.width == 1600 and abs(image.height - 2 * figure.bbox.height) <= 1
        assert to_hex(np.array(image.getpixel((1, image.height - 2))[:3]) / 255) == theme.paper


def labelled(axes, label):
    artists = [*axes.collections, *axes.lines, *axes.patches, *axes.containers]
    return next(artist for artist in artists if str(artist.get_label()).startswith(label))


def ends(artist):
    return np.array([np.asarray(segment) for segment in artist.get_segments()])


def test_counts_are_bars_dots_a_mixture_and_a_control(tmp_path):
    mixture = curve(4.9, 14.5, 22.7)
    low, high = np.arange(26) / 20, 2 + np.arange(26) / 20
    figure = counts(tmp_path / "a.png", LAYERS, COUNTS, False, mixture, control=((low + high) / 2, low, high))
    (axes,) = figure.axes
    np.testing.assert_array_equal(labelled(axes, "reasoning").get_offsets(), np.c_[LAYERS, COUNTS])
    bars, whiskers = (one for one in axes.collections if hasattr(one, "get_segments"))
    np.testing.assert_array_equal(ends(bars)[:, :, 1], np.c_[np.zeros(26), COUNTS])
    np.testing.assert_array_equal(ends(whiskers)[:, :, 1], np.c_[low, high])
    np.testing.assert_allclose(labelled(axes, "control").get_offsets()[:, 1], (low + high) / 2)
    line = labelled(axes, "mixture of 3")
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(sum(COUNTS), rel=1e-3)
    label = line.get_label().replace("\n", " ")
    assert "4.9, 14.5, 22.7" in label and "33, 33, 33%" in label
    shapes = [labelled(axes, name).get_paths()[0].vertices for name in ("reasoning", "control")]
    assert len({shape.tobytes() for shape in shapes}) == 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(layer) for layer in LAYERS]


def test_a_mixture_over_every_other_layer_expects_the_counts_there(tmp_path):
    (axes,) = counts(tmp_path / "a.png", [0, 2, 4, 6], [1, 2, 2, 1], False, curve(3.0)).axes
    line = labelled(axes, "mixture of 1")
    assert np.interp([0, 2, 4, 6], *line.get_data()).sum() == pytest.approx(6, rel=0.1)


def test_a_prompt_is_a_map_of_shares_with_the_cues_in_bold(tmp_path):
    tokens = [f"t{at}" for at in range(40)]
    values = np.random.default_rng(1).gamma(1, 1, (40, 3)) * (np.random.default_rng(2).random((40, 3)) < 0.3)
    figure = plot_prompt(tmp_path / "a.png", tokens, ["x", "y", "z"], values, [7, 33], dark=True)
    *panes, _ = figure.axes
    shown = np.ma.concatenate([axes.collections[0].get_array() for axes in panes])
    assert len(panes) > 1 and (shown.mask == (values == 0)).all()
    np.testing.assert_allclose(shown.filled(0), values / values.max(axis=0))
    labels = [label for axes in panes for label in axes.get_yticklabels()]
    assert [label.get_text().split()[-2:] for label in labels] == [[f"t{at}", str(at)] for at in range(40)]
    bold = [at for at, label in enumerate(labels) if label.get_fontproperties().get_weight() == "bold"]
    assert bold == [at for at, label in enumerate(labels) if label.get_text().startswith("▸")] == [7, 33]
    assert all([label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"] for axes in panes)


def test_a_latent_that_is_never_active_is_an_empty_column(tmp_path):
    figure = plot_prompt(tmp_path / "a.png", ["a", "b"], ["x", "y"], [[0, 2], [0, 1]], [], dark=False)
    assert figure.axes[0].collections[0].get_array().tolist() == [[None, 1], [None, 0.5]]


def test_of_a_long_prompt_the_tokens_around_the_cues_are_shown(tmp_path):
    names = [f"n{at}" for at in range(70)]
    figure = plot_prompt(tmp_path / "a.png", ["a"] * 2000, names, np.ones((2000, 70)), [10, 1500], dark=False)
    places = [int(label.get_text().split()[-1]) for axes in figure.axes[:-1] for label in axes.get_yticklabels()]
    # 11 before the first cue and as far after it as on either side of the second.
    assert places == sorted(places) and len(places) == 300
    assert {*range(107), *range(1404, 1597)} <= set(places)
    heading = figure.get_suptitle().replace("\n", " ")
    assert "300 of 2000 tokens" in heading and "60 of 70 latents" in heading


def test_what_a_font_or_a_formula_would_spoil_is_shown_as_written(tmp_path):
    figure = plot_prompt(
        tmp_path / "a.png", ["$x^2$", "\n", "中", " the", "a" * 40], ["n"], np.ones((5, 1)), [], dark=False
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["$x^2$   0", "↵   1", "\\u4e2d   2", "·the   3", f"{'a' * 13}…   4"]


def test_effects_lie_before_their_nulls(tmp_path):
    estimates, lows, highs = [0.5, 0.05, -0.4], [0.3, -0.1, -np.inf], [0.7, 0.2, 0.1]
    null = ([0.0, 0.01, 0.02], [-0.2, -0.3, -0.1], [0.2, 0.3, 0.4])
    (axes,) = plot_effects(tmp_path / "a.png", ["a", "b", "c"], estimates, lows, highs, null, "KL", dark=False).axes
    boxes = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in labelled(axes, "null: 95% range")]
    np.testing.assert_allclose(boxes, np.c_[null[1], null[2]])
    np.testing.assert_allclose(ends(labelled(axes, "null: mean"))[:, 0, 0], null[0])
    np.testing.assert_allclose(ends(labelled(axes, "95% interval")), [[[0.3, 0], [0.7, 0]], [[-0.1, 1], [0.2, 1]]])
    outside, within = labelled(axes, "effect outside"), labelled(axes, "effect within")
    assert outside.get_offsets().tolist() == [[0.5, 0], [-0.4, 2]] and within.get_offsets().tolist() == [[0.05, 1]]
    assert to_hex(outside.get_facecolor()[0]) == LIGHT.main and to_hex(within.get_facecolor()[0]) == LIGHT.paper
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"] and axes.yaxis_inverted()


def test_one_null_serves_all_effects(tmp_path):
    (axes,) = effects(tmp_path / "a.png", ["a", "b", "c"], False).axes
    assert [bar.get_width() for bar in labelled(axes, "null: 95% range")] == pytest.approx([0.2] * 3)


def test_scores_are_percent_above_their_counts(tmp_path):
    values, lows, highs = [0.4, 0.5, 0.6], [0.3, 0.45, np.nan], [0.5, 0.55, np.nan]
    figure = plot_scores(tmp_path / "a.png", [3, 5, 8], values, lows, highs, (0.42, 0.4, 0.44), [0, 2, 1], dark=False)
    top, bottom = figure.axes
    np.testing.assert_allclose(labelled(top, "score").get_offsets(), [[3, 40], [5, 50], [8, 60]])
    np.testing.assert_allclose(ends(labelled(top, "95% interval")), [[[3, 30], [3, 50]], [[5, 45], [5, 55]]])
    assert set(labelled(top, "base").get_ydata()) == {42}
    band = labelled(top, "base: 95% interval")
    assert (band.get_y(), band.get_height()) == pytest.approx((40, 4))
    dots = next(one for one in bottom.collections if len(one.get_offsets()) == 3)
    assert dots.get_offsets().tolist() == [[3, 0], [5, 2], [8, 1]] and top.get_xlim() == bottom.get_xlim()


def test_quality_has_a_pane_a_measure(tmp_path):
    figure = plot_quality(tmp_path / "a.png", [1, 2], [0.1, 0.2], None, [0.0, 0.5], dark=False)
    assert [axes.lines[0].get_xydata().tolist() for axes in figure.axes] == [
        [[1, 0.1], [2, 0.2]],
        [[1, 0.0], [2, 0.5]],
    ]
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == ["FVU", "dead latents"]


def test_matching_shows_both_histograms_and_what_lies_above(tmp_path):
    rng = np.random.default_rng(3)
    matched, null = rng.uniform(-0.2, 1, 300), rng.uniform(-0.3, 0.4, 5000)
    (axes,) = plot_matching(tmp_path / "a.png", matched, null, 0.35, "cosine", dark=False).axes
    for label, values in (("matched latents", matched), ("null", null)):
        artist = labelled(axes, label)
        heights, edges, _ = artist.get_data()
        assert sum(heights) == pytest.approx(100)
        inside = (values >= edges[10]) & (values < edges[11])
        assert heights[10] == pytest.approx(100 * inside.mean())
        assert artist.get_label() == f"{label}: {(values > 0.35).sum()} of {len(values)} above the threshold"
    assert set(labelled(axes, "threshold 0.35").get_xdata()) == {0.35}


def test_a_cosine_rounded_above_1_is_in_the_histogram(tmp_path):
    (axes,) = plot_matching(tmp_path / "a.png", [1 + 1e-7, 1.0], [0.0], 0.1, "cosine", dark=False).axes
    assert labelled(axes, "matched latents").get_data().values[-1] == 100


def test_a_picture_is_whole_or_the_one_before(tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    counts(picture, [1], [1], False)
    before = picture.read_bytes()

    def torn(figure, path, **_):
        path.write_bytes(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", torn)
    with pytest.raises(OSError, match="No space"):
        counts(picture, [1], [2], False)
    assert picture.read_bytes() == before and list(tmp_path.iterdir()) == [picture]


def test_a_reader_s_own_style_is_neither_used_nor_changed(tmp_path):
    with matplotlib.rc_context({"text.color": "red", "axes.facecolor": "yellow", "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        figure = counts(tmp_path / "a.png", [1], [1], True)
        assert dict(matplotlib.rcParams) == before
    assert to_hex(figure.axes[0].get_facecolor()) == DARK.paper
