"""The web page at / and the API documentation at /docs, each with its Content-Security-Policy."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from dense_reward.heatmap import style_sources

POLICY = "Content-Security-Policy"
NOTHING_ELSE = "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {' '.join(style_sources())}; connect-src 'self'; "
    f"{NOTHING_ELSE}"
)
INLINE_SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)


def add_pages(app: FastAPI) -> None:
    """Add the page with its files under /web, and /docs with its files under /docs/assets.

    Neither loads anything from another host.
    """
    web = Path(__file__).parent / "web"
    app.mount("/web", StaticFiles(directory=web))
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))
    docs_page, docs_policy = _docs()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse((web / "index.html").read_text(), headers={POLICY: PAGE_POLICY})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page, headers={POLICY: docs_policy})


def _docs() -> tuple[str, str]:
    """Swagger UI and its policy: its inline script is allowed by its hash; it adds inline styles at run time."""
    page = bytes(
        get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="dense-reward",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="data:,",
            swagger_ui_parameters={"validatorUrl": None},  # otherwise Swagger UI sends the schema's URL to swagger.io
        ).body
    ).decode()
    scripts = " ".join(f"'sha256-{_hash(script)}'" for script in INLINE_SCRIPT.findall(page))
    policy = f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    return page, policy + NOTHING_ELSE


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
