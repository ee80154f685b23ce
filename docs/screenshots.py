"""Makes the pictures in docs/images: runs the gate on a demo model and looks at its page in chromium.

    python docs/screenshots.py

Needs `chromium` on the PATH (Debian's package) and Pillow. The page is that of a real run, without the name of the
folder that it ran in; the failing one is of the same bundle with a window that is one too narrow.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IMAGES = ROOT / "docs" / "images"
WIDE, NARROW = 1280, 390
TALLEST = 9000
LIGHT, DARK = 1, 0  # blink's preferredColorScheme
COLOURS = 96
GAPS = {WIDE: 30, NARROW: 7}  # pixels between two sections at least, and between two cards


def main() -> None:
    """Makes them all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right, wrong = pages(folder)
        pictures = {
            "parity-light": crop(look(folder, right, WIDE, LIGHT), 0.0, 0.5),
            "parity-dark": crop(look(folder, right, WIDE, DARK), 0.5, 1.0),
            "parity-narrow-light": crop(look(folder, right, NARROW, LIGHT), 0.0, 0.22),
            "parity-narrow-plots": crop(look(folder, right, NARROW, LIGHT), 0.8, 1.0, GAPS[WIDE]),
            "parity-narrow-dark": crop(look(folder, wrong, NARROW, DARK), 0.0, 0.22),
        }
    IMAGES.mkdir(exist_ok=True)
    for title, picture in pictures.items():
        file = IMAGES / f"{title}.png"
        picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
        print(f"{file.relative_to(ROOT)}: {picture.width} × {picture.height}, {file.stat().st_size / 1e3:.0f} KB")


def pages(folder: Path) -> tuple[Path, Path]:
    """The report of a run that holds, and of one that fails."""
    from exporter.demo_data import demo_checkpoint
    from tests.support.planted import attribute, planted

    shutil.copytree(demo_checkpoint("mistral"), folder / "mistral")
    cierzo(folder, "export", "mistral", "mistral.cierzo")
    cierzo(folder, "validate", "mistral.cierzo", "mistral", "--layers", "--report", "right.html")
    planted(
        folder / "mistral.cierzo",
        folder / "wrong.cierzo",
        lambda model: setattr(attribute(model, "RollingAttention", "window", 1), "i", 31),
    )
    cierzo(folder, "validate", "wrong.cierzo", "mistral", "--report", "wrong.html")
    made = folder / "right.html", folder / "wrong.html"
    for page in made:
        page.write_text(page.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")
    return made


def cierzo(folder: Path, *arguments: str) -> None:
    """Runs the command there."""
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from exporter.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=folder, check=False, capture_output=True)
    if done.returncode > 1:
        sys.exit(done.stderr.decode())


def look(folder: Path, page: Path, width: int, scheme: int) -> Image.Image:
    """The whole page, as it is `width` pixels wide."""
    shot = folder / "shot.png"
    subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
         f"--window-size={width},{TALLEST}", f"--screenshot={shot}", page.as_uri()],
        check=True, capture_output=True,
    )  # fmt: skip
    picture = Image.open(shot).convert("RGB")
    return picture.crop((0, 0, width, blank_from(picture, picture.height)))


def crop(picture: Image.Image, first: float, last: float, gap: int | None = None) -> Image.Image:
    """A part of its height, from one space of `gap` rows to another."""
    ends = [share * picture.height for share in (first, last)]
    top, end = (blank_from(picture, int(at), gap) if 0 < at < picture.height else int(at) for at in ends)
    return picture.crop((0, top, picture.width, end))


def blank_from(picture: Image.Image, end: int, gap: int | None = None) -> int:
    """The last row before `end` in the middle of a space between two parts, or a little below the last one."""
    paper, blank = row_of(picture, picture.height - 1), 0
    below, gap = True, gap or GAPS[picture.width]
    for row in range(end - 1, 0, -1):
        if row_of(picture, row) == paper:
            blank += 1
            below = below and row + blank == picture.height
            if blank >= gap and not below:
                return row + gap // 2
        elif below and blank:
            return row + gap // 2
        else:
            blank = 0
    return end


def row_of(picture: Image.Image, row: int) -> bytes:
    """The colours of one row of pixels."""
    return picture.crop((0, row, picture.width, row + 1)).tobytes()


if __name__ == "__main__":
    main()
