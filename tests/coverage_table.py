#!/usr/bin/env python3
"""Print the line and branch coverage of each package as JSON.

    coverage json -o coverage.json && python tests/coverage_table.py coverage.json

Numbers are percentages of the lines and of the branches, and how many there are.
"""

import collections
import datetime
import json
import platform
import sys
from pathlib import Path

COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def table(report: dict) -> dict[str, dict[str, float]]:
    """Sum the files of coverage's JSON report by package; files beside the packages are "top"."""
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for file, data in report["files"].items():
        _, *folders, _ = Path(file).parts
        for package in (folders[0] if folders else "top", "all"):
            for name in COUNTS:
                sums[package][name] += data["summary"][name]
    return {package: percentages(counts) for package, counts in sorted(sums.items())}


def percentages(counts: collections.Counter[str]) -> dict[str, float]:
    """Return the percentages of one package."""
    branches = counts["num_branches"] or 1
    return {
        "lines": counts["num_statements"],
        "lines %": round(100 * counts["covered_lines"] / counts["num_statements"], 2),
        "branches": counts["num_branches"],
        "branches %": round(100 * counts["covered_branches"] / branches, 2),
    }


if __name__ == "__main__":
    result = {
        "date": f"{datetime.date.today()}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "packages": table(json.loads(Path(sys.argv[1]).read_text())),
    }
    print(json.dumps(result, indent=1))
