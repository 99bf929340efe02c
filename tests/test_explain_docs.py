"""What docs/explain.md shows is what its example writes."""

import xml.etree.ElementTree as ET

import pytest
import torch
from scripts import ROOT, run_script

DOCS = ROOT / "docs"


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="names of nodes are those of torch 2.13")
def test_outputs_in_the_docs_are_the_examples(tmp_path):
    printed = run_script("examples/explain.py", "--out", str(tmp_path))
    text = (DOCS / "explain.md").read_text(encoding="utf-8")
    assert f"```text\n{printed}```" in text
    assert f"```diff\n{(tmp_path / 'backward.diff').read_text(encoding='utf-8')}```" in text
    excerpt = text.split("```python\n")[2].split("```")[0]
    assert "masked_mm" in excerpt and excerpt in (tmp_path / "masked.py").read_text(encoding="utf-8")
    # where it is drawn depends on the fonts that are there
    drawn, shown = (list(ET.parse(folder / "explain.svg").getroot().itertext()) for folder in (tmp_path, DOCS))
    assert drawn == shown
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"joint.py", "forward.py", "backward.py", "explain.dot", "explain.json", "groups.html"}
