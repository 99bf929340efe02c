"""What is handed out: built without a warning, installed where nothing else is, and checked out without links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT

from cacompile.unlinked import find_passes


def done(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What it prints, errors included; fails with its last words."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    result = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=clean | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this repository with the working tree's files, in which git could make no links."""
    folder = tmp_path_factory.mktemp("clone") / "cacompile"
    done("git", "-c", "core.symlinks=false", "clone", "--quiet", ROOT, folder, cwd=ROOT)
    files = done("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    assert (folder / "cacompile" / "passes").is_file(), "this is what is tested"
    return folder


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with an sdist, and the wheel that was built from it; and what the builder said."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    said = done(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=checkout)
    return folder, said


def test_a_checkout_without_links_is_imported_whole(checkout: Path, tmp_path: Path) -> None:
    ask = "import cacompile.backend, cacompile.passes.kinds.linear as found; print(found.__name__, found.__file__)"
    name, file = done(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(checkout)).split()
    assert name == "cacompile.passes.kinds.linear" and Path(file) == checkout / "passes" / "kinds" / "linear.py"


def test_nothing_is_searched_for_where_there_is_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, *_ = done("git", "ls-files", "--stage", "cacompile/passes", cwd=ROOT).split()
    assert mode == "120000"
    monkeypatch.setattr(sys, "meta_path", before := list(sys.meta_path))
    if (ROOT / "cacompile" / "passes").is_dir():
        find_passes()
    assert sys.meta_path == before


@pytest.mark.slow
def test_nothing_is_warned_of_while_building(built: tuple[Path, str]) -> None:
    _, said = built
    assert "Successfully built" in said
    assert not [line for line in said.splitlines() if "warning" in line.lower() or "absent" in line]


@pytest.mark.slow
def test_all_files_of_the_package_are_in_the_wheel(built: tuple[Path, str]) -> None:
    folder, _ = built
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = done("git", "ls-files", "--cached", "--others", "--exclude-standard", "cacompile", "passes", cwd=ROOT)
    expected = {name if name.startswith("cacompile/") else f"cacompile/{name}" for name in tracked.splitlines()}
    assert inside == expected - {"cacompile/passes"}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/guide.md"} <= names
    assert not [name for name in names if name.startswith("tests/")], "a part of them would not run"


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_environment(built: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = built
    (wheel,) = folder.glob("*.whl")
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    done(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=tmp_path)
    run = Path(shutil.copy(ROOT / "tests" / "wheel_run.py", tmp_path))
    said = done(python, run, "--quick", cwd=tmp_path)
    assert str(place) in said and "% of dW FLOPs skipped" in said
    said = done(place / "bin" / "cacompile", "doctor", cwd=tmp_path)
    assert 'backend="convaware" is registered' in said, "without an extra"
