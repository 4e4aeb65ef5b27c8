"""A folder in which one file in ten is broken trains to the end, within the memory of a clean run."""

import json
import subprocess
import sys

import pytest

# Runs the recipe and prints the largest resident size of its process, in KiB.
_MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    raise
"""


def _run(repository, folder, out):
    options = ["--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "32", "--epochs", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "recipes/image_classification.py", "--data", folder, "--out", out, *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024, json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_a_folder_with_broken_files_trains_to_the_end(repository, make_folder, odd_files, tmp_path):
    clean = make_folder({"cat": 45, "dog": 45}, "clean")
    broken = make_folder({"cat": 45, "dog": 45}, "broken")
    contents = {**odd_files, "another_bomb.png": odd_files["bomb.png"]}
    for name, data in contents.items():
        (broken / "cat" / name).write_bytes(data)
    clean_peak, _ = _run(repository, clean, tmp_path / "clean-run")
    peak, report = _run(repository, broken, tmp_path / "broken-run")
    assert peak - clean_peak < 2 * 2**30
    found = {item["file"]: item["reason"] for item in report["data"]["quarantined"]}
    broken_names = {"truncated.jpg", "page.jpg", "empty.jpg", "bomb.png", "another_bomb.png"}
    assert set(found) == {f"cat/{name}" for name in broken_names}
    assert all(found.values())
    used = sum(report["data"][split] for split in ("train", "validation", "test"))
    assert used + len(found) == report["data"]["found"] == 100
    assert "megapixels" in (tmp_path / "broken-run" / "report.html").read_text()
