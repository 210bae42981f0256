"""What a user gets who installs the wheel, without this checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_wheel_carries_the_search_spaces(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("segdec_tuner-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert not [name for name in names if name.startswith(("tests/", "bench/", "search_spaces/"))]
    assert "tuner/report/templates/page.html.j2" in names
    shipped = subprocess.run(
        [sys.executable, "-c", "from tuner.space_file import load, shipped; print([load(n).name for n in shipped()])"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert shipped.stdout.strip() == str(sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml")))
