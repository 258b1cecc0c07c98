"""The repository around the package: its lock, its commands, and what its files must not hold."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
WORKERS = "-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"
LINES = 300  # a file of the package that grows beyond is two ideas
FOREIGN = {
    "names a package index": re.compile("pypi" + r"\.org|python" + r"hosted|--(?:extra-)?index-" + r"url\b"),
    "holds a path of one machine": re.compile(r"(?<![\w.~])/(?:root|work|home|Users)/\w"),
}

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git checkout")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
needs_ruff = pytest.mark.skipif(not find_spec("ruff"), reason="ruff is not installed (extra `tests`)")
needs_nbstripout = pytest.mark.skipif(not find_spec("nbstripout"), reason="nbstripout is not installed")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **{"cwd": ROOT} | options)


def pins(lock="constraints.txt"):
    lines = (line.strip() for line in (ROOT / lock).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements():
    """Every package of pyproject.toml: the core's, the extras', the build's; not msvit's extras of itself."""
    groups = [PROJECT["project"]["dependencies"], *EXTRAS.values(), PROJECT["build-system"]["requires"]]
    return [Requirement(text) for group in groups for text in group if not text.startswith("msvit[")]


def project_files():
    """Files that are in git or would be added, as text; pictures and the like left out."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {path: data.decode() for path, data in contents.items() if b"\0" not in data[:8192]}


# ---- the locks: pyproject.toml has bounds, constraints.txt the versions to develop with, constraints-oldest.txt the
# oldest within the bounds, and environment.yml is constraints.txt again for conda


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_within_its_bound(requirement):
    name = canonicalize_name(requirement.name)
    assert name in pins(), f"constraints.txt has no line for {name}: add {name}==<the version tested with>"
    assert requirement.specifier.contains(pins()[name]), f"{name}=={pins()[name]} is outside {requirement}"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_has_a_lower_bound_alone(requirement):
    assert [bound.operator for bound in requirement.specifier] == [">="], "the oldest version that works, see below"


def test_the_oldest_lock_is_the_bounds():
    build = {canonicalize_name(Requirement(text).name) for text in PROJECT["build-system"]["requires"]}
    bounds = {canonicalize_name(r.name): Version(bound.version) for r in requirements() for bound in r.specifier}
    for name in build:
        bounds.pop(name)  # pip builds in an environment of its own
    assert pins("constraints-oldest.txt") == bounds, "`make test-oldest` tries what pyproject.toml admits"


