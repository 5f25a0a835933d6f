"""A short run of the chaos benchmark: kills, a pause and a cut while streams run; it checks its own aims."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_stream_is_hurt(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--mesh", "prefill+2xdecode"]
    command += ["--kills", "2", "--pauses", "1", "--cuts", "1", "--distinct", "4", "--clients", "2"]
    # The time to the first token is a matter of the machine, which tests do not judge.
    command += ["--ttft-aim", "1000", "--log", str(tmp_path / "log"), "--output", str(tmp_path / "result.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    log = (tmp_path / "log").read_text()[-3000:] if (tmp_path / "log").exists() else ""
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}\n{log}"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["faults"] == {"kill": 2, "pause": 1, "cut": 1}
    assert result["streams"] == result["whole"] > 4
    assert result["leaked_blocks"] == 0
