#!/usr/bin/env python
"""``health.py [head|worker|mlflow]``: exit 0 if this container's part answers, 1 if not.

The part is MOEIFY_ROLE where it is not given; a container without a part is always well.
"""

import os
import sys
import urllib.request
from pathlib import Path


def url(role: str) -> str:
    """Return what is asked, always on this machine."""
    get = os.environ.get
    return {
        "head": f"http://127.0.0.1:{get('RAY_DASHBOARD_PORT', '8265')}/api/version",
        "worker": f"http://127.0.0.1:{get('RAY_AGENT_PORT', '52365')}/api/local_raylet_healthz",
        "mlflow": f"http://127.0.0.1:{get('MLFLOW_PORT', '5000')}/health",
    }[role]


def token() -> str:
    """Return Ray's token, or nothing."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return os.environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text(encoding="utf-8").strip() if path else "")


def main() -> int:
    """Ask, and say why not."""
    role = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MOEIFY_ROLE", "")
    if not role:
        return 0
    try:
        request = urllib.request.Request(url(role))
        if role != "mlflow" and (known := token()):
            request.add_header("Authorization", f"Bearer {known}")
        with urllib.request.urlopen(request, timeout=8.0) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, KeyError) as error:
        sys.stderr.write(f"health: {role}: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
