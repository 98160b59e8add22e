"A plain `pip install grocery-nb`, without extras, in an environment of its own: small, and honest about what it lacks."
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    "The folder with the commands of an environment that holds the package and its base requirements"
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"
    shutil.copytree(ROOT / "grocery_nb", source / "grocery_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists(): pytest.skip("uv is not in this environment: pip install uv to enable this test")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "env"], check=True)
    bin = folder / "env" / "bin"
    done = subprocess.run([uv, "pip", "install", "--python", bin / "python", source], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr.lower() for word in ("connect", "dns", "network", "failed to fetch")):
        pytest.skip("no package index can be reached: connect to a network to enable this test")
    assert done.returncode == 0, done.stderr
    return bin


def run(bin, *arguments, cwd):
    return subprocess.run([bin / "grocery", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_base_carries_no_torch(base, tmp_path):
    listed = subprocess.run([base / "python", "-c", "import importlib.metadata as m; print(*(d.name.lower() for d in m.distributions()))"],
                            capture_output=True, text=True, cwd=tmp_path).stdout.split()
    assert "grocery-nb" in listed and not {"torch", "torchvision", "matplotlib", "fastapi", "nbdev", "fastcore"} & set(listed)


def test_every_room_and_asset_is_installed(base):
    def files(package): return {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    where = subprocess.run([base / "python", "-c", "import grocery_nb; print(grocery_nb.__path__[0])"], capture_output=True, text=True, cwd=base).stdout.strip()
    assert files(Path(where)) == files(ROOT / "grocery_nb")


def test_base_draws_and_checks_data(base, tmp_path):
    done = run(base, "data", "mini", "--output", "mini", "--train", 1, "--val", 1, "--test", 1, "--size", 32, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(base, "data", "validate", "mini", cwd=tmp_path).returncode == 0
    done = run(base, "train", "--data", "mini", cwd=tmp_path)
    assert done.returncode == 2 and "pip install 'grocery-nb[train]'" in done.stderr and len(done.stderr.splitlines()) == 1