@pytest.mark.parametrize("lock", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_are_exact_sorted_and_unique(lock):
    lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    assert not [line for line in lines if "+" in line], "a local build's version is on no index"
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(set(names)) == len(names)
    assert "msvit" not in names


def test_extra_all_is_every_extra():
    (everything,) = (Requirement(text) for text in EXTRAS["all"])
    assert everything.name == "msvit"
    assert everything.extras == EXTRAS.keys() - {"all"}


def test_conda_environment_is_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["project"]["name"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[all]"]}
    (python,) = (Requirement(text) for text in conda if text.startswith("python"))
    supported = Requirement("python" + PROJECT["project"]["requires-python"]).specifier
    minors = [f"3.{minor}" for minor in range(30) if python.specifier.contains(f"3.{minor}")]
    assert minors == ["3.11", "3.12"]
    assert all(supported.contains(minor) for minor in minors)
    assert {f"Programming Language :: Python :: {minor}" for minor in minors} <= set(PROJECT["project"]["classifiers"])


def test_installed_versions_are_supported():
    """The interpreter at hand meets the bounds of the core, whatever a user upgraded."""
    from importlib.metadata import version

    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


# ---- what files hold


@needs_git
def test_files_name_no_index_and_no_machine():
    found = [
        f"{path.relative_to(ROOT)} {what}: {match[0]}"
        for path, text in project_files().items()
        for what, pattern in FOREIGN.items()
        for match in [pattern.search(text)]
        if match
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("https://py" + "pi.org/simple", True),
        ("pip install --index" + "-url x", True),
        ("File /ro" + "ot/x.py", True),
        ('"/ho' + 'me/ann/runs"', True),
        ("~/runs, ./work/x, notebooks/work/x, /tmp/x", False),
    ],
)
def test_foreign_words_are_seen(text, foreign):
    assert any(pattern.search(text) for pattern in FOREIGN.values()) == foreign


@pytest.mark.parametrize("path", sorted((ROOT / "msvit").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_compact(path):
    assert len(path.read_text().splitlines()) <= LINES


@needs_git
def test_pages_point_at_what_is_there():
    """Pictures and links of the Markdown pages, and the folders and files of `reports/` that they name."""
    tracked = set(project_files()) | {ROOT / name for name in run("git", "ls-files").stdout.splitlines()}
    there = tracked | {folder for path in tracked for folder in path.parents}
    for page in (path for path in tracked if path.suffix == ".md"):
        text = page.read_text()
        links = {page.parent / name for name in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)}
        named = {ROOT / name for name in re.findall(r"`(reports/[\w./*-]*\w/?)`", text)}
        missing = [str(path.relative_to(ROOT)) for path in links | named if path not in there]
        assert not missing, f"{page.name} names {missing}, which git does not have"


def test_bitwise_is_promised_for_the_same_number_of_threads():
    """Five epochs on one thread and on two end 2.8e-5 apart."""
    for name in ("README.md", "msvit/training/loop.py", "benchmarks/kill_resume.py"):
        for paragraph in (ROOT / name).read_text().split("\n\n"):
            assert "bitwise" not in paragraph or "number of threads" in " ".join(paragraph.split()), (name, paragraph)


def test_license_is_the_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert text.split(maxsplit=4)[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_version_has_its_changelog():
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_paper_is_cited_alike_and_the_code_by_its_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    (paper,) = cited["references"]
    entry = re.search(r"```bibtex\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    entry = entry.replace("{", "").replace("}", "").replace("\\'e", "é")
    assert paper["title"] in entry
    assert all(f"{who['family-names']}, {who['given-names']}" in entry for who in paper["authors"])
    assert str(paper["year"]) in entry
    assert paper["identifiers"][0]["value"] in entry


@needs_nbstripout
@pytest.mark.long
def test_notebooks_are_stored_without_outputs():
    notebooks = sorted(map(str, (ROOT / "notebooks").glob("*.ipynb")))
    if not notebooks:
        pytest.skip("no notebooks")
    done = run(sys.executable, "-m", "nbstripout", "--verify", "--keep-id", *notebooks)
    assert done.returncode == 0, f"{done.stdout}strip them: python -m nbstripout --keep-id notebooks/*.ipynb"


@needs_ruff
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    done = run(sys.executable, "-m", "ruff", *command)
    assert done.returncode == 0, done.stdout


# ---- the commands, with a stand-in for Python that notes what it is asked to do

STAND_IN = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
    *"sys.version_info"*) exit ${TOO_OLD:-0} ;;
    *"-m venv"*) for venv; do :; done; mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python" ;;
    *"pip install"*) if [ -e interrupt ]; then rm interrupt; kill -INT $PPID; exit 130; fi ;;
esac
"""


@pytest.fixture
def bench(tmp_path):
    """A function that calls make in a copy of the build files; it returns the outcome and the log."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def make(*arguments, **variables):
        log.write_text("")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        environment = inherited | {"LOG": str(log), "PYTHON": str(python)} | variables
        done = run("make", *arguments, cwd=tmp_path, env=environment)
        return done, log.read_text()

    return make


@needs_make
def test_make_lists_every_command(bench):
    listed = re.findall(r"^  ([a-z-]+)  ", bench()[0].stdout, re.MULTILINE)
    assert listed == re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@needs_make
def test_make_installs_once_with_the_lock_and_in_one_call(bench):
    done, log = bench("test", "ARGS=-k gate")
    assert done.returncode == 0, done.stderr
    assert log.count("pip install") == 1, "torch and torchvision must come from one call"
    assert "-c constraints.txt -e .[all]" in log
    assert log.splitlines()[-1] == f"-m pytest {WORKERS} -k gate"
    assert "pip install" not in bench("test")[1]


@needs_make
def test_make_test_fast_leaves_out_what_takes_long(bench):
    done, log = bench("test-fast", "ARGS=-x")
    assert done.returncode == 0, done.stderr
    assert log.splitlines()[-1] == f"-m pytest -m not (slow or notebook or browser or long) {WORKERS} -x"


@needs_make
def test_make_test_oldest_has_an_environment_of_its_own(bench, tmp_path):
    done, log = bench("test-oldest", "ARGS=-x")
    assert done.returncode == 0, done.stderr
    assert "-c constraints-oldest.txt -e .[all]" in log
    assert (tmp_path / ".venv-oldest/.installed").exists()
    assert not (tmp_path / ".venv").exists()
    folders = re.fullmatch(r"-m pytest (.*) -x", log.splitlines()[-1])[1].split()
    assert "tests/core" in folders
    assert all(list((ROOT / folder).glob("test_*.py")) for folder in folders)


def test_make_runs_modules_that_exist():
    for name in re.findall(r"\$\(RUN\) (msvit[\w.]*)", (ROOT / "Makefile").read_text()):
        assert find_spec(name), f"the Makefile runs {name}"


@needs_make
@pytest.mark.parametrize(("user", "options"), [("0", "--allow-root "), ("1000", "")])
def test_make_lab_opens_the_start_page_as_root_too(bench, tmp_path, user, options):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "bin/id").chmod(0o755)
    done, log = bench("lab", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    page = re.search(r"default_url=/lab/tree/(\S+)", log)[1]
    assert log.splitlines()[-1].startswith(f"-m jupyterlab {options}--ServerApp.ip=127.0.0.1")
    assert (ROOT / page).is_file()
    for command in ("lab", "explorer"):
        assert "ip=0.0.0.0 " in bench(command, "IP=0.0.0.0")[1]


def test_the_start_page_lists_every_notebook_as_the_readme_does():
    start = "".join(json.loads((ROOT / "notebooks/start.ipynb").read_text())["cells"][0]["source"])
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \| (.+) \| (.+) \|$", start, re.MULTILINE)
    assert {name for name, *_ in listed} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"start"}
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == {row for row in rows if (ROOT / f"notebooks/{row[0]}.ipynb").exists()}


