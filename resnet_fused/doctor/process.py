"""Another Python process with this package, whatever lies in the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import resnet_fused


def run(*arguments: str, **environment: str) -> str:
    """What `python ARGUMENTS` prints under these variables.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    package = str(Path(resnet_fused.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | environment
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return done.stdout
