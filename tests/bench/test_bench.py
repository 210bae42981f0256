"""`python -m bench`: what it writes, whatever happens to the comparisons."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EARLIER = "# Results\n\nA preamble.\n\n## 2020-01-01, before\n\n| a | b |\n"


def bench(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    file = tmp_path / "RESULTS.md"
    file.write_text(EARLIER)
    return file


def test_the_list_says_what_each_comparison_needs_and_what_is_lacking_here():
    printed, said = bench("--list").communicate()
    assert not said
    assert "training_step  Training as `tuner search` does it" in printed
    assert "about 3 min; needs run data onnx onnxruntime onnxscript; it needs the folder of a finished run" in printed


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_results_are_added_above_earlier_ones_and_a_failure_does_not_stop_the_others(tmp_path, results):
    no_images = tmp_path / "empty"
    no_images.mkdir()
    process = bench("decoding", "coverage", "parity", "--quick", "--data", no_images, "--out", results)
    printed, said = process.communicate()
    assert process.returncode == 1, said
    text = results.read_text()
    assert text.startswith("# Results\n\nA preamble.\n\n## 2")
    assert text.endswith(EARLIER.partition("preamble.\n\n")[2])
    assert "`python -m bench decoding coverage parity --quick`" in text
    for fact in ("cores", "Python 3", "torch 2", "numpy "):
        assert fact in text.splitlines()[6]
    assert "| --- |" in text.partition("### coverage:")[2].partition("###")[0]
    failed = text.partition("### decoding:")[2]
    assert "`python -m bench.decoding DATA" in failed
    assert "**Failed: exit code 1" in failed
    assert "Error: " in failed
    assert "- parity: it needs the folder of a finished run; name it with --run" in text
    assert "Failed: decoding." in printed


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured_and_nothing_begins_when_the_time_is_over(results):
    process = bench("limits", "coverage", "--out", results)
    assert any(line.startswith("| limit ") for line in process.stdout or ())
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    text = results.read_text()
    assert "| limit " in text
    assert "**Failed: interrupted**" in text
    assert "- all after it: the run was interrupted" in text

    process = bench("limits", "--minutes", "0", "--out", results)
    process.communicate()
    assert process.returncode == 0
    assert "- limits: the 0 minutes were over" in results.read_text()
    assert text.partition("## 2")[2] in results.read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("training_step --batches 1 4 --rounds 1 --steps 20", ["| 4 | fast |", "| fast, float32 |"]),
        ("schedule --batches 1 10 --validation 12", ["| 10 |", "all beyond the forward pass"]),
        ("loader --batches 4", ["| 4 | flips | 1 |"]),
        ("side_by_side --counts 1 2 --width-factors 0.1", ["| 2 |"]),
    ],
)
def test_what_is_made_for_gpus_runs_small_on_a_cpu(script, expected):
    small = "--device cpu --height 128 --width 128 --width-factor 0.1 --seconds 0.2 --threads 1"
    command = [sys.executable, "-m", *f"bench.{script} {small}".split()]
    printed = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    for part in expected:
        assert part in printed