@needs_make
def test_make_takes_up_an_interrupted_installation(bench, tmp_path):
    (tmp_path / "interrupt").touch()
    broken = tmp_path / ".venv/lib/torch-1.dist-info"
    whole = tmp_path / ".venv/lib/timm-1.dist-info"
    for folder in (broken, whole):
        folder.mkdir(parents=True)
        (folder / "METADATA").touch()
    (whole / "INSTALLER").touch()
    done, log = bench("test")
    assert done.returncode != 0
    assert "pytest" not in log
    assert not (tmp_path / ".venv/.installed").exists()
    assert not broken.exists(), "pip would take it for installed"
    assert whole.exists()
    done, log = bench("test")
    assert done.returncode == 0, done.stderr
    assert "-m venv" not in log, "what is installed already stays"
    assert "pip install" in log
    assert "-m pytest" in log


@needs_make
def test_make_installs_anew_when_the_lock_changes(bench, tmp_path):
    bench("test")
    later = (tmp_path / ".venv/.installed").stat().st_mtime + 2
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "pip install" in bench("test")[1]


@needs_make
def test_make_says_which_python_it_needs(bench):
    done, log = bench("test", TOO_OLD="1")
    assert done.returncode != 0
    assert "venv" not in log.replace("sys, ensurepip", "")
    assert "Python 3.11 or later" in done.stderr
    assert "PYTHON=python3.12" in done.stderr
