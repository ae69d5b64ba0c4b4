"""What an installation gets: the files, the metadata, and what importing it does not do."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_lora

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def build(*arguments: str, into: Path) -> Path:
    """The one wheel that `python -m build` leaves."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", into, *arguments, ROOT]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the checkout."""
    return build("--wheel", into=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_of_sdist(tmp_path_factory):
    """Built from a source distribution, which lies beside it."""
    return build(into=tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def checksums(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def python(program, cwd, path=()):
    """What a program prints in a fresh interpreter that looks for modules in ``path`` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_checkout_has_the_symlink_as_a_folder():
    linked = sorted(path.name for path in (ROOT / "fused_lora" / "kernels").glob("*.py"))
    assert linked == KERNELS, "fused_lora/kernels must be a symlink to ../kernels, not a text file"
    assert "__init__.py" not in KERNELS


def test_wheel_has_the_kernels_and_no_other_package(wheel):
    names = checksums(wheel)
    assert {f"fused_lora/kernels/{name}" for name in KERNELS} <= names.keys()
    assert "fused_lora/py.typed" in names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"fused_lora", f"fused_lora-{fused_lora.__version__}.dist-info"}


def test_sdist_builds_the_same_wheel(wheel, wheel_of_sdist):
    assert checksums(wheel_of_sdist) == checksums(wheel)


def test_sdist_has_the_sources_and_no_results(wheel_of_sdist):
    (sdist,) = wheel_of_sdist.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "fused_lora/tables/NVIDIA_H200.json",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "Makefile",
        "benchmarks/__init__.py",
    }
    wanted |= {f"kernels/{name}" for name in KERNELS} | {f"tests/{Path(__file__).name}"}
    assert wanted <= names
    assert not [name for name in names if name.startswith("benchmarks/results")]


def test_metadata(metadata):
    assert metadata["Name"] == "fused-lora"
    assert metadata["Version"] == fused_lora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = [requirement.split(">=")[0] for requirement in required]
    assert sorted(names) == ["torch", "triton"]


def test_import_is_light():
    program = """
import sys, torch
before = set(sys.modules)
import fused_lora
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    imported = python(program, ROOT)
    assert "fused_lora" in imported
    optional = {"triton", "peft", "transformers", "typer", "rich", "matplotlib", "gguf"}
    assert not optional.intersection(imported)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_package_named_kernels_is_not_shadowed(tmp_path, ours_first):
    """transformers imports Hugging Face's `kernels`; our folder may be on the path too."""
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    path = [ROOT, tmp_path] if ours_first else [tmp_path, ROOT]
    program = "import kernels; print(kernels.__file__)"
    assert python(program, ROOT if ours_first else tmp_path, path) == [str(package)]
