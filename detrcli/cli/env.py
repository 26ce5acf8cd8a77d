"""`detr env`: what a bug report needs, and why things are as they are."""

from __future__ import annotations

from detrcli.cli.options import AsJson


def env(as_json: AsJson = False) -> None:
    """Show versions, devices, kernels, caches and plugins, and why each is as it is."""
    from detrcli.cli import console

    console.settings.json = as_json
    from detrcli.environment import collect

    facts = collect()
    if as_json:
        console.emit_json(facts)
        return
    for section, rows in facts.items():
        console.say(f"{section}:")
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            console.say(f"  {name:<{width}}  {value}")
