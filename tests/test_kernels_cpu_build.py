"""Native kernels are compiled once, by whoever comes first, and a compiler that lets us down is said to."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import native
import pytest
import tiny

from autotune.errors import DeviceError
from autotune.kernels import spec as kernels
from autotune.kernels.cpu import build
from autotune.kernels.spec import KERNELS, kernel_hash
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import SCHEMES
from autotune.targets import detect

COMPILER = detect.compiler()
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
FLAGS = ("-O0", "-fPIC", "-fopenmp")


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A library of two lines in place of the kernels, and a home without any."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    (folder / "answer.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    monkeypatch.setattr(build, "FOLDER", folder)
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    return folder


def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Make a shell script the compiler; a fresh one each time, because its version is asked once. `$REAL` compiles."""
    path = tmp_path / f"compiler{len(list(tmp_path.glob('compiler*')))}"
    path.write_text(f"#!/bin/sh\nREAL={COMPILER}\ncase $1 in --version) echo one; exit;; esac\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def _load(flags: tuple[str, ...] = FLAGS):
    """`build.library` without its memory, with our flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.build, "__defaults__", (flags,))
        return build.library.__wrapped__("answer")


def _left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home" / "kernels").glob("**/*"))


def test_the_second_call_does_not_compile(sources, tmp_path, monkeypatch):
    _script(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/log; exec $REAL "$@"')
    path = build.build("answer", FLAGS)
    runs = (tmp_path / "log").read_text()
    assert runs.count("\n") == 2, "one to compile, one to link"
    assert build.build("answer", FLAGS) == path
    assert _load().answer() == 42
    assert (tmp_path / "log").read_text() == runs
    assert _left(tmp_path) == [path.name]


@pytest.mark.parametrize("changed", ["answer.cpp", "answer.h", "flags", "compiler", "options", "cpu"])
def test_whatever_it_is_made_of_gives_it_another_name(sources, tmp_path, monkeypatch, changed):
    before = build.build("answer", FLAGS)
    flags = (*FLAGS, "-g") if changed == "flags" else FLAGS
    if changed == "compiler":
        _script(tmp_path, monkeypatch, 'exec $REAL "$@"')
    elif changed == "options":
        monkeypatch.setenv("CXX", f"{COMPILER} -DkUnused")
    elif changed == "cpu":
        monkeypatch.setattr(build, "_cpu_flags", lambda: "flags: another")
    elif changed != "flags":
        with open(sources / changed, "a") as file:
            file.write("// one more line\n")
    after = build.build("answer", flags)
    assert after != before
    assert _left(tmp_path) == sorted([before.name, after.name])


def test_every_header_used_counts():
    """Libraries are kept by a hash of what `sources` lists, so that nothing else may be included."""
    hashed = {spec.name: kernel_hash(spec) for spec in native.COMPILED}
    assert len(set(hashed.values())) == len(native.COMPILED)
    for spec in native.COMPILED:
        files = build.sources(spec.module.rpartition(".")[2])
        parts = [path for path in files if path.name.endswith(".cpp")]
        assert files[: len(parts)] == parts
        assert {path.suffix for path in files[len(parts) :]} == {".h"}
        assert all(path.is_file() for path in files)
        used = {line.split('"')[1] for path in files for line in path.read_text().splitlines() if '#include "' in line}
        assert used <= {path.name for path in files}


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The folder of a copy of `autotune.kernels`, which is what `kernel_hash` reads."""
    shutil.copytree(build.FOLDER.parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))

    def source(module: str) -> Path:
        return tmp_path.joinpath(*module.split(".")[1:]).with_suffix(".py")

    monkeypatch.setattr(kernels, "_source", source)
    return tmp_path / "kernels"


@pytest.mark.parametrize(
    "changed", ["integer.cpp", "integer.sparse.cpp", "simd.h", "build.py", "memory.py", "../packing.py", "integer.py"]
)
def test_times_are_forgotten_when_a_source_changes(copied, changed):
    """AMX kernels leave few rows to the others, so they hang on their sources too."""
    compiled = [spec for spec in native.COMPILED if native.family(spec) == "integer"]
    before = [kernel_hash(spec) for spec in compiled]
    assert before == [kernel_hash(spec) for spec in compiled]
    with open(copied / "cpu" / changed, "a") as file:
        file.write("\n")
    assert not set(before) & {kernel_hash(spec) for spec in compiled}


