"""Every way of having shadowc gives the same imports: installed, from a wheel, from a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTS = "import shadowc.kernels.select, shadowc.passes.manager, shadowc.targets.cpu, transformers"


def python(code: str, cwd: Path, **env: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist, and a wheel without its native library (compiling takes long)."""
    out = tmp_path_factory.mktemp("built")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if not name.startswith("examples/models/") and (source := ROOT / name).exists():
            (out / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, out / "tree" / name, follow_symlinks=False)
    build = "import setuptools.build_meta as b; b.build_{}('" + str(out) + "')"
    python(build.format("sdist"), out / "tree")
    (out / "tree" / "setup.py").unlink()
    python(build.format("wheel"), out / "tree")
    return out


def test_installed(tmp_path: Path) -> None:
    python(IMPORTS, tmp_path)
    assert Path(sys.executable).with_name("shadowc").is_file()


def test_uninstalled_checkout() -> None:
    """The root on sys.path makes `kernels` importable: it must not disturb transformers."""
    code = IMPORTS + "; import transformers.modeling_utils; print(shadowc.__file__)"
    file = python(code, ROOT, PYTHONPATH=str(ROOT), PYTHONSAFEPATH="")
    assert file == str(ROOT / "shadowc/__init__.py")


def test_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = IMPORTS + "; print(shadowc.kernels.__file__, shadowc.__version__)"
    file, version = python(code, tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert file == str(tmp_path / "shadowc" / "kernels" / "__init__.py")
    assert wheel.name.startswith(f"shadowc-{version}-")
    tops = {path.name for path in tmp_path.iterdir()}
    assert tops == {"shadowc", f"shadowc-{version}.dist-info"}  # no `kernels`, no `tests`
    for folder in ("passes", "kernels", "targets"):
        here, there = ROOT / folder, tmp_path / "shadowc" / folder
        assert {p.relative_to(here) for p in here.rglob("*.py")} == {
            p.relative_to(there) for p in there.rglob("*.py")
        }
    native = Path("kernels/cpu")  # a C++ program without Python compiles them
    sources = {p.relative_to(ROOT) for p in (ROOT / native).rglob("*.*")}
    assert native / "libtorch/ops.cpp" in sources
    assert sources == {
        p.relative_to(tmp_path / "shadowc") for p in (tmp_path / "shadowc" / native).rglob("*.*")
    }


def test_sdist_can_build_the_native_library(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "kernels/cpu").rglob("*.*")}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "shadowc/kernels/select.py"} <= names


def test_layout_rules() -> None:
    for folder in ("passes", "kernels", "targets"):
        link = ROOT / "shadowc" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert "import" not in (ROOT / "kernels/__init__.py").read_text().partition('"""\n')[2]
    assert not (ROOT / "conftest.py").exists() and not list((ROOT / "tests").rglob("__init__.py"))


def test_constraints_pin_a_cpu_sized_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    assert all("==" in line and "/" not in line for line in lines)  # no indexes, no local paths
