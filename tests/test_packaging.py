"""What a user installs: wheel and sdist, into empty environments, with and without a C compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import warnings, sys
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from statbuffer import StatBuffer
    import statbuffer._table
with StatBuffer("sqlite:///smoke.db", interval=0.01) as views:
    for number in range(1000):
        views.increment(f"page-{number % 10}")
    views.flush(timeout=20)
    assert views.total("page-3") == 100
    assert views.stats().balanced
    print(views.stats().table_kind, [str(w.message)[:60] for w in caught])
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist, built from the files that git knows."""
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", source / "dist", source)
    return source / "dist"


def smoke(tmp_path: Path, package: Path, **environment: str) -> str:
    """Install into an empty environment and count something there."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name != "STATBUFFER_TABLE"} | environment
    run(python, "-m", "pip", "install", "-q", "--no-cache-dir", package, env=env)
    (tmp_path / "smoke.py").write_text(SMOKE)
    return run(python, tmp_path / "smoke.py", cwd=tmp_path, env=env)


@pytest.mark.timeout(300)
def test_the_wheel_installs_and_counts_natively(dist, tmp_path):
    [wheel] = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "statbuffer/py.typed" in names
    assert any(name.startswith("statbuffer/_table/_native.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.startswith(("tests", "bench")) or name.endswith(".c")]
    assert smoke(tmp_path, wheel).split() == ["native", "[]"]


@pytest.mark.timeout(300)
def test_the_sdist_installs_and_counts_natively(dist, tmp_path):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"README.md", "LICENSE", "pyproject.toml", "src/statbuffer/_table/_native.pyx"} <= set(names)
    assert smoke(tmp_path, sdist).split() == ["native", "[]"]


@pytest.mark.timeout(300)
def test_without_a_compiler_it_installs_all_the_same_and_says_so_once(dist, tmp_path):
    [sdist] = dist.glob("*.tar.gz")
    assert (
        smoke(tmp_path, sdist, CC="/bin/false")
        .strip()
        .startswith("reference ['statbuffer was installed without its compiled")
    )


def choice(value: str, code: str = "") -> subprocess.CompletedProcess[str]:
    code = code or "import statbuffer._table; print(statbuffer._table.CounterTable.__module__)"
    env = {**os.environ, "STATBUFFER_TABLE": value}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_environment_can_choose_the_table():
    assert choice("native").stdout.strip().endswith("_native")
    done = choice("reference")
    assert (done.stdout.strip(), done.stderr) == ("statbuffer._table._reference", "")
    assert "STATBUFFER_TABLE='fast': expected 'native' or 'reference'" in choice("fast").stderr


def test_a_missing_native_table_is_said_or_refused_as_the_environment_wants():
    code = "import sys; sys.modules['statbuffer._table._native'] = None; import statbuffer"
    refused = choice("native", code)
    assert refused.returncode != 0
    assert "STATBUFFER_TABLE=native: statbuffer was installed without its compiled counter table" in refused.stderr
    fallback = choice("", code)
    assert fallback.returncode == 0
    assert fallback.stderr.count("RuntimeWarning") == 1
