"""Wheels that are carried in parts: what arrives is what was packed, in any order, and what is missing is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.gpu import join_wheels, wheels
from tests.gpu.join_wheels import DAMAGED, INSTALLED, MANIFEST, MISSING


def make_wheel(folder: Path, name: str, version: str, payload: str) -> Path:
    """A wheel of one module, as small as pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VALUE = {payload!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two wheels in parts of 700 bytes; one of the parts holds the end of a wheel and the start of the next."""
    source = tmp_path / "source"
    for name, payload in (("carried_one", "one" * 300), ("carried_two", "two")):
        make_wheel(source, name, "1.2", payload)
    wheels.write_parts(sorted(source.glob("*.whl")), _made(tmp_path / "out"), 700)
    return tmp_path / "out"


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def test_packing_fetches_one_wheel_for_each_name_and_does_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for version in ("1.2", "1.3"):
        make_wheel(source, "carried_one", version, version)
    assert wheels.main(["pack", str(out), "carried-one==1.2", "--find-links", str(source), "--part-mb", "0.0004"]) == 0
    manifest = join_wheels.read_manifest([out])
    assert [wheel["file"] for wheel in manifest["wheels"]] == ["carried_one-1.2-py3-none-any.whl"]
    assert all(part["bytes"] <= 400 for part in manifest["parts"])
    assert len(manifest["parts"]) > 1
    assert (out / "join.py").read_text() == Path(join_wheels.__file__).read_text()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was fetched already"))
    again = wheels.pack(out, ["carried_one==1.2"], part_bytes=10_000)
    assert [path.name for path in parts_of(out)] == ["part-000"], "parts of the packing before are gone"
    assert again["wheels"] == manifest["wheels"]


@pytest.mark.parametrize(
    ("requirement", "said"), [("carried_one", "names no version"), ("carried_one==9", "pip did not fetch")]
)
def test_what_cannot_be_packed(requirement: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path / "source", "carried_one", "1.2", "")
    found = ["--find-links", str(tmp_path / "source")]
    assert wheels.main(["pack", str(tmp_path / "out"), requirement, *found]) == DAMAGED
    assert said in capsys.readouterr().out


def test_parts_arrive_one_by_one_and_are_installed_with_the_last(packed: Path, tmp_path: Path) -> None:
    """By join.py alone, as on another machine; the manifest comes with the first part only."""
    parts, keep, target = parts_of(packed), tmp_path / "keep", tmp_path / "target"
    assert len(parts) > 2
    for number, part in enumerate(reversed(parts)):
        arrived = _made(tmp_path / f"call-{number}")
        for name in (part.name, "join.py", *([MANIFEST] if number == 0 else [])):
            shutil.copyfile(packed / name, arrived / name)
        command = [sys.executable, "-I", str(arrived / "join.py"), "--keep", str(keep), "--target", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shutil.rmtree(arrived)
        last = number == len(parts) - 1
        assert done.returncode == (INSTALLED if last else MISSING), done.stdout + done.stderr
        missing = [other.name for other in parts if other.name < part.name]
        assert last or f"Missing: {', '.join(missing)}." in done.stdout
    code = "import carried_one, carried_two; print(carried_one.VALUE + carried_two.VALUE)"
    environment = {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "one" * 300 + "two"


def test_a_damaged_part_is_named_and_can_be_carried_again(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_wheels, "install", lambda found, target: target.mkdir())
    second = parts_of(packed)[1]
    whole = second.read_bytes()
    second.write_bytes(b"x" + whole[1:])
    arguments = [str(packed), "--keep", str(tmp_path / "keep"), "--target", str(tmp_path / "target")]
    assert join_wheels.main(arguments) == DAMAGED
    assert f"{second} is not the part that was packed" in capsys.readouterr().out
    second.write_bytes(whole)
    assert wheels.main(["join", *arguments]) == INSTALLED
    assert wheels.main(["join", *arguments]) == INSTALLED
    assert "installed already" in capsys.readouterr().out


def test_parts_without_their_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--keep", str(tmp_path / "keep"), "--target", str(tmp_path / "target")]
    assert join_wheels.main(arguments) == DAMAGED
    assert f"{MANIFEST} is in none of" in capsys.readouterr().out


def test_what_pip_refuses_is_told(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are whole, and what was packed is no wheel."""
    for wheel in packed.parent.glob("source/*.whl"):
        wheel.write_bytes(b"no wheel")
    wheels.write_parts(sorted(packed.parent.glob("source/*.whl")), packed, 700)
    arguments = [str(packed), "--keep", str(tmp_path / "keep"), "--target", str(tmp_path / "target")]
    assert join_wheels.main(arguments) == DAMAGED
    assert "pip refused" in capsys.readouterr().out
    assert not (tmp_path / "target" / MANIFEST).exists()
