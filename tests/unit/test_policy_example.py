"""The policy that CONTRIBUTING.md shows: one file and one entry, and everything knows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import alisa

PACKAGE = Path(alisa.__file__).parent
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"

SCRIPT = """
import sys
# An editable installation would find the package elsewhere.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "_editable_skbc_alisa"]
import json
from alisa import LLM, SamplingParams, __file__ as found
from alisa.cli.main import main
from alisa.planner.footprint import policy_bytes
from alisa.planner.shapes import SHAPES
from alisa.policy.registry import make_policy, reads_of

policy = make_policy("sinks", 0.5)
reads = reads_of("sinks", 0.5)
positions = [policy.positions(n) for n in (0, 5, 20, 100)]
assert [len(read) for read in positions] == [sum(reads(n)) for n in (0, 5, 20, 100)]
llm = LLM(policy="sinks", sparsity=0.5)
output = llm.generate(["Once upon a time"], SamplingParams(max_tokens=30, ignore_eos=True))[0]
status = main(["plan", "--shape", "opt-1.3b", "--hardware", "h200", "--policy", "sinks", "--json"])
print(json.dumps({
    "found": found, "positions": positions, "num_tokens": len(output.token_ids), "plan": status,
    "state": policy_bytes(SHAPES["opt-1.3b"], "sinks", 0.5, 4, 100),
}))
try:
    main(["generate", "--help"])
except SystemExit:
    pass
"""


def blocks():
    """The two Python blocks of the section, without the indentation of the list that they stand in."""
    section = CONTRIBUTING.read_text().split("## Worked example: a selection policy")[1].split("\n## ")[0]
    found = re.findall(r"^   ```python\n(.*?)^   ```", section, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in found]


def copy_with_links(target):
    """The package at another place: all that is not touched is a link."""
    (target / "policy").mkdir(parents=True)
    for folder in (PACKAGE, PACKAGE / "policy"):
        for entry in folder.iterdir():
            if entry.name not in ("policy", "__pycache__"):
                (target / entry.relative_to(PACKAGE)).symlink_to(entry)


def test_a_policy_is_one_file_and_one_entry(tmp_path):
    file, entry = blocks()
    copy_with_links(tmp_path / "alisa")
    (tmp_path / "alisa" / "policy" / "sinks.py").write_text(file)
    registry = tmp_path / "alisa" / "policy" / "registry.py"
    before = registry.read_text()
    first = '        "dense": PolicyEntry('
    assert before.count(first) == 1
    registry.unlink()
    registry.write_text(before.replace(first, f"        {entry}{first}"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert f'"found": "{tmp_path}' in done.stdout
    assert '"positions": [[], [0, 1, 2, 3, 4], [0, 1, 12, 13, 14, 15, 16, 17, 18, 19]' in done.stdout
    assert '"num_tokens": 30, "plan": 0, "state": 0' in done.stdout
    assert "sinks" in done.stdout.split("--policy")[1].split("--sparsity")[0]
    assert "the first two and the recent" in " ".join(done.stdout.split())
