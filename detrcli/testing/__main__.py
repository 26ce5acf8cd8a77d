"""`python -m detrcli.testing FAMILY`: store what the family's models are, see `detrcli.testing.golden`."""

from __future__ import annotations

import sys

from detrcli.errors import DetrError
from detrcli.testing.conformance import models_of
from detrcli.testing.golden import write
from detrcli.testing.samples import SMALL


def main() -> None:
    if not sys.argv[1:]:
        raise SystemExit(
            "usage: python -m detrcli.testing FAMILY…, each of them installed; see: detr zoo list"
        )
    try:
        families = [models_of(name) for name in sys.argv[1:]]
    except DetrError as error:
        raise SystemExit(f"{error.message} ({error.hint})") from None
    for family in families:
        sys.stdout.write(f"{write(family, SMALL)}\n")


if __name__ == "__main__":
    main()
