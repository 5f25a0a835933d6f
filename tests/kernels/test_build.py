"""Installing where the C++ library for CPUs cannot be built."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_compiler_one_line_says_so_and_no_older_library_stays(tmp_path):
    native = "jmemserve/kernels/cpu/native"
    shutil.copytree(ROOT / native, tmp_path / native)
    shutil.copy(ROOT / "setup.py", tmp_path)
    older = tmp_path / f"jmemserve/kernels/cpu/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    older.write_bytes(b"of another version")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "left out" in line]
    assert len(said) == 1 and "XLA does its work" in said[0], done.stdout
    assert not older.exists()
