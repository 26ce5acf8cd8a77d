"""`python -m detrcli.testing FAMILY`: store what the family's models are, see `detrcli.testing.golden`."""

from __future__ import annotations

import sys

from detrcli.testing.conformance import SMALL, models_of
from detrcli.testing.golden import write


def main() -> None:
    families = [models_of(name) for name in sys.argv[1:]]
    if not families or not all(families):
        raise SystemExit(
            "usage: python -m detrcli.testing FAMILY…, each of them installed; see: detr zoo list"
        )
    for family in families:
        sys.stdout.write(f"{write(family, SMALL)}\n")


if __name__ == "__main__":
    main()
