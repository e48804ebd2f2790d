# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What is said to need no other version of jax is there, and the others still run with both."""

import ast
import pathlib

import pytest

from pallas_paged import dispatch
from tests import jax_lines

TESTS = pathlib.Path(jax_lines.__file__).parent


@pytest.mark.parametrize("file", jax_lines.FILES_ON_ANY_JAX)
def test_every_file_is_there(file):
    assert (TESTS / file).is_file()


@pytest.mark.parametrize("file", jax_lines.FUNCTIONS_ON_ANY_JAX)
def test_every_function_is_there(file):
    body = ast.parse((TESTS / file).read_text()).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert set(jax_lines.FUNCTIONS_ON_ANY_JAX[file]) < defined


@pytest.mark.parametrize("file", jax_lines.CASES_ON_ANY_JAX)
def test_every_case_is_there(file):
    assert (TESTS / file).is_file()
    assert set(jax_lines.CASES_ON_ANY_JAX[file]) < set(dispatch.BACKENDS)


def test_the_cases_that_run_with_both_show_every_feature():
    cases = [(x, y) for x in range(3) for y in "ab"]
    params = jax_lines.runs(cases, features=lambda case: case, id_of=str)
    assert [param.values for param in params] == cases
    kept = [param.values for param in params if not param.marks]
    assert {x for x, _ in kept} == {0, 1, 2} and {y for _, y in kept} == {"a", "b"}
    assert len(kept) == 3
