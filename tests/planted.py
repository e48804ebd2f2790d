# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Plants a bug: one snippet of a module's source replaced, the modules around it made anew."""

import pathlib
import sys
import types
from collections.abc import Sequence


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
            assert source.count(old) == 1, f"the snippet occurs {source.count(old)} times"
            source = source.replace(old, new)
        module = types.ModuleType(full_name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, full_name, module)
        monkeypatch.setattr(package, module_name, module)
        exec(compile(source, str(path), "exec"), module.__dict__)
    return sys.modules[f"{package.__name__}.{name}"]
