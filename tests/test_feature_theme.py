"""The colours of pictures and page can be told apart by everybody, from each other and from the background."""

import numpy as np
import pytest
from colours import VISION, contrast, seen
from matplotlib.colors import LinearSegmentedColormap

from resa_hf.features.theme import DARK, LIGHT


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_colours_of_a_theme_differ_in_every_eye(theme, vision):
    colours = [theme.main, theme.other, theme.null, theme.ink, theme.paper]
    for at, one in enumerate(colours):
        for other in colours[:at]:
            assert np.linalg.norm(seen(one, vision) - seen(other, vision)) > 20
    steps = LinearSegmentedColormap.from_list("", theme.cells)(np.linspace(0, 1, 20))[:, :3]
    away = [abs(seen(step, vision)[0] - seen(theme.paper, vision)[0]) for step in steps]
    assert (np.diff(away) > 0).all()  # the larger the value, the further from empty


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_what_lies_on_a_band_and_the_weakest_cell_stand_out(theme):
    assert all(contrast(colour, theme.grid) >= 3 for colour in (theme.main, theme.null, theme.ink))
    assert contrast(theme.cells[0], theme.paper) >= 3 and contrast(theme.muted, theme.paper) >= 4.5
