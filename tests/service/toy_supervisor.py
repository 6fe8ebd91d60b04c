"""A real supervisor over a real Valkey and two toy parts: `python -m tests.service.toy_supervisor`."""

from __future__ import annotations

import sys

from service.core.errors import ServiceError
from service.core.logging import configure_logging
from service.core.settings import Settings
from service.supervisor import Part, Supervisor

# Writes its pid, says hello, and on SIGTERM notes the order in which parts were stopped.
CHILD = """
import os, signal, sys, time
name, folder = sys.argv[1], os.environ["UNSEEN_DATA_DIR"]
def stop(*_):
    open(folder + "/stopped", "a").write(name + "\\n"); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/{name}.pid", "w").write(str(os.getpid()))
print("hello from", name)
while True: time.sleep(0.05)
"""


def main() -> int:
    """Exit code 3 when refused."""
    settings = Settings()
    configure_logging(settings.log_level)
    parts = [
        Part("first", [sys.executable, "-c", CHILD, "first"]),
        Part("last", [sys.executable, "-c", CHILD, "last"], {}, 2),
    ]
    try:
        return Supervisor(settings, parts).run()
    except ServiceError as error:
        sys.stderr.write(f"{error.detail}\n")
        return 3


if __name__ == "__main__":
    sys.exit(main())
