"""Tests of the papers. The shared checks explain themselves when they fail."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.golden")
