"""Health check of the image: exits with code 0 if the service in this container answers 200 to /health or /ready.

Usage: healthcheck.py /health. Uses only the standard library, so that a run every 30 s costs little. Reads the two
settings that change the address.
"""

import os
import ssl
import sys
import urllib.request


def main(route: str) -> None:
    """Raises if there is no response, or its status is not a success."""
    tls = "DENSE_REWARD_TLS_CERTIFICATE" in os.environ
    port = os.environ.get("DENSE_REWARD_PORT", "8000")
    # No verification: the certificate names the host that callers use, not 127.0.0.1.
    context = ssl._create_unverified_context() if tls else None
    scheme = "https" if tls else "http"
    # No proxy: one in the environment cannot reach this container's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(f"{scheme}://127.0.0.1:{port}{route}", timeout=4):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
