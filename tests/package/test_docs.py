# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The documentation is true: it builds without a warning, its links lead somewhere, its tables are
those of the files that they are made from, and what it names exists."""

import ast
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

import pallas_paged
import reference_engine

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/README.md"]
    + [ROOT / "pallas_paged/README.md"]
)
CONFIGS = ("TpuAttentionConfig", "GpuAttentionConfig", "TpuWriteConfig", "GpuWriteConfig")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
    api = (tmp_path / "api.html").read_text()
    missing = [
        name
        for name in pallas_paged.__all__
        if name[0] != "_" and f"pallas_paged.{name}" not in api
    ]
    assert not missing


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def table_of(page: str, columns: str) -> list[list[str]]:
    """The rows of the table of a page whose head is `columns`, without backticks."""
    lines = (ROOT / page).read_text().splitlines()
    first = lines.index(columns) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


MAIN_LOOPS = table_of("docs/where_is_what.md", "| kernel | file | function |")


@pytest.mark.parametrize(("kernel", "file", "function"), MAIN_LOOPS)
def test_each_main_loop_is_where_the_page_says(kernel, file, function):
    scope = ast.parse((ROOT / file).read_text()).body
    for name in function.split("."):
        named = {
            node.name: node for node in scope if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert name in named, f"{kernel}: {file} has no {name}"
        scope = named[name].body
    importlib.import_module(file.removesuffix(".py").replace("/", "."))


def test_files_that_pages_name_exist():
    """Paths in backticks, from the root or from inside pallas_paged, reference_engine or bench."""
    folders = ["", "pallas_paged", "pallas_paged/attention/tpu", "reference_engine", "bench"]
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # which names what was
            continue
        for name in re.findall(r"`([\w/.]+\.(?:py|json|md|toml|cfg|yaml))`", page.read_text()):
            if "/" in name:
                assert any((ROOT / folder / name).exists() for folder in folders), (page, name)


def test_the_page_of_block_sizes_has_every_field():
    text = (ROOT / "docs/block_sizes.md").read_text()
    for name in CONFIGS:
        fields = getattr(pallas_paged, name).__dataclass_fields__
        assert name in text and [field for field in fields if f"{field}`" not in text] == []
    example = re.search(r"^config = .*?^\)$", text, re.MULTILINE | re.DOTALL)
    names = {"pallas_paged": pallas_paged}
    exec(example[0], names)
    assert names["config"] == pallas_paged.TpuAttentionConfig(512, 128, 8, 4)


def test_tables_of_tuned_block_sizes_have_every_entry(generate):
    text = generate.tuned()
    rows = [line for line in text.splitlines() if re.match(r"\| (\d|True|False)", line)]
    files = sorted((ROOT / "pallas_paged/tuned").glob("*.json"))
    entries = [
        entry for file in files for op in json.loads(file.read_text()).values() for entry in op
    ]
    assert len(rows) == len(entries) > 0
    for row, entry in zip(rows, entries, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for name, value in entry["config"].items():
            assert str(value) in cells, name
        figures = entry.get("measured_us") or entry.get("predicted_us")
        assert all(f"{case}: {us:,}" in row for case, us in figures.items())
        assert entry["commit"] in row and entry["jax"] in row and entry["date"] in row


def test_tables_of_figures_say_where_they_come_from(generate, tmp_path, monkeypatch):
    text = generate.figures()
    assert text.count("**Predicted** by `python -m bench.") == 3
    assert text.count("**Measured** by `python -m bench.") == 3
    assert text.count("commit: ") == 6

    source = (ROOT / "docs/figures.toml").read_text()
    for planted in (
        source.replace('jax = "0.11.2"\n', ""),
        source.replace('"1.9 / 3.7 / 43 / 181 us", ', ""),
    ):
        assert planted != source
        (tmp_path / "figures.toml").write_text(planted)
        monkeypatch.setattr(generate, "DOCS", tmp_path)
        with pytest.raises(ValueError, match="An H100"):
            generate.figures()


def test_every_module_stands_in_the_tables_of_files(generate):
    text = generate.files()
    for package in generate.PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py" and not file.name.startswith("test_"):
                assert f"| `{file.name}` |" in text, file


def resolve(name: str):
    """A module, or an attribute of one, by its dotted name."""
    module, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(module) is not None and attribute in dir(
        importlib.import_module(module)
    ):
        return getattr(importlib.import_module(module), attribute)
    return importlib.import_module(name)


def test_the_new_names_of_the_changelog_exist():
    renames = re.findall(r"^\| (.*) \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    resolved = []
    for old, new in renames:
        old_names, new_names = (re.findall(r"`([\w.]+)`", names) for names in (old, new))
        assert len(old_names) == len(new_names) or "--" in old or old == "old"
        if old.startswith("its "):
            fields = resolved[-1].__dataclass_fields__
            assert set(new_names) <= set(fields) and not set(old_names) & set(fields), new
        elif new_names and new.startswith("`pallas_paged"):
            resolved.append(resolve(new_names[0]))
        elif new.startswith("`EngineConfig"):
            fields = reference_engine.EngineConfig.__dataclass_fields__
            assert new_names[0].split(".")[1] in fields and old_names[0].split(".")[1] not in fields
    assert len(resolved) >= 9


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {pallas_paged.__version__}" in text
    setup = (ROOT / "setup.cfg").read_text()
    assert "version = attr: pallas_paged.__version__\n" in setup
