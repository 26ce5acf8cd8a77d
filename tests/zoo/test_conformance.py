"""Every installed family keeps the promises of the plugin contract."""

from __future__ import annotations

import pytest

from detrcli.plugins import broken, models
from detrcli.testing import CHECKS


def test_no_plugin_is_broken():
    assert not broken()


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("model", models(), ids=lambda m: m.name)
def test_conformance(model, check):
    check(model)