@pytest.mark.parametrize("changed", ["flags", "compiler", "options", "none"])
def test_times_are_forgotten_with_another_compiler(copied, tmp_path, monkeypatch, changed):
    compiled, other = native.SPECS[0], kernels.kernel("torch.cpu.bf16")
    before = kernel_hash(compiled), kernel_hash(other)
    if changed == "flags":
        monkeypatch.setattr(build.made_by, "__defaults__", (FLAGS,))
    elif changed == "compiler":
        _script(tmp_path, monkeypatch, "")
    else:
        monkeypatch.setenv("CXX", f"{COMPILER} -DkUnused" if changed == "options" else "no-such-compiler")
    after = kernel_hash(compiled), kernel_hash(other)
    assert after[0] != before[0]
    assert after[1] == before[1]


def _build_into(queue: multiprocessing.Queue) -> None:
    try:
        queue.put(str(build.build("answer", FLAGS)))
    except BaseException as error:
        queue.put(repr(error))


def test_two_processes_may_build_at_once(sources, tmp_path, monkeypatch):
    """Neither compiler goes on before both have started."""
    enough = f"[ $(ls {tmp_path}/began* | wc -l) -ge 2 ]"
    meet = f"touch {tmp_path}/began$$; for i in $(seq 200); do {enough} && break; sleep 0.05; done"
    _script(tmp_path, monkeypatch, f'{meet}; exec $REAL "$@"')
    build._version(os.environ["CXX"])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_build_into, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert results[0] == results[1]
    assert _left(tmp_path) == [Path(results[0]).name]
    assert len(list(tmp_path.glob("began*"))) == 4, "each compiled and linked on its own"
    assert _load().answer() == 42


def test_a_compiler_that_fails(sources, tmp_path, monkeypatch):
    _script(
        tmp_path, monkeypatch, "echo 'In file included from a.h' >&2; echo 'a.h:3: error: no such thing' >&2; exit 1"
    )
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*a\.h:3: error: no such thing.*CXX"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []


def test_an_error_in_the_sources(sources, tmp_path):
    (sources / "answer.h").write_text('#error "needs another CPU"\n')
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*needs another CPU"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []


def test_a_linker_that_fails(sources, tmp_path, monkeypatch):
    """The first of the two runs succeeds; its object must not stay behind, nor words that are no text."""
    _script(
        tmp_path,
        monkeypatch,
        """case "$*" in *-shared*) printf 'ld: error: \\377 no room\\n' >&2; exit 1;; esac; exec $REAL "$@" """,
    )
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*no room"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []


@pytest.mark.parametrize("hidden", ["named", "quoted", "path"])
def test_no_compiler(sources, tmp_path, monkeypatch, hidden):
    if hidden != "path":
        monkeypatch.setenv("CXX", "no-such-compiler" if hidden == "named" else "'c++")
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*no C\+\+ compiler.*Install one.*set CXX"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []
    assert "cxx" not in detect.detect_cpu().features


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_name_counts_as_none(monkeypatch, blank):
    monkeypatch.setenv("CXX", blank)
    found = detect.compiler()
    monkeypatch.delenv("CXX")
    assert found is not None
    assert found == detect.compiler()


def test_a_compiler_that_is_no_program(sources, tmp_path, monkeypatch):
    path = _script(tmp_path, monkeypatch, "")
    path.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*compiler0"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []


def test_a_compiler_that_hangs(sources, tmp_path, monkeypatch):
    _script(tmp_path, monkeypatch, "exec sleep 600")
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 0.2)
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*timed out.*CXX"):
        build.build("answer", FLAGS)
    assert _left(tmp_path) == []


def test_a_home_that_cannot_be_written(sources, tmp_path):
    (tmp_path / "home").write_text("a file, where a folder should be")
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*AUTOTUNE_HOME"):
        build.build("answer", FLAGS)


