"""`dense-reward serve`, on a free port, until it is ready. Its exit code after SIGTERM is that of this program."""

import subprocess
import sys
import time
import urllib.error
import urllib.request

from served_pair import free_port

PATIENCE_S = 120.0


def main() -> int:
    port = str(free_port())
    words = sys.argv[1:]
    if "--port" in words:
        del words[words.index("--port") : words.index("--port") + 2]
    service = subprocess.Popen([sys.executable, "-m", "dense_reward.cli", *words, "--port", port])
    end_s = time.monotonic() + PATIENCE_S
    while service.poll() is None and time.monotonic() < end_s and not ready(port):
        time.sleep(0.1)
    if service.poll() is None:
        service.terminate()
    return service.wait()


def ready(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return answer.status == 200  # type: ignore[no-any-return] # typeshed: Any
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
