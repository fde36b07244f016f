"""Make the pictures of the README from a quickstart.

    make quickstart | tee quickstart.log
    .venv/bin/python docs/pictures/make.py quickstart.log quickstart/exp/greedy_search/report.html

They are written beside this file. It needs chromium.
"""

import argparse
import html
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPORT_SIZE = (1200, 690)  # pixels; the report continues below
# lines of progress, paths, and times, which are those of another machine
HIDDEN = (
    *("importing ", "loading ", "transcribing", "weights ", "speech ", "shards ", "run "),
    *("times: ", "next:", "  "),
)
ADVANCE = 8.4  # width of a character of 14 px, in pixels
LINE = 20  # height of a line in pixels
MARGIN = 14  # pixels around the text
FONT = "14px 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="what the quickstart printed")
    parser.add_argument("report", type=Path, help="its report.html")
    arguments = parser.parse_args()
    (HERE / "quickstart.svg").write_text(terminal(last_lines(arguments.log.read_text())))
    photograph(arguments.report.resolve(), HERE / "report.png")


def last_lines(log: str) -> list[str]:
    """Return the lines of a log from the transcription of a recording on, with short paths."""
    root = re.search(r"^weights +(.+)/quickstart/weights$", log, re.M)
    if root is None:
        raise SystemExit("The log has no summary. Let the quickstart end.")
    lines = log[log.index("== transcription") :].replace(f"{root[1]}/", "").splitlines()
    return ["$ make quickstart", "...", *(line for line in lines if not line.startswith(HIDDEN))]


def terminal(lines: list[str]) -> str:
    """Return an SVG of lines in a terminal."""
    width = max(map(len, lines)) * ADVANCE + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    texts: list[str] = []
    for row, line in enumerate(lines):
        color = "#ffffff" if line.startswith(("WER", "$ make")) else "#b8bec6"
        # the length keeps a browser's other font within the window
        texts.append(
            f'<text x="{MARGIN}" y="{MARGIN + row * LINE + 15}" fill="{color}" '
            f'textLength="{len(line) * ADVANCE:.1f}">{html.escape(line)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {width:.0f} {height}" xmlns="http://www.w3.org/2000/svg">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#22272e"/>\n'
        f'<g style="font: {FONT}; white-space: pre">\n' + "\n".join(texts) + "\n</g>\n</svg>\n"
    )


def photograph(report: Path, out: Path) -> None:
    """Write the upper part of a report as a PNG."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    size = ",".join(map(str, REPORT_SIZE))
    command = ["chromium", *flags, f"--window-size={size}", f"--screenshot={out}", str(report)]
    subprocess.run(command, check=True, timeout=60)


if __name__ == "__main__":
    main()
