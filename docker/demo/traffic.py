"""The traffic of docker-compose.yml: users of the demo's world who visit at a constant rate, until they are told to stop."""

import sys
import time
from http.client import HTTPConnection, HTTPException

from adrank_demo.visits import visit
from training.simulation import make_world

VISITS_A_SECOND = 10.0
TELL_EVERY = 60.0


def main(host: str, port: int) -> None:
    """Visit until told to stop; a minute's sum to standard output."""
    world, connection = make_world(), HTTPConnection(host, port, timeout=5)
    due = said = time.monotonic()
    visits = failed = 0
    while True:
        visits += 1
        try:
            visit(world, connection, visits)
        except (OSError, HTTPException, ValueError, KeyError) as error:
            failed, reason = failed + 1, str(error)
            connection.close()
        if time.monotonic() - said >= TELL_EVERY:
            print(f"{visits} visits, {failed} failed" + (f", the last with: {reason}" if failed else ""), flush=True)
            said, visits, failed = time.monotonic(), 0, 0
        due = max(due + 1 / VISITS_A_SECOND, time.monotonic() - 1)
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
