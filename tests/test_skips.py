"""CI has no silent skips."""

import os
import subprocess
import sys
from pathlib import Path

SKIPPING = """
import pytest

def test_allowed():
    pytest.skip("a set of public data is not in /nowhere")

def test_not_allowed():
    pytest.skip("redis-server is not installed")

@pytest.mark.skip(reason="later")
def test_marked():
    pass
"""


def test_a_skip_that_is_not_on_the_list_fails_in_ci(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING)
    (tmp_path / "test_whole.py").write_text('import pytest\npytest.importorskip("no_such_module", reason="make peers-test")\n')
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests), "CI_STRICT": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 2 skipped, 1 error" in done.stdout, done.stdout
