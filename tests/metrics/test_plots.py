"""Plots are written and depend on their figures."""

from pathlib import Path

from matplotlib.image import imread

from lora_align.metrics import plots


def test_plots_differ_for_different_figures(tmp_path: Path) -> None:
    weights = [-1.0, 0.0, 1.0]
    for name, rising in (("up", [0.1, 0.5, 0.9]), ("down", [0.9, 0.5, 0.1])):
        curves = {preference: [rising, rising] for preference in ("helpful", "brief", "warm")}
        plots.control_curves(tmp_path / f"{name}.png", weights, curves, {key: [1.0] * 3 for key in curves}, columns=2)
        plots.weight_map(
            tmp_path / f"map-{name}.png", ("helpful", "brief"), (weights, weights), {"helpful": [rising] * 3}
        )
    for picture in ("{}.png", "map-{}.png"):
        up, down = (imread(tmp_path / picture.format(name)) for name in ("up", "down"))
        assert up.shape == down.shape
        assert (up != down).any()
