# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Every planted bug of every file is in the source: its snippet occurs there, once."""

import importlib
import importlib.util
import itertools
import pathlib

import pytest

from tests.planted import NotPlantedError, replace_once

_FOLDER = pathlib.Path(__file__).resolve().parent
FILES = sorted(
    ".".join(file.relative_to(_FOLDER).with_suffix("").parts)
    for file in _FOLDER.rglob("test_*.py")
    if file != pathlib.Path(__file__) and "from tests.planted import" in file.read_text()
)


def source_of(name: str) -> str:
    """The source of a module, which need not be importable here."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return pathlib.Path(spec.origin).read_text()


def test_the_files_that_plant_are_found():
    assert {
        "kv_write.test_indices",
        "kv_write.test_tpu_planted",
        "attention.test_tpu_planted",
    } <= set(FILES)
    # Nobody plants by other means, or goes around the check.
    for file in _FOLDER.rglob("*.py"):
        assert file.name == "planted.py" or ".replace(" + "old" not in file.read_text(), file.name


@pytest.mark.parametrize("file", FILES)
def test_every_snippet_occurs_once_where_it_is_planted(file):
    module = importlib.import_module(f"tests.{file}")
    assert module.PLANTED
    for name, old, new in module.PLANTED:
        source = source_of(name)
        compile(replace_once(source, old, new), name, "exec")  # else it is no bug but a broken file


def test_every_bug_of_a_file_is_listed():
    for file in FILES:
        module = importlib.import_module(f"tests.{file}")
        bugs = [
            bug
            for name in ("BUGS", "KERNEL_BUGS", "ORACLE_BUGS", "FAULTS")
            for bug in getattr(module, name, {}).values()
        ]
        listed = {(old, new) for _, old, new in module.PLANTED}
        assert bugs and all(any(pair in listed for pair in itertools.pairwise(bug)) for bug in bugs)


@pytest.mark.parametrize("old", ["nowhere", "a"])
def test_a_snippet_that_does_not_occur_once_is_no_assertion_error(old):
    """Else a test that expects one of the bug would be content without a bug."""
    with pytest.raises(NotPlantedError, match="times in the source"):
        replace_once("a = a", old, "b")
    assert not issubclass(NotPlantedError, AssertionError)
