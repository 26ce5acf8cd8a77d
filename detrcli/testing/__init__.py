"""The conformance kit: what every plugin, ours or a third party's, must pass.

    from detrcli.testing import CHECKS, models_of

    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    @pytest.mark.parametrize("model", models_of("my_family"), ids=lambda m: m.name)
    def test_conformance(check, model):
        check(model)

Each check takes a `Model`, looks at one promise, and fails with a sentence that says what to change.
"""

from detrcli.testing.conformance import CHECKS, Check, check_family, models_of

__all__ = ["CHECKS", "Check", "check_family", "models_of"]
