# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Plants a bug: one snippet of a module's source replaced, the modules that import it made anew.

A snippet is compared word by word, so that the formatter's line breaks do not matter. A file that
plants lists its bugs as PLANTED, (full name of the module, snippet, what stands there instead), for
test_planted.py, which looks for each snippet in the source.
"""

import ast
import graphlib
import pathlib
import re
import sys
import types

_WORD = re.compile(r"\w+|[^\w\s]")


class NotPlantedError(Exception):
    """The bug is not in the source. No AssertionError: those are what a bug should cause."""


def _pattern(snippet: str) -> re.Pattern[str]:
    """Matches the snippet's words with any space between them, and the formatter's last comma.

    A snippet of whole lines, indented or with its line's end, matches whole lines only.
    """
    pattern, before = r"(?P<indent>^[ \t]*)" if snippet.startswith("    ") else "(?P<indent>)", ""
    for word in _WORD.findall(snippet):
        if before:
            pattern += r"\s+" if before[-1].isalnum() and word[0].isalnum() else r"\s*"
        if word in ")]}" and before != ",":
            pattern += r",?\s*"
        pattern += re.escape(word)
        before = word.replace("_", "a")
    if snippet.endswith("\n"):
        pattern += r"(?=[ \t]*$)"
    return re.compile(pattern, re.MULTILINE)


def replace_once(source: str, old: str, new: str) -> str:
    """`source` with `old`, which must occur once, replaced by `new`."""
    found = list(_pattern(old).finditer(source))
    if len(found) != 1:
        raise NotPlantedError(f"{len(found)} times in the source: {old!r}")
    return source[: found[0].end("indent")] + new.strip() + source[found[0].end() :]


def _imported(source: str) -> set[str]:
    """Full names of what a module's import statements may name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def plant(monkeypatch, package: str, name: str, old: str, new: str) -> types.ModuleType:
    """The module `name` with `old` replaced by `new`; so are all of a package's that import it.

    Args:
      monkeypatch: undoes it all.
      package: full name of the package whose modules are made anew, those of its folders included.
      name: full name of the module.
      old, new: the snippet (which must occur once), and what stands there instead.
    """
    sources = {
        full_name: pathlib.Path(str(module.__file__)).read_text()
        for full_name, module in sys.modules.items()
        if full_name.startswith(f"{package}.") and not hasattr(module, "__path__")
    }
    imports = {full_name: _imported(source) & set(sources) for full_name, source in sources.items()}
    anew = {name}
    for full_name in graphlib.TopologicalSorter(imports).static_order():
        if full_name != name and not imports[full_name] & anew:
            continue
        anew.add(full_name)
        path, source = str(sys.modules[full_name].__file__), sources[full_name]
        if full_name == name:
            source = replace_once(source, old, new)
        module = types.ModuleType(full_name)
        module.__file__ = path
        monkeypatch.setitem(sys.modules, full_name, module)
        parent, _, short_name = full_name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], short_name, module)
        exec(compile(source, path, "exec"), module.__dict__)
    return sys.modules[name]
