"""How kernels in C++ come to be: compiled once, kept for the user, or replaced with a reason."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dstrain.ops.cpu import native
from dstrain.ops.kernel import Kernel, Op

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One small source instead of the real ones, and a cache of its own."""
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    caches = (native.problem, native.library, native._load)
    for each in caches:
        each.cache_clear()
    yield folder
    for each in caches:
        each.cache_clear()


def again() -> str | None:
    """What a new process would find."""
    for each in (native.problem, native.library, native._load):
        each.cache_clear()
    return native.problem()


def test_a_second_process_takes_what_the_first_has_compiled(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.problem() is None
    assert native.library().answer() == 42
    (kept,) = (tmp_path / "cache" / "dstrain" / "native").iterdir()
    assert kept.suffix == ".so"
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
        assert again() is None
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert again() is None
    assert native.library().answer() == 43


def test_a_cache_that_cannot_be_written_costs_a_compilation_only(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.problem() is None
    assert native.library().answer() == 42
    assert (tmp_path / "file").read_text() == ""


def test_what_does_not_load_is_compiled_again(sources: Path, tmp_path: Path) -> None:
    assert native.problem() is None
    (kept,) = (tmp_path / "cache" / "dstrain" / "native").iterdir()
    kept.unlink()
    kept.write_bytes(b"half a file")
    assert again() is None
    assert native.library().answer() == 42


def test_a_user_without_a_home_has_them_too(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert native.problem() is None
    assert native.library().answer() == 42


def test_without_a_compiler_the_table_says_so_and_takes_the_next(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    op: Op = Op("toy", [Kernel("native", torch.sin, "cpu", native=True), Kernel("composed", torch.cos)])
    assert op.choose(torch.device("cpu"), torch.float32) is torch.cos
    assert str(op.states("cpu", torch.float32)["native"]) == "no C++ compiler: neither CXX nor g++ on the PATH"


def test_what_a_compiler_refuses_is_the_reason(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "answer.cpp").write_text("int answer() { return missing; }\n")
    problem = again()
    assert problem is not None
    assert "cannot compile it: " in problem
    assert "missing" in problem
    monkeypatch.setenv("CXX", "false")
    assert "false cannot compile it: Command" in str(again())


def test_a_variable_names_another_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.problem() == "no C++ compiler: neither CXX nor g++ on the PATH"


def test_the_variable_may_have_arguments_or_be_empty(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "ANSWER"))
    monkeypatch.setenv("CXX", "g++ -DANSWER=44")
    assert again() is None
    assert native.library().answer() == 44
    monkeypatch.setenv("CXX", "")
    assert "ANSWER" in str(again())


def test_only_linux_has_them(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert native.problem() == "for Linux only"
