"""The paper's Figs. 8-10 in one: losses, gradient norms, weights and gradient cosines over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from dbmtl_fused.demo.training import History

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.edgecolor": "0.5",
    "axes.axisbelow": True,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
}
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73")
PAIR_COLORS = ("#7A4FA3", "#4F9BD9", "#B8860B")
"""Colours that colour-blind readers can tell apart; pairs get others than tasks, for they are other things."""
WINDOW = 9


def draw(histories: Mapping[str, History], steps_per_epoch: int, seed: int, path: Path) -> None:
    """Save a figure with one row for each method and one column for each quantity; columns share their scale.

    :param histories: What was recorded of the training runs with ``seed``, by the method's name.
    """
    panels = (
        ("Training loss", "nats (digits), grey levels² (ink)", "losses", TASK_COLORS, True),
        ("Gradient norm over the encoder", r"$\|m_t\|_2$", "norms", TASK_COLORS, True),
        ("Task weight", r"$w_t$", "weights", TASK_COLORS, True),
        ("Gradient cosine similarity", r"$\cos(m_s,\, m_t)$", "cosines", PAIR_COLORS, False),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(16, 3.0 * len(histories) + 1.9), dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(histories), len(panels), sharex=True, sharey="col", squeeze=False)
        for row, (method, history) in zip(axes, histories.items(), strict=True):
            epochs = np.array(history.steps) / steps_per_epoch
            for axis, (_, label, series, colors, log) in zip(row, panels, strict=True):
                _plot(axis, epochs, getattr(history, series), colors, log)
                axis.set_ylabel(label)
                axis.set_xlim(0, epochs[-1])
            row[-1].axhline(0, color="0.4", linewidth=0.8, zorder=1)
            row[-1].set(ylim=(-1, 1), yticks=(-1, -0.5, 0, 0.5, 1))
            row[-2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[-2].yaxis.set_major_formatter("{x:g}")
            row[-2].yaxis.set_minor_locator(NullLocator())
            row[0].annotate(
                method, (-0.32, 0.5), xycoords="axes fraction", rotation=90, va="center", fontsize=14, fontweight="bold"
            )
        for axis, (title, *_) in zip(axes[0], panels, strict=True):
            axis.set_title(title, pad=8)
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        first = next(iter(histories.values()))
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.075, right=0.985, top=1 - 1.15 / height, bottom=0.95 / height, wspace=0.28, hspace=0.12
        )
        _legend(figure, list(first.losses), TASK_COLORS, 0.41)
        _legend(figure, list(first.cosines), PAIR_COLORS, 0.887)
        title = f"Two digits and their ink, one encoder: training with {' and '.join(histories)}"
        note = f"Thin: single steps. Thick: running mean. A column's panels share their scale. Seed {seed}."
        figure.text(0.075, 1 - 0.18 / height, title, va="top", fontsize=15, fontweight="bold")
        figure.text(0.075, 1 - 0.52 / height, note, va="top", color="0.4")
        figure.savefig(path)


def _plot(axis: Axes, epochs: np.ndarray, series: Mapping[str, list[float]], colors: Sequence[str], log: bool) -> None:
    if log:
        axis.set_yscale("log")
    for values, color in zip(series.values(), colors, strict=True):
        axis.plot(epochs, values, color=color, linewidth=0.6, alpha=0.25)
        smooth = np.exp(_moving_mean(np.log(values))) if log else _moving_mean(values)
        axis.plot(epochs, smooth, color=color, linewidth=2)


def _moving_mean(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean of the ``WINDOW`` values around each; of fewer at the ends."""
    padded = np.pad(np.asarray(values), WINDOW // 2, constant_values=np.nan)
    return np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1)


def _legend(figure: Figure, names: Sequence[str], colors: Sequence[str], x: float) -> None:
    handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
    figure.legend(
        handles,
        names,
        loc="lower center",
        bbox_to_anchor=(x, 0.005),
        ncols=len(names),
        frameon=False,
        handlelength=1.4,
        columnspacing=1.3,
    )
