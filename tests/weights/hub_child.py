"""Run by the tests in a process of its own, as the client reads its environment when imported: one request a line of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import detrcli.weights.metadata  # noqa: F401  # before the user changes to one who may read no module
from detrcli.errors import DetrError
from detrcli.weights.hub import Reference, companion, fetch

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.001))  # the client's retries add up to 23 s a fault


def answer(request: dict[str, object]) -> dict[str, object]:
    if "limit" in request:  # the largest file that may be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(str(request["limit"])), resource.RLIM_INFINITY))
    if request.get("nobody") and os.geteuid() == 0:  # root may write anywhere
        os.seteuid(65534)
    try:
        text, sha256 = str(request["reference"]), request.get("sha256")
        reference = Reference.parse(text)
        reference = Reference(
            reference.repo, reference.revision, reference.file, str(sha256) if sha256 else None
        )
        offline = bool(request.get("offline"))
        if "beside" in request:
            path = companion(reference, str(request["beside"]), offline=offline)
            return {"path": path and str(path)}
        found = fetch(reference, offline=offline)
    except DetrError as error:
        return {"error": error.message, "hint": error.hint, "kind": error.kind, "exit_code": error.exit_code}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if os.geteuid() != os.getuid():
            os.seteuid(os.getuid())
    return {
        "path": str(found.path),
        "commit": found.commit,
        "sha256": found.sha256,
        "first_use": found.first_use,
    }


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
