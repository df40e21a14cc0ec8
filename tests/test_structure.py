"""The shape of the code base: imports point one way, files and functions stay small, what is mapped is shipped."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("kernels", "profilers", "search_space", "targets")
# Lower layers know nothing of higher ones; within a layer modules may use each other, cycles apart.
LAYERS = (
    ("errors",),
    ("store",),
    ("targets",),
    ("search_space",),
    ("kernels",),
    ("profilers",),
    ("search",),
    ("config", "plan", "documents", "checkpoint", "progress", "certify", "place", "passes"),
    ("routing", "experts", "grouping", "skeleton", "folding", "model", "blocks", "streaming", "run"),
    ("compress",),
    ("samples",),
    ("session",),
    ("shapes", "attention_cost", "kv_cache"),
    ("reference_model", "streamed_reference", "teacher", "score", "streamed_score"),
    ("attention", "cache_room", "common_layer", "prompt", "decoder", "decoder_step", "runtime", "switchable"),
    ("verify", "latency_model", "models"),
    ("cache_choice",),
    ("memory_budget",),
    ("tables", "finalists", "decide", "recompress", "smooth", "result", "planning", "finished"),
    ("recover",),
    ("export", "report"),
    (
        "tune",
        "choosing",
        "cleaning",
        "doctor",
        "dry_run",
        "table_commands",
        "advise",
        "advise_command",
        "recover_command",
    ),
    ("service",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# What may run on a bare machine with an accelerator: no pydantic, no transformers, no optuna there.
BARE = {"errors", "store", "targets", "search_space", "kernels", "profilers"}
BARE_PACKAGES = {"torch", "triton", "numpy", "pandas", "yaml", "cuda"}


def modules() -> dict[str, Path]:
    """Dotted name below `autotune` -> file, mapped folders included."""
    files = [path for path in (ROOT / "autotune").rglob("*.py") if not path.is_symlink()]
    found = {path.relative_to(ROOT / "autotune"): path for path in files}
    for folder in MAPPED:
        found |= {path.relative_to(ROOT): path for path in (ROOT / folder).rglob("*.py")}
    named = {".".join(path.with_suffix("").parts): file for path, file in found.items()}
    return {name: file for name, file in named.items() if "__pycache__" not in name}


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """The part right below `autotune` of what a file imports of ours."""
    own = {name.split(".")[1] for name in imports(path) if name.startswith("autotune.")}
    return {name for name in own if name in RANK or (ROOT / "autotune" / f"{name}.py").exists()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    part = name.split(".")[0]
    if part in ("__init__", "data"):
        return
    assert part in RANK, f"{name} has no place in LAYERS"
    for used in own_imports(MODULES[name]):
        assert RANK[used] <= RANK[part], f"{name} imports {used}, which is above it"


def test_nobody_imports_the_command_line():
    users = {name for name in MODULES if "cli" in own_imports(MODULES[name])}
    assert users == set()


def test_search_needs_only_tables():
    allowed = {"errors", "search_space", "search"}
    outside = {"numpy", "scipy", "optuna"}
    for name in (name for name in MODULES if name.startswith("search.")):
        assert own_imports(MODULES[name]) <= allowed, name
        foreign = {item.split(".")[0] for item in imports(MODULES[name])} - {"autotune"}
        assert foreign - set(sys.stdlib_module_names) <= outside, name


def test_the_lower_half_runs_on_a_bare_machine():
    for name in (name for name in MODULES if name.split(".")[0] in BARE):
        foreign = {item.split(".")[0] for item in imports(MODULES[name])} - {"autotune"}
        assert foreign - set(sys.stdlib_module_names) <= BARE_PACKAGES, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_small(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{name}.{node.name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is_for(name):
    text = MODULES[name].read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_swallowed(name):
    """`except Exception: pass` and bare `except:` hide what went wrong."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno}"
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            assert not (broad and all(isinstance(item, ast.Pass) for item in node.body)), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_code_and_no_pickle_is_ever_loaded(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.load"), name
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{name}:{node.lineno}"
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & imports(MODULES[name])


def run(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


HEAVY = ("torch", "transformers", "optuna", "numpy", "pandas", "scipy", "pydantic")


def test_importing_the_package_loads_nothing_heavy():
    code = f"import autotune, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_the_command_line_answers_without_torch():
    code = (
        "import autotune.cli, sys; print([name for name in ('torch', 'transformers', 'optuna') if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_search_spaces_need_no_torch():
    code = "import autotune.search_space.space, autotune.kernels.spec, sys; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_what_the_package_offers():
    import autotune

    assert set(autotune.__all__) == {"Plan", "__version__", "apply", "load"}
    assert all(getattr(autotune, name) for name in autotune.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        autotune.nothing  # noqa: B018


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_committed_links(folder):
    link = ROOT / "autotune" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert not list((ROOT / folder).glob("__init__.py"))


def test_every_folder_of_code_is_packaged():
    import tomllib

    stated = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(["autotune", *name.split(".")[:-1]]) for name in MODULES}
    assert folders <= stated


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_else(tmp_path):
    skipped = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__", "tests")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    process = subprocess.run(command, capture_output=True, text=True)
    if "BackendUnavailable" in process.stderr or "Cannot import 'setuptools" in process.stderr:
        pytest.skip("setuptools is not installed here")
    assert process.returncode == 0, process.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == {
        "autotune/" + name.replace(".", "/") + ".py" for name in MODULES
    }
    assert all(name.startswith("autotune/") for name in names)
    for data in ("py.typed", "plan.schema.json", "targets/x86-generic.yaml", "data/stdlib_documents.jsonl.gz"):
        assert f"autotune/{data}" in names
