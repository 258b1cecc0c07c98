"""Try to break things, and write what was tried, how often and with what result into `reports/reliability.md`.

    python benchmarks/reliability.py --kills 100 --examples 200

Kills are those of `kill_resume.py` and `kill_sweep.py`, examples those of `tests/fuzz`; the rest are the tests that
name a hostile input.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
KILLS = {  # what is tried -> the program that does, and its options
    "killed at random moments": ("kill_resume.py", "--where=time", "--recipes=all"),
    "killed before operations on files, writes cut in half": (
        *("kill_resume.py", "--where=operations"),
        "--recipes=all",
    ),
    "workers of a sweep, killed before operations on files": ("kill_sweep.py",),
    "two processes, the first one killed before operations on files": (
        *("kill_resume.py", "--where=operations", "--recipes=plain,quota"),
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
    "command lines that cannot be": "tests/test_cli.py",
    "files given to the explorer for pictures": "tests/explorer/test_uploads.py",
    "files given to the explorer for masks": "tests/explorer/test_painting.py",
    "names from anywhere in reports": "tests/studies/test_report.py",
    "writes outside of the folders that were given": "tests/test_writes.py",
}


def killed(kills: int, program: str, *options: str) -> tuple[str, str]:
    command = [sys.executable, ROOT / "benchmarks" / program, f"--kills={kills}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines() or [done.stderr.strip()]
    if not lines[-1].startswith("{"):
        return f"{kills} kills", f"stopped: {(done.stderr.strip() or lines[-1]).splitlines()[-1]}"
    found = json.loads(lines[-1])
    runs = sum(line.startswith("killed after") for line in lines)
    recipes = sum(", undisturbed: " in line for line in lines)
    return f"{kills} kills of {runs} runs" + (
        f", {recipes} recipes" if recipes else ""
    ), f"{found['runs_that_differ']} runs differ from the undisturbed one"


def tested(paths: Iterable[str], examples: int) -> dict[str, tuple[int, int]]:
    """Return for each file of tests how many ran, and how many of them failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, f"--junitxml={report}"]
        environment = os.environ | {"MSVIT_FUZZ_EXAMPLES": str(examples)}
        subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found = {}
    for path in paths:
        name = path.removesuffix(".py").replace("/", ".")
        own = [{part.tag for part in case} for case in cases if f"{case.get('classname')}.".startswith(f"{name}.")]
        ran = [tags for tags in own if "skipped" not in tags]
        found[path] = len(ran), sum(bool(tags & {"failure", "error"}) for tags in ran)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each kind; a tenth with two processes")
    parser.add_argument("--examples", type=int, default=200, help="of each test in tests/fuzz")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how much at the same time")
    arguments = parser.parse_args()
    fuzz = {f"tests/fuzz/{path.name}": path for path in sorted((ROOT / "tests/fuzz").glob("test_*.py"))}
    begun = time.time()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tests = pool.submit(tested, [*fuzz, *HOSTILE.values()], arguments.examples)
        kills = {
            title: pool.submit(killed, arguments.kills // (10 if "--processes=2" in how else 1) or 1, *how)
            for title, how in KILLS.items()
        }
    rows = [(title, *done.result()) for title, done in kills.items()]
    for path, (count, failed) in tests.result().items():
        if path in fuzz:
            title = fuzz[path].read_text().partition('"""')[2].partition(":")[0].lower()
            rows.append((f"{title}, by Hypothesis", f"{count} tests of {arguments.examples}", f"{failed} failed"))
    for title, path in HOSTILE.items():
        count, failed = tests.result()[path]
        rows.append((title, f"{count} cases", f"{failed} failed"))
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
