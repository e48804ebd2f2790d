# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark prints: its verdict, tables, JSON, a plot, its progress, and where it ran."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import jax
from absl import app

_NUMBER = re.compile(r"[-+]?[\d.,]+([eE][-+]?\d+)?[%x]?|-|")


def start(argv: Sequence[str], *, as_json: bool, plot: str | None) -> Callable[[str], None]:
    """What a command does first; returns how it says things, which with --json is on stderr.

    Raises:
      app.UsageError: there is an argument that is no flag.
      SystemExit: a plot is asked for, and there is nothing to plot with.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if plot:
        require_matplotlib()
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def require_choices(name: str, choices: Iterable[str], given: Iterable[str]) -> None:
    """Ends the program with a sentence if a flag's list has a value that is no choice.

    Raises:
      app.UsageError: with the sentence.
    """
    for value in given:
        if value not in choices:
            raise app.UsageError(f"--{name} has {value!r}; wanted some of {', '.join(choices)}")


def require_sizes(
    name: str, given: Sequence[str], choices: Sequence[int] | None = None
) -> list[int]:
    """The numbers of a flag's list, each once and in order.

    Args:
      name: of the flag.
      given: its values.
      choices: what they may be; every integer >= 1 when left out.

    Raises:
      app.UsageError: with a sentence, if a value is something else.
    """
    for value in given:
        if not value.isdigit() or not int(value) or choices and int(value) not in choices:
            wanted = f"some of {', '.join(map(str, choices))}" if choices else "integers >= 1"
            raise app.UsageError(f"--{name} has {value!r}; wanted {wanted}")
    return sorted({int(value) for value in given})


MAX_VERDICT_LINES = 25
_VERDICT_WIDTH = 100
_MORE = "All rows, and what they rest on: --all. All rows and this verdict as JSON: --json."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a reader of a benchmark wants to know first, computed from its rows.

    Attributes:
      title: one line: what was compared, and whether it was predicted or measured.
      rows: a table, as `table` takes it.
      notes: sentences after the table.
    """

    title: str
    rows: Sequence[Mapping[str, str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """At most `MAX_VERDICT_LINES` lines; what that leaves out of the table is counted."""
        notes = [line for note in [*self.notes, _MORE] for line in _wrap(note)]
        lines = table(self.rows, indent=2).splitlines()
        room = MAX_VERDICT_LINES - 1 - len(notes)
        if len(lines) > room:
            left_out = len(lines) - room + 1
            lines = [*lines[: room - 1], f"  ... and {left_out} more rows, which --all prints"]
        return "\n".join([f"VERDICT: {self.title}", *lines, *notes])

    def record(self) -> dict[str, Any]:
        """The verdict as it goes into the JSON record."""
        return {"title": self.title, "rows": list(map(dict, self.rows)), "notes": list(self.notes)}


def _wrap(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _VERDICT_WIDTH, break_on_hyphens=False)


def table(rows: Sequence[Mapping[str, Any]], *, indent: int = 0) -> str:
    """Rows as fixed-width text: a header, a rule, one line per row.

    Args:
      rows: column name -> cell, formatted by the caller (`str` is applied). All rows have the
        columns of the first. Columns of numbers are aligned right.
      indent: spaces before each line.

    Raises:
      ValueError: rows have different columns.
    """
    if not rows:
        return ""
    names = list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != names:
            raise ValueError(f"table: row {i} has columns {list(row)}; row 0 has {names}")
    lines = []
    columns = [[str(row[name]) for row in rows] for name in names]
    widths = [max(map(len, [n, *column])) for n, column in zip(names, columns, strict=True)]
    right = [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    for cells in [names, ["-" * width for width in widths], *zip(*columns, strict=True)]:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        lines.append((" " * indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def write_json(record: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Writes a record as JSON, to stdout unless told otherwise.

    With `--json` nothing else may go to stdout; tables and remarks go to stderr.

    Raises:
      ValueError: a value is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(record, indent=2, allow_nan=False)
    print(text, file=sys.stdout if file is None else file, flush=True)


def environment() -> dict[str, Any]:
    """Where and with what a number was made; goes into every JSON record.

    Returns:
      date (UTC, ISO 8601), commit ("-dirty" when tracked files differ from it; None outside a
      checkout), python, jax, jaxlib and libtpu versions (None where not installed), platform,
      device_kind and num_devices as jax sees them, cpu and num_cpus.
    """
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(pathlib.Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
    }


def start_backends() -> str:
    """Initialises jax's backends and returns the default one's name, libtpu's log kept back.

    Where libtpu is installed and there is no TPU, looking for one writes a page of warnings past
    Python, to the process's own stderr. They are shown if the start fails.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            return jax.default_backend()
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


class Progress:
    """A line on stderr that says how far a run is, if stderr is a terminal; else nothing.

    with Progress(len(cases), "compiling") as progress:
        for case in cases:
            ...
            progress.step(case.name)
    """

    def __init__(self, total: int, what: str, file: TextIO | None = None):
        """Args: total: number of steps. what: a verb for them. file: stderr if left out."""
        self._total, self._what, self._done = total, what, 0
        self._file = sys.stderr if file is None else file
        self._shown = self._file.isatty()

    def __enter__(self) -> Progress:
        self._show("")
        return self

    def step(self, name: str) -> None:
        """One more step is done; `name` says which."""
        self._done += 1
        self._show(name)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._file.write("\r\x1b[K")  # leave no trace beside the table
            self._file.flush()

    def _show(self, name: str) -> None:
        if self._shown:
            self._file.write(f"\r\x1b[K{self._what} {self._done}/{self._total} {name}"[:100])
            self._file.flush()


def require_matplotlib() -> None:
    """Ends the program with one sentence if there is nothing to plot with.

    Benchmarks call it before the work whose result they are asked to plot.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit(
            "--plot needs matplotlib, which is not installed: pip install 'pallas-paged[plot]'"
        ) from None


def save_plot(
    path: str | os.PathLike,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = True,
    log_y: bool = True,
) -> None:
    """Writes a PNG of line plots side by side on one scale.

    Args:
      path: the file to write.
      panels: panel title -> line label -> (x, y) points. A label keeps its colour in all panels.
      xlabel: with its unit.
      ylabel: with its unit.
      title: of the whole figure; says whether the numbers are measured or predicted.
      log_x: logarithmic x axis, base 2.
      log_y: logarithmic y axis.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    figure = Figure(figsize=(1 + 4 * len(panels), 4.5), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for ax, (panel, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            ax.plot(*zip(*points, strict=True), "o-", label=label, color=f"C{labels.index(label)}")
        if log_x:
            ax.set_xscale("log", base=2)
        if log_y:
            ax.set_yscale("log")
        ax.set(title=panel, xlabel=xlabel)
        ax.grid(True, alpha=0.3)
    axes[0].set_ylabel(ylabel)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: pathlib.Path) -> str | None:
    """Commit of the checkout whose root this is, or None."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != root:
        return None  # installed inside somebody else's checkout
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def _cpu_model() -> str:
    """The processor's name, as well as the operating system says it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
