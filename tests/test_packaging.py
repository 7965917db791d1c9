"""What is built of this repository, and that it works where its core dependencies are, and nothing else."""

import email
import functools
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import distributed_metrics
from distributed_metrics import accumulators, testing, writers

ROOT = Path(__file__).parents[1]
USER = ROOT / "tests" / "programs" / "public_names.py"
CORE = {"jax", "jaxlib", "flax", "numpy", "clu"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **options):
    """What a command printed, which must end well."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    [archive] = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built of the unpacked sdist, and not of this tree."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=next(source.iterdir()))
    [built] = folder.iterdir()
    return built


def test_the_sdist_holds_the_repository_and_nothing_that_lies_about_in_it(sdist):
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(name) for name in archive.getnames()]
    documents = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"}
    folders = {"benchmarks", "docs", "examples", "src", "tests"}
    added_by_hatchling = {".gitignore", "PKG-INFO"}
    assert {name.parts[1] for name in names} == documents | folders | {
        "Makefile",
        "pyproject.toml",
    } | added_by_hatchling
    assert [name for name in names if "__pycache__" in name.parts] == []


def test_the_wheel_holds_the_library_its_types_and_licence_and_nothing_else(wheel):
    source = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file()}
    library = {str(path) for path in source if not re.search(r"__pycache__|\.egg-info", str(path))}
    assert {"distributed_metrics/py.typed", "distributed_metrics/writers/__init__.py"} <= library
    about = f"distributed_metrics-{distributed_metrics.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert set(archive.namelist()) == library | {
            f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
        }


def test_the_core_needs_jax_flax_numpy_and_clu_only_and_each_extra_says_what_it_is_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = list(map(Requirement, metadata.get_all("Requires-Dist")))
    assert {one.name for one in required if one.marker is None} == CORE
    extras = {
        extra: {canonicalize_name(one.name) for one in required if one.marker and one.marker.evaluate({"extra": extra})}
        - CORE
        for extra in metadata.get_all("Provides-Extra")
    }
    assert set(extras) == {"all", "bench", "demo", "docs", "test", "writers"}
    assert extras["writers"] == {"matplotlib", "prometheus-client", "rich", "tensorboardx"}
    assert extras["all"] == extras["writers"] | {"google-metrax", "tensorboard"}
    assert "hatchling" in extras["test"], "it builds what is tested here"
    assert not any("tensorflow" in names for names in extras.values())


def test_no_version_is_asked_for_that_is_older_than_those_tested():
    pattern = r"^- Tested on CPU devices with jax (\S+) and (\S+) \(flax (\S+) and (\S+)\)"
    [tested] = re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE)
    required = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    for name, versions in {"jax": tested[:2], "flax": tested[2:]}.items():
        oldest, newest = map(Version, versions)
        assert oldest in required[name]
        assert newest in required[name]
        assert Version(f"{oldest.major}.{oldest.minor - 1}.99") not in required[name]


def needed(names):
    """The installed distributions that these need, themselves included, by name."""
    found, open_ = {}, [Requirement(name) for name in names]
    asked = set()
    while open_:
        one = open_.pop()
        if str(one) not in asked:
            asked.add(str(one))
            found[canonicalize_name(one.name)] = distribution = importlib.metadata.distribution(one.name)
            extras = [{"extra": extra} for extra in ("", *one.extras)]
            for inner in map(Requirement, distribution.requires or ()):
                if inner.marker is None or any(map(inner.marker.evaluate, extras)):
                    open_.append(inner)
    return found


def link(distribution, site):
    """Show the files of an installed distribution in another environment: packages whole, what else there is singly."""
    for file in distribution.files:
        if ".." in file.parts:  # a script
            continue
        for inner in (*reversed(file.parents[:-1]), file):
            path = distribution.locate_file(inner)
            if inner == file or inner.suffix == ".dist-info" or is_package(path):
                if not (target := site / inner).is_symlink():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(path)
                break


@functools.cache
def is_package(path):
    return (path / "__init__.py").exists()


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of a new environment: the wheel is installed in it, and what the core needs is linked into it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    core = needed(CORE)
    for distribution in core.values():
        link(distribution, site)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--isolated", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", wheel)  # without an index it must do with what is there
    installed = {canonicalize_name(one.metadata["Name"]) for one in importlib.metadata.distributions(path=[str(site)])}
    assert installed == {*core, "distributed-metrics"}
    return python, core


@pytest.mark.slow
def test_every_public_name_works_from_the_wheel_where_only_the_core_dependencies_are(environment, tmp_path):
    python, core = environment
    (tmp_path / "empty").mkdir()
    done = run(python, "-I", "-W", "error", USER, tmp_path, cwd=tmp_path / "empty")
    lines = done.stdout.splitlines()
    missing = {
        "tensorboardx": "TensorBoardWriter needs tensorboardX",
        "prometheus-client": "PrometheusWriter needs prometheus_client",
        "rich": "ConsoleWriter needs rich",
        "matplotlib": "MemoryWriter.plot() needs matplotlib",
    }
    said = {line for line in lines if " needs " in line}
    install = "pip install 'distributed-metrics[writers]'"
    assert said == {f"{says}: {install}" for name, says in missing.items() if name not in core}
    assert len(said) >= 2, "not all writers work by what the core brings"
    assert Path(lines[-1]).is_relative_to(python.parents[1])
    assert done.stderr == ""


def test_the_program_of_a_user_leaves_no_public_name_out():
    text = USER.read_text()
    public = {
        *distributed_metrics.__all__, *accumulators.__all__, *writers.__all__,
        *(name for name in vars(testing) if name.startswith("check_")),
    }  # fmt: skip
    used = text.partition("\n@dataclass")[2]
    assert [name for name in sorted(public) if not re.search(rf"\b{name}\b", used)] == []
    assert "type: ignore" not in text
