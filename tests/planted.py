# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Plants a bug: one snippet of a module's source replaced, the modules around it made anew.

A file that plants lists its bugs as PLANTED, (full name of the module, snippet, what stands there
instead), for test_planted.py, which looks for each snippet in the source.
"""

import pathlib
import sys
import types
from collections.abc import Sequence


class NotPlantedError(Exception):
    """The bug is not in the source. No AssertionError: those are what a bug should cause."""


def replace_once(source: str, old: str, new: str) -> str:
    """`source` with `old`, which must occur once, replaced by `new`."""
    if source.count(old) != 1:
        raise NotPlantedError(f"{source.count(old)} times in the source: {old!r}")
    return source.replace(old, new)


def plant(
    monkeypatch, package: types.ModuleType, modules: Sequence[str], name: str, old: str, new: str
) -> types.ModuleType:
    """The module `name` of a package with `old` replaced by `new`, once.

    Args:
      monkeypatch: undoes it all.
      package: where the modules are.
      modules: those that import the module, and it, in the order in which they import each other.
      name, old, new: the module, the snippet (which must occur once), what stands there instead.
    """
    for module_name in modules:
        full_name = f"{package.__name__}.{module_name}"
        path = pathlib.Path(str(sys.modules[full_name].__file__))
        source = path.read_text()
        if module_name == name:
            source = replace_once(source, old, new)
        module = types.ModuleType(full_name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, full_name, module)
        monkeypatch.setattr(package, module_name, module)
        exec(compile(source, str(path), "exec"), module.__dict__)
    return sys.modules[f"{package.__name__}.{name}"]
