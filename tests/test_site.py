"""The pages of docs/ build as a site, strictly: no link that leads nowhere, and no name of the Python API that is not there."""

import subprocess
import sys
from pathlib import Path

from processes import ROOT


def test_the_site_builds_strictly_and_its_diagrams_are_drawn_by_what_lies_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "architecture" / "index.html").read_text()
    assert page.count('<pre class="mermaid">') == page.count("flowchart TD") == 2  # from left to right they are too wide to be read
    assert 'src="../javascripts/mermaid.min.js"' in page
    assert "adrank_client.Adrank.rank" in (tmp_path / "site" / "api" / "index.html").read_text()
