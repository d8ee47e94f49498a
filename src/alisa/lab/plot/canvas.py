"""Figures that all drawings share: how matplotlib is found, how a grid is laid out and how a file is written."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from alisa.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")

_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ee8866",
    "#44bb99",
    "#994455",
    "#99ddff",
)
"""Paul Tol's bright and light schemes: told apart by people who see colours differently."""
_MARKERS = "osD^v<>pPX"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Drawing needs matplotlib, which is not installed; pip install 'alisa[plot]'.") from error
    rcParams["svg.hashsalt"] = "alisa"  # the same records give the same file
    rcParams["svg.fonttype"] = "none"  # letters as text: a third of the size
    return Figure(figsize=(width, height), layout="constrained")


def grid(figure: Figure, count: int, num_columns: int) -> list[Axes]:
    """`count` axes in rows of up to `num_columns`, resized so that each has room."""
    num_columns = min(count, num_columns)
    num_rows = ceil(count / num_columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * num_columns, height * num_rows)
    return [figure.add_subplot(num_rows, num_columns, index + 1) for index in range(count)]


def legend_below(figure: Figure, num_panels: int) -> None:
    """The names of the first panel under all of them, as many in a row as fit below the panels of one row."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if num_panels == 1 else 5
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def colour(name: str, names: list[str]) -> str:
    """Colour of one of several names; the same for the same list."""
    return _COLOURS[names.index(name) % len(_COLOURS)]


def marker(name: str, names: list[str]) -> str:
    """Marker of one of several names; two of the same colour have different ones."""
    index = names.index(name)
    return _MARKERS[(index // 2 + index) % len(_MARKERS)]


def save(figure: Figure, path: Path) -> None:
    """Write the figure as its suffix says.

    Raises:
        InputError: the suffix is unknown, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
