"""The images' HEALTHCHECK: exit code 0 if an address answers 200, else 1 with a line that `docker inspect` shows.

Standard library alone, and little of it: it is started every few seconds.
"""

import os
import sys
from http.client import HTTPConnection, HTTPException

SECONDS = 2.5
SHOWN = 500


def main(path: str, port: int) -> int:
    """Ask, say what came, and tell whether it was good."""
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        sys.stdout.write(reply.read(SHOWN).decode("utf-8", "replace"))
    except (OSError, HTTPException) as error:
        sys.stdout.write(f"no answer from port {port}: {error}")
        return 1
    finally:
        connection.close()
    return 0 if reply.status == 200 else 1


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words[0] if words else "/readyz", int(words[1] if words[1:] else os.environ.get("ADRANK_PORT", "8000"))))
