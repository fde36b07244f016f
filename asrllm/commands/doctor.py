"""asrllm doctor: check this machine, and optionally a planned run, before training."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from asrllm.commands.libraries import import_torch
from asrllm.doctor.findings import LEVELS, Finding
from asrllm.doctor.network import check_environment, check_hostfile
from asrllm.doctor.packages import check_imports, check_packages
from asrllm.doctor.system import check_system
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.progress import waiting


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm doctor`.

    Raises:
        UserError: there is a problem that stops training.
    """
    findings = [*check_packages(), *check_system(), *check_environment(os.environ)]
    if arguments.hostfile:
        findings += check_hostfile(Path(arguments.hostfile))
    with waiting("importing torch, transformers and deepspeed"):
        findings += check_libraries()
    is_importable = not any(finding.check.startswith("import ") for finding in findings)
    if is_importable and (arguments.overrides or arguments.config_name):
        findings += check_planned_run(arguments)
    findings.sort(key=lambda finding: LEVELS.index(finding.level))  # keeps the order in a level
    print_findings(findings, as_json=arguments.json)
    problems = sum(finding.level == "problem" for finding in findings)
    if problems:
        raise UserError(
            f"{problems} of {len(findings)} findings would stop training. "
            "Correct them, then run the command again."
        )


def check_libraries() -> list[Finding]:
    """Run the checks that need torch, transformers and DeepSpeed, if these can be imported."""
    findings = check_imports(["torch"])
    if not findings:
        import_torch()
        findings = check_imports()
    if findings:
        return findings
    from asrllm.doctor.devices import check_attention, check_devices
    from asrllm.doctor.operators import check_compilers

    return [*check_devices(), *check_attention(), check_compilers()]


def check_planned_run(arguments: argparse.Namespace) -> list[Finding]:
    """Check the run that the configuration describes."""
    from asrllm.doctor.planned_run import check_run
    from asrllm.hydra_app import run_app
    from asrllm.training.run_config import TrainRun

    findings: list[Finding] = []
    run_app("train", arguments, TrainRun, lambda config: findings.extend(check_run(config)))
    return findings


def print_findings(findings: list[Finding], *, as_json: bool) -> None:
    """Print the findings, one line each, or as one JSON object."""
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"findings": rows}, indent=1))
        return
    for finding in findings:
        print(escape(finding.line()))