def test_a_compiler_with_options(sources, monkeypatch):
    monkeypatch.setenv("CXX", f"{COMPILER} -DkAnswer=kOther")
    assert _load().answer() == 42


def test_a_library_cut_short_is_refused(sources):
    """Mapped, most of these would end the process: the check comes first."""
    path = build.build("answer", FLAGS)
    whole = path.read_bytes()
    for size in (0, 10, 63, 64, 1000, 4096, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DeviceError, match=rf"kernel\.compiler.*{path.name} does not load.*Delete it"):
            _load()
    path.unlink()
    assert _load().answer() == 42


def test_without_a_compiler_the_search_falls_back(models):
    """Schemes that only the compiled kernels offer become illegal, and say why; all others keep a kernel."""
    here = tiny.here()
    target = dataclasses.replace(here, features=tuple(name for name in here.features if name != "cxx"))
    compiled = {spec.name for spec in native.COMPILED}
    group = LayerGroup("layers.0.qkv", "qkv", 0, (Linear("q.weight", "q", 256, 512, False),))
    lost = set()
    for item in SCHEMES:
        before, after = (legality(item, group, "bf16", where, KERNELS, True) for where in (here, target))
        assert not compiled & set(after.kernels)
        if set(before.kernels) - compiled:
            assert after.usable
            assert after.kernels == tuple(name for name in before.kernels if name not in compiled)
        elif before.usable:
            lost.add(item.name)
            assert after.status == "illegal"
            assert "here lacks cxx" in after.reason
    assert {"2:4+w8a8-int8", "w4a8-int4-g128"} <= lost
    assert not {"bf16", "w8a8-int8", "w4a16-int4-g128"} & lost


ONE_RUNTIME = """
import os, sys
from pathlib import Path
import torch
from autotune.kernels import reference
from autotune.kernels.spec import kernel, load

def threads():
    return len(os.listdir("/proc/self/task"))

def use_torch():
    return torch.randn(512, 512) @ torch.randn(512, 512) + torch.randn(512, 512).exp().sum()

torch.set_num_threads(2)
for _ in range(3):
    use_torch()
before = threads()
for name, scheme in CALLS:
    weight = reference.random_weight(scheme, 256, 256, torch.bfloat16, True, torch.Generator().manual_seed(0))
    packed = load(kernel(name)).pack(weight, torch.bfloat16)
    for rows in (1, 40):
        load(kernel(name)).run(packed, torch.randn(rows, 256).bfloat16())
        use_torch()
assert threads() == before, (threads(), before)
lines = Path("/proc/self/maps").read_text().splitlines()
files = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
runtimes = {file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))}
print(len(runtimes), sum(Path(file).parent.name == "kernels" for file in files))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
def test_one_openmp_runtime_and_one_pool_of_threads():
    """A second one would keep threads of its own, which spin where torch's should run."""
    calls = [("cpu.w8a8", "w8a8-int8")] if native.runs_here("integer") else []
    calls += [("cpu.24.bf16", "2:4")] if native.runs_here("bf16") else []
    if not calls:
        pytest.skip("no compiled kernel runs on this CPU")
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    code = ONE_RUNTIME.replace("CALLS", repr(calls))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runtimes, libraries = map(int, done.stdout.split())
    assert (runtimes, libraries) == (1, len(calls))


def test_flags_of_an_instruction_set_without_a_path_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    if "avx2" not in native.FEATURES:
        pytest.skip("an x86 matter")
    with pytest.raises(DeviceError, match="needs AVX-512 VNNI, AVX2 with FMA"):
        build.build("integer", (*native.FAST, "-msse4.2"))
    assert _left(tmp_path) == []


def test_libraries_are_prepared_side_by_side_and_what_fails_is_left(monkeypatch):
    meeting = threading.Barrier(2, timeout=60)
    asked = []

    def made(name):
        asked.append(name)
        if name in ("between", "sweep"):
            meeting.wait()  # never met by one after the other
            raise DeviceError("kernel.compiler", "it fails.")

    monkeypatch.setattr(build, "build", made)
    build.prepare()
    assert sorted(asked) == sorted(build.libraries())
    assert {"integer", "decoder", "between", "sweep"} <= set(asked)
