"""Every installed family keeps the promises of the plugin contract."""

from __future__ import annotations

import pytest

from detrcli.plugins import broken, models
from detrcli.testing import CHECKS
from detrcli.testing.answers import exported_files_answer_the_same

# half a minute a family, and tests/export look closer at the same files
CASES = [
    pytest.param(c, marks=pytest.mark.long) if c is exported_files_answer_the_same else c for c in CHECKS
]


def test_no_plugin_is_broken():
    assert not broken()


@pytest.mark.parametrize("check", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("model", models(), ids=lambda m: m.name)
def test_conformance(model, check):
    check(model)
