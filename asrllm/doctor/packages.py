"""Versions of Python and of the packages that asrllm requires."""

import importlib
import platform
from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from asrllm.doctor.findings import Finding, ok, problem, warning
from asrllm.text_files import first_words

PACKAGE = "asrllm"
# packages whose version is reported even if it is in its range
REPORTED = ("torch", "deepspeed", "transformers", "peft", "lhotse")
IMPORTED = ("torch", "transformers", "deepspeed")  # the other checks need them


def check_packages() -> list[Finding]:
    """Compare installed versions with the ranges in the metadata of asrllm."""
    try:
        about = metadata.metadata(PACKAGE)
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return [
            warning(
                "packages",
                "asrllm is not installed, so its ranges of versions are unknown",
                "Run 'pip install -e .' in its clone.",
            )
        ]
    findings = [check_python(about["Requires-Python"] or "")]
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is None:  # otherwise it belongs to an extra
            findings += check_requirement(requirement)
    return findings


def check_python(supported: str) -> Finding:
    """Compare the version of Python with a specifier, for example ">=3.10"."""
    version = platform.python_version()
    if SpecifierSet(supported).contains(version, prereleases=True):
        return ok("python", f"Python {version} (supported: {supported or 'any'})")
    return problem(
        "python",
        f"Python {version} is not supported ({supported})",
        "Make an environment with a supported version, and install asrllm there.",
    )


def check_requirement(requirement: Requirement) -> list[Finding]:
    """Compare an installed version with its range.

    Returns:
        Nothing for a package in its range, unless it is one of REPORTED.
    """
    name = requirement.name
    # A shell would read < and > without quotes.
    fix = f"Run pip install '{name}{requirement.specifier}'."
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return [problem(name, f"{name} is not installed", fix)]
    if not requirement.specifier.contains(version, prereleases=True):
        text = f"{name} {version} is outside the tested range ({requirement.specifier})"
        return [problem(name, text, fix)]
    if name in REPORTED:
        return [ok(name, f"{name} {version} (tested: {requirement.specifier})")]
    return []


def check_imports(names: Sequence[str] = IMPORTED) -> list[Finding]:
    """Import packages, and report those that cannot be imported."""
    findings = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            text = f"{name} cannot be imported: {first_words(error)}"
            fix = "Install it again for this Python, torch and CUDA."
            findings.append(problem(f"import {name}", text, fix))
    return findings
