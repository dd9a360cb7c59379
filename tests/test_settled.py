"""What need not be tested again, and what must."""

import json
from pathlib import Path

import _settled
import pytest

FILE = "tests/windows/test_window_attention_triton.py"
CALLS = [f"{FILE}::test_op[{i}]" for i in range(20)] + ["tests/test_nn.py::test_it"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which that file is settled."""
    monkeypatch.setattr(_settled, "ROOT", tmp_path)
    monkeypatch.setattr(_settled, "KEPT", tmp_path / "settled.json")
    for name in (FILE, "kernels/_launch.py", "kernels/windows/blocks.py", "kernels/moe/rows.py", "tests/test_nn.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(_settled, "SHIM", {})
    _settled.digest.cache_clear()
    (tmp_path / "settled.json").write_text(json.dumps({FILE: _settled.digest(FILE)}))
    yield tmp_path
    _settled.digest.cache_clear()


def change(tree: Path, name: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("changed")
    _settled.digest.cache_clear()


def test_one_in_eight_of_an_unchanged_file_runs(tree: Path) -> None:
    runs = [nodeid for nodeid in CALLS if nodeid not in _settled.left_out(CALLS)]
    assert runs == [CALLS[0], CALLS[8], CALLS[16], "tests/test_nn.py::test_it"]


@pytest.mark.parametrize(
    "name",
    [
        "kernels/_launch.py",
        "kernels/windows/blocks.py",
        "kernels/windows/new.py",
        FILE,
        "tests/windows/test_window_attention.py",
        "tests/windows/_cases.py",
        "accel/ops/pairs.py",
        "accel/ops/windows/window_attention.py",
    ],
)
def test_a_change_of_what_it_depends_on_runs_all(name: str, tree: Path) -> None:
    change(tree, name)
    assert _settled.left_out(CALLS) == set()


@pytest.mark.parametrize("name", ["kernels/moe/rows.py", "tests/test_nn.py", "csrc/cuda/deformable/points.cuh"])
def test_a_change_elsewhere_does_not(name: str, tree: Path) -> None:
    change(tree, name)
    assert len(_settled.left_out(CALLS)) == 17


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_nor_is_another_version_trusted(package: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = _settled.version
    monkeypatch.setattr(_settled, "version", lambda name: "9.9" if name == package else known(name))
    _settled.digest.cache_clear()
    assert _settled.left_out(CALLS) == set()


def test_a_file_that_is_not_recorded_runs_whole(tree: Path) -> None:
    (tree / "settled.json").unlink()
    assert _settled.left_out(CALLS) == set()


def test_every_file_finds_its_kernels() -> None:
    """A pattern that matches nothing would settle a file for good."""
    for file in _settled.files():
        names = {path.relative_to(_settled.ROOT).as_posix() for path in _settled._sources(file)}
        floor = f"kernels/{Path(file).parent.name}/" if "_triton" in file else "csrc/cuda/"
        assert any(name.startswith(floor) for name in names), (file, floor)
        assert file in names
