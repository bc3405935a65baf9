"""Figures of the evidence page, as SVG and PNG; matplotlib is in the extra `benchmark`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bootstrap import Difference
from matplotlib.figure import Figure

LINE, DOT, FAINT = "#1f4e79", "#c0504d", "#999999"
SETTINGS = {"svg.hashsalt": "superpose", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
            "axes.spines.right": False}  # fmt: skip


@contextmanager
def figure_file(file: Path) -> Iterator[Figure]:
    """Yield a figure to draw, and write it as SVG and PNG, the same bytes for the same numbers.

    Args:
        file: without its suffix.
    """
    with plt.rc_context(SETTINGS):
        figure = plt.figure(figsize=(5, 3.4))
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
        figure.savefig(file.with_suffix(".png"), bbox_inches="tight", dpi=150, metadata={"Software": None})
        plt.close(figure)


def methods_figure(
    file: Path, chosen: Mapping[str, Sequence[float]], default: Mapping[str, float], lines: Mapping[str, float]
) -> None:
    """Draw every method's mean accuracy, with chosen hyperparameters and with defaults.

    Args:
        file: without its suffix.
        chosen: means of all seeds, by method.
        default: mean over seeds at published defaults, by method.
        lines: vertical lines by name, such as the fine-tuned models'.
    """
    ordered = sorted(chosen, key=lambda name: sum(chosen[name]) / len(chosen[name]))
    with figure_file(file) as figure:
        figure.set_size_inches(7, 0.6 + 0.24 * len(ordered))
        axes = figure.subplots()
        for place, name in enumerate(ordered):
            axes.plot(chosen[name], [place] * len(chosen[name]), "o", color=DOT, markersize=3)
            axes.plot(
                [sum(chosen[name]) / len(chosen[name])], [place], "|", color=DOT, markersize=12, markeredgewidth=2
            )
            axes.plot([default[name]], [place], "x", color=FAINT, markersize=5)
        for name, value in lines.items():
            axes.axvline(value, color=LINE, linewidth=0.8)
            axes.text(value, len(ordered) - 0.3, name, color=LINE, ha="center", va="bottom", fontsize=8)
        axes.set_yticks(range(len(ordered)), ordered)
        axes.set_xlabel("mean accuracy: | chosen on validation data (dots: seeds), x published defaults")
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)


def differences_figure(file: Path, reference: str, against: Mapping[str, Difference]) -> None:
    """Draw how much better the reference is than every other method, with 95% intervals.

    Args:
        file: without its suffix.
        reference: name of the method that is compared.
        against: its mean less another's, by the other's name.
    """
    ordered = sorted(against, key=lambda name: against[name].value)
    with figure_file(file) as figure:
        figure.set_size_inches(7, 0.6 + 0.24 * len(ordered))
        axes = figure.subplots()
        for place, name in enumerate(ordered):
            one = against[name]
            axes.plot([one.low, one.high], [place, place], color=DOT if one.is_clear else FAINT, linewidth=1.5)
            axes.plot([one.value], [place], "o", color=DOT if one.is_clear else FAINT, markersize=4)
        axes.axvline(0, color=LINE, linewidth=0.8)
        axes.set_yticks(range(len(ordered)), ordered)
        axes.set_xlabel(f"mean accuracy of {reference} less the method's, 95% intervals")
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
