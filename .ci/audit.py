"""Look every pinned release up in the database of known vulnerabilities: ``make audit``.

Ends with 0 where all were looked up and none is known to be vulnerable, 1 where one is, and 3 where the database could
not be reached for some: pip-audit alone then says that nothing was found.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(requirements: str) -> int:
    """Audit a file of pins; return the exit code."""
    call = [sys.executable, "-m", "pip_audit", "-r", requirements, "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"audit: pip-audit did not run to its end, nothing is known: {line}")
        return 3
    vulnerable = [(d["name"], d["version"], v["id"]) for d in found for v in d.get("vulns", [])]
    for name, version, identifier in vulnerable:
        print(f"audit: {name} {version} is vulnerable: {identifier}")
    skipped = [d["name"] for d in found if "skip_reason" in d]
    print(f"audit: {len(found) - len(skipped)} of {len(found)} releases looked up, {len(vulnerable)} findings")
    if vulnerable:
        return 1
    if skipped or not found:
        print(f"audit: the database of vulnerabilities was not reached for {len(skipped)} of them: this proves nothing")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "constraints.txt"))
