"""Reports in a real browser: at the width of a desk and of a phone, light and dark."""

import functools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tuner import report

PROBE = """<!DOCTYPE html>
<iframe id="page" src="index.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe>
<pre id="found"></pre>
<script>
page.onload = () => {
  const inside = page.contentDocument, root = inside.documentElement;
  const scrolls = (one) => one && (getComputedStyle(one).overflowX == "auto" || scrolls(one.parentElement));
  const beyond = [...inside.body.querySelectorAll("*")].filter(
    (one) => one.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(one.parentElement));
  const images = [...inside.images];
  found.textContent = JSON.stringify({
    width: root.clientWidth, wide: root.scrollWidth,
    beyond: beyond.map((one) => one.outerHTML.slice(0, 120)),
    images: images.length, broken: images.filter((one) => !one.naturalWidth).length,
    narrow: images.filter((one) => one.getBoundingClientRect().width < 150).length,
    lost: [...inside.links].filter((one) => !inside.getElementById(one.hash.slice(1))).map((one) => one.href),
    background: getComputedStyle(inside.body).backgroundColor, ink: getComputedStyle(inside.body).color,
  });
};
</script>
"""

BROWSER = [
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=8000", "--dump-dom"),
]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "served"
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def probe(served: tuple[Path, str], tmp_path: Path, width: int, scheme: str) -> dict[str, Any]:
    """What the browser finds on the served page."""
    folder, address = served
    name = f"probe-{width}-{scheme}.html"  # a name of its own, for a browser keeps what it has seen
    (folder / name).write_text(PROBE.replace("WIDTH", str(width)))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    page = subprocess.run(
        [*BROWSER, *dark, f"--user-data-dir={tmp_path}/browser", f"{address}/{name}"],
        capture_output=True, text=True, check=True, timeout=100,
    ).stdout  # fmt: skip
    return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', page, re.DOTALL)[1]))


def pages_of(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page[^s]", pdf))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_paper_is_no_phone(usual, tmp_path: Path) -> None:
    """Charts that stand side by side on a screen do so on paper: the phone's rules would make it half as long again."""
    subprocess.run(
        [*BROWSER[:-2], f"--user-data-dir={tmp_path}/browser", f"--print-to-pdf={tmp_path}/report.pdf",
         f"file://{usual.report}/index.html"],
        capture_output=True, check=True, timeout=100,
    )  # fmt: skip
    assert 5 < pages_of((tmp_path / "report.pdf").read_bytes()) < 40


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("kind", ["usual", "bare", "unevaluated"])
def test_nothing_overflows_and_nothing_is_broken(usual, bare, kind: str, served, tmp_path: Path) -> None:
    written = {"usual": usual, "bare": bare, "unevaluated": usual}[kind]
    shutil.copytree(written.report, served[0])
    if kind == "unevaluated":
        for name in ("run.json", "records.jsonl"):
            shutil.copy(usual.directory / name, tmp_path)
        shutil.rmtree(served[0])
        report.write(tmp_path, served[0])
    grounds = {}
    for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light")):
        found = probe(served, tmp_path, width, scheme)
        assert found["beyond"] == []
        assert found["wide"] <= found["width"] <= width
        assert (found["broken"], found["narrow"], found["lost"]) == (0, 0, [])
        assert found["images"] > 3
        grounds[scheme] = (found["background"], found["ink"])
    assert grounds["light"] != grounds["dark"]
