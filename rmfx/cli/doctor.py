"""``rmfx doctor``: versions, devices, execution providers, what is missing and how to fix it."""

from __future__ import annotations

import typer

from rmfx.cli import console, options
from rmfx.doctor import Diagnosis, diagnose

_UNHEALTHY = 1


def doctor(json: options.JsonOption = False) -> None:
    """Show versions, devices and execution providers, what is missing, and the command that fixes it.

    Leaves with code 1 when something is missing that converting or exporting needs.
    """
    with console.step("looking at this machine"):
        diagnosis = diagnose()
    if json:
        console.out_json(diagnosis.to_dict())
    else:
        for line in _lines(diagnosis):
            console.out(line)
    if not diagnosis.healthy:
        raise typer.Exit(_UNHEALTHY)


def _lines(diagnosis: Diagnosis) -> list[str]:
    lines = [f"rmfx {diagnosis.rmfx}, Python {diagnosis.python}, {diagnosis.platform}", ""]
    lines += [f"{p.name:16} {p.version or 'not installed':16} {p.purpose}" for p in diagnosis.packages]
    lines += ["", *diagnosis.devices]
    for provider in diagnosis.providers:
        lines.append(f"onnxruntime {provider.name}: {'active' if provider.active else 'not active'}")
    lines.append("")
    for finding in diagnosis.findings:
        lines += [f"{'problem' if finding.serious else 'advice'}: {finding.what}", f"    fix: {finding.fix}"]
    return lines if diagnosis.findings else [*lines, "nothing is missing"]
