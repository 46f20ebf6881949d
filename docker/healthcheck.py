"""Health check of the image: exit code 0 if the service in this container answers 200 to /health or /ready, else 1.

`docker inspect` shows what it prints: why the service is not ready, in one line.

Usage: healthcheck.py /health. Uses only the standard library, so that a run every 30 s costs little. Reads the two
settings that change the address.
"""

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request


def main(route: str) -> None:
    """Exits with the reason if there is no response, or its status is not a success."""
    tls = "DENSE_REWARD_TLS_CERTIFICATE" in os.environ
    port = os.environ.get("DENSE_REWARD_PORT", "8000")
    # No verification: the certificate names the host that callers use, not 127.0.0.1.
    context = ssl._create_unverified_context() if tls else None
    scheme = "https" if tls else "http"
    # No proxy: one in the environment cannot reach this container's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"{scheme}://127.0.0.1:{port}{route}", timeout=4):
            pass
    except urllib.error.HTTPError as error:
        sys.exit(f"{route}: {error.code} {error.read(1000).decode(errors='replace')}")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"{route}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
