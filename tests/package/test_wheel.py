# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is in the wheel, by setup.cfg: two packages with their data, and neither bench nor tests.

Read off the configuration as setuptools documents it: not every environment has setuptools.
"""

import configparser
import fnmatch
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOLDERS = ("pallas_paged", "reference_engine", "bench", "tests")


def in_the_wheel() -> set[str]:
    """Paths of the files that `find:` packages and `package_data` name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    include = config["options.packages.find"]["include"].split("\n")
    data = [pattern.strip() for pattern in config["options.package_data"]["*"].split(",")]
    found = set()
    for top in FOLDERS:
        for init in (ROOT / top).rglob("__init__.py"):
            package = ".".join(init.parent.relative_to(ROOT).parts)
            if any(fnmatch.fnmatchcase(package, pattern) for pattern in include):
                for file in init.parent.iterdir():
                    if any(fnmatch.fnmatch(file.name, name) for name in ["*.py", *data]):
                        found.add(str(file.relative_to(ROOT)))
    return found


def test_the_packages_are_whole():
    wheel = in_the_wheel()
    for top in FOLDERS[:2]:
        sources = {str(file.relative_to(ROOT)) for file in (ROOT / top).rglob("*.py")}
        assert sources and sources <= wheel
    assert {str(x.relative_to(ROOT)) for x in (ROOT / "pallas_paged/tuned").glob("*.json")} <= wheel


@pytest.mark.parametrize("top", FOLDERS[:2])
def test_type_checkers_read_the_annotations(top):
    assert f"{top}/py.typed" in in_the_wheel()


def test_what_runs_from_a_checkout_is_left_out():
    assert {path.split("/")[0] for path in in_the_wheel()} == set(FOLDERS[:2])
