"""What the summary of a test run says if the page cannot be tested."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_a_run_without_chromium_says_what_was_not_tested_and_how_to_test_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DIFFATTN_REQUIRE_WEB"}
    environment["DIFFATTN_CHROMIUM"] = str(tmp_path / "nowhere")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", TESTS / "test_browser.py"]
    done = subprocess.run(words, cwd=TESTS.parents[2], env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("NOT TESTED")]
    assert len(said) == 1, done.stdout
    assert "the page in a browser" in said[0]
    assert "apt-get install chromium" in said[0]
