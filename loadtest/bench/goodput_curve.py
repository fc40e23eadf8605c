"""The curve of goodput over offered load, as a picture. Needs matplotlib, of the group `bench`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from goodput import Sweep


def is_drawable() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(sweeps: Sequence[Sweep], path: Path) -> None:
    """
    Draw each model's goodput, its range over the rounds, and what no server can exceed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 optional
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max(share for sweep in sweeps for share in sweep.points)
    axes.plot([0, 1, most], [0, 1, 1], color="0.7", linestyle="--", label="all that can be")
    for sweep in sweeps:
        shares = sorted(sweep.points)
        goodputs = [[one.goodput_share for one in sweep.points[share]] for share in shares]
        (line,) = axes.plot(
            shares,
            [sweep.middle(share).goodput_share for share in shares],
            marker="o",
            label=f"{sweep.model}, {1e3 * sweep.deadline_s:g} ms to answer",
        )
        axes.fill_between(
            shares,
            [min(values) for values in goodputs],
            [max(values) for values in goodputs],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.set(xlabel="offered, of the peak", ylabel="served right and in time, of the peak")
    axes.set_ylim(0, 1.2)
    axes.grid(visible=True, color="0.9")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
