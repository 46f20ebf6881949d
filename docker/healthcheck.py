"""Ends with code 0 where the service in this container answers 200: healthcheck.py /health, or /ready.

Standard library alone, so that it costs little every half minute. Reads the two settings that change the address.
"""

import os
import ssl
import sys
import urllib.request


def main(route: str) -> None:
    """Raises where there is no answer, or another status."""
    tls = "DENSE_REWARD_TLS_CERTIFICATE" in os.environ
    port = os.environ.get("DENSE_REWARD_PORT", "8000")
    # the certificate names the host that callers use, not this one
    context = ssl._create_unverified_context() if tls else None
    scheme = "https" if tls else "http"
    # no proxy: the environment's is not for addresses of this container
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(f"{scheme}://127.0.0.1:{port}{route}", timeout=4):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
