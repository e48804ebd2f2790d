# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Makes the tables of these pages that stand in files of the repository, into docs/_generated/.

    python docs/generate.py

- measurements.md, from figures.toml: what the commands of bench/ printed.
- tuned.md, from pallas_paged/tuned/*.json: block sizes with the figures that chose them.
- files.md, from the first line of every module's docstring.

No table says more than its file: figures are copied, none is computed. `conf.py` calls `main`.
"""

import ast
import json
import pathlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGES = ("pallas_paged", "reference_engine", "bench")
# The command that writes the block sizes of a kind of device.
TUNERS = {
    "predicted_us": "python -m bench.tune_attention --write",
    "measured_us": "python -m bench.tune_attention_gpu --write",
}
# What a table of figures must say of itself, beside its title, its columns and its rows.
SOURCE = ("command", "device", "jax", "commit", "kind")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def figures() -> str:
    """The tables of figures.toml, each with where its figures come from."""
    parts = []
    for figure in tomllib.loads((DOCS / "figures.toml").read_text())["table"]:
        missing = [name for name in SOURCE if name not in figure]
        if missing or any(len(row) != len(figure["columns"]) for row in figure["rows"]):
            raise ValueError(
                f"figures.toml: {figure['title']!r} lacks {missing}; wanted each of {SOURCE}, and "
                "as many cells in every row as there are columns"
            )
        parts.append(f"### {figure['title']}\n\n{_source(figure)}\n\n")
        parts.append(table(figure["columns"], figure["rows"]))
        parts.append(f"\n{figure.get('note', '').strip()}\n\n")
    return "".join(parts)


def _source(figure: Mapping[str, Any]) -> str:
    """One sentence that says what was run, where and with what."""
    versions = f"jax {figure['jax']}"
    if "libtpu" in figure:
        versions += f", libtpu {figure['libtpu']}"
    return (
        f"**{figure['kind'].capitalize()}** by `{figure['command']}` for {figure['device']} "
        f"({versions}; commit: {figure['commit']}). {figure.get('setting', '')}".strip()
    )


def tuned() -> str:
    """Every entry of pallas_paged/tuned/, by kind of device."""
    parts = []
    for file in sorted((ROOT / "pallas_paged/tuned").glob("*.json")):
        kind = file.stem.replace("_", " ")
        for op, entries in json.loads(file.read_text()).items():
            parts.append(_tuned_of(kind, op, entries))
    return "".join(parts)


def _tuned_of(kind: str, op: str, entries: Sequence[Mapping[str, Any]]) -> str:
    figures_name = next(name for name in TUNERS if name in entries[0])
    sources = ("jax", "libtpu", "commit", "date")
    left_out = {"config", "device_kind", *TUNERS, "predicted_core_cycles", "vmem_bytes", *sources}
    shape = [name for name in entries[0] if name not in left_out]
    config = list(entries[0]["config"])
    rows = [
        [
            *(entry[name] for name in shape),
            *(entry["config"][name] for name in config),
            ", ".join(f"{case}: {us:,}" for case, us in entry[figures_name].items()),
            ", ".join(str(entry[name]) for name in sources if name in entry),
        ]
        for entry in entries
    ]
    verb = figures_name.removesuffix("_us").capitalize()
    columns = [*shape, *config, "microseconds per case", "jax, libtpu, commit, date"]
    columns = [f"`{name}`" if name.isidentifier() else name for name in columns]
    return (
        f"### {kind}: `{op}`\n\n**{verb}** by `{TUNERS[figures_name]}` for {kind}.\n\n"
        f"{table(columns, rows)}\n"
    )


def modules() -> dict[pathlib.Path, str]:
    """Every module of the packages, and the first sentence or line of its docstring."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            text = ast.get_docstring(ast.parse(file.read_text()))
            if text and file.name != "__init__.py" and not file.name.startswith("test_"):
                found[file.relative_to(ROOT)] = " ".join(text.split("\n\n")[0].split())
    return found


def files() -> str:
    """A table of modules for each folder."""
    parts = []
    folders: dict[pathlib.Path, list[tuple[str, str]]] = {}
    for file, text in modules().items():
        folders.setdefault(file.parent, []).append((f"`{file.name}`", text))
    for folder, rows in folders.items():
        parts.append(f"### `{folder}/`\n\n{table(['file', 'what is in it'], rows)}\n")
    return "".join(parts)


def main() -> None:
    """Writes all of them; a file that would not change is left alone."""
    folder = DOCS / "_generated"
    folder.mkdir(exist_ok=True)
    for name, make in {"measurements": figures, "tuned": tuned, "files": files}.items():
        file, text = folder / f"{name}.md", make()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


if __name__ == "__main__":
    main()
