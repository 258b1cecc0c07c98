"""Try to break things, and write what was tried, how often and with what result into `reports/reliability.md`.

    python benchmarks/reliability.py --kills 100 --examples 200

Kills are those of `kill_resume.py`, examples those of `tests/fuzz`; the rest are the tests that name a hostile input.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
KILLS = {
    "killed at random moments, all recipes": ("--where=time", "--recipes=all"),
    "killed before operations on files, writes cut in half, all recipes": ("--where=operations", "--recipes=all"),
    "two processes, the first one killed before operations on files": (
        *("--where=operations", "--recipes=plain,quota"),
        "--processes=2",
    ),
}
HOSTILE = {  # what is tried -> the tests that do
    "folders of models: claims, damage, pickles, missing paths": "tests/models/test_check_config.py",
    "files that are no pictures: pipes, devices, PostScript, too many pixels": "tests/data/test_decode.py",
    "folders of classes: nested, linked, looped": "tests/data/test_class_folders.py",
    "recipes that cannot be trained, before the first step": "tests/training/test_preflight.py",
    "records of runs: torn, foreign, locked, full disks": "tests/training/test_runs.py",
    "studies: dead workers, databases that are down, other settings": "tests/studies/test_sweep.py",
    "names from anywhere in reports": "tests/studies/test_report.py",
    "writes outside of the folders that were given": "tests/test_writes.py",
}


def killed(kills: int, options: tuple[str, ...]) -> tuple[str, str]:
    command = [sys.executable, ROOT / "benchmarks/kill_resume.py", f"--kills={kills}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines() or [done.stderr.strip()]
    if not lines[-1].startswith("{"):
        return f"{kills} kills", f"stopped: {(done.stderr.strip() or lines[-1]).splitlines()[-1]}"
    found = json.loads(lines[-1])
    runs = sum(line.startswith("killed after") for line in lines)
    return f"{kills} kills of {runs} runs", f"{found['runs_that_differ']} runs differ from the undisturbed one"


def outcome(path: str, examples: int = 0) -> tuple[int, int]:
    """Return how many tests a file has, and how many of them failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, f"--junitxml={report}"]
        environment = os.environ | ({"MSVIT_FUZZ_EXAMPLES": str(examples)} if examples else {})
        subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    return int(suite.get("tests")), int(suite.get("failures")) + int(suite.get("errors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each kind; a tenth with two processes")
    parser.add_argument("--examples", type=int, default=200, help="of each test in tests/fuzz")
    arguments = parser.parse_args()
    begun, rows = time.time(), []
    for title, options in KILLS.items():
        kills = arguments.kills // (10 if "--processes=2" in options else 1) or 1
        rows.append((title, *killed(kills, options)))
    for path in sorted((ROOT / "tests/fuzz").glob("test_*.py")):
        tests, failed = outcome(f"tests/fuzz/{path.name}", arguments.examples)
        title = path.read_text().partition('"""')[2].partition(":")[0]
        rows.append((f"{title.lower()}, by Hypothesis", f"{tests} tests of {arguments.examples}", f"{failed} failed"))
    for title, path in HOSTILE.items():
        tests, failed = outcome(path)
        rows.append((title, f"{tests} cases", f"{failed} failed"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    page = PAGE.format(
        kills=arguments.kills, examples=arguments.examples, table=table, python=platform.python_version(),
        minutes=(time.time() - begun) / 60,
    )  # fmt: skip
    (ROOT / "reports/reliability.md").write_text(page)
    print(page)


PAGE = """# What was tried to break it, how often, and with what result

Made by `make reliability ARGS='--kills {kills} --examples {examples}'` in {minutes:.0f} minutes, on Python {python}.
`make test` does a part of each; `make test-slow` some hundreds of kills; `make fuzz EXAMPLES=10000` as many examples as
one has time for.

| what | how often | result |
|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
