"""The web page at / and the API documentation at /docs, each with its Content-Security-Policy."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from dense_reward.heatmap import palette_variables

POLICY = "Content-Security-Policy"
NOTHING_ELSE = "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Trusted Types: the browser refuses every way in which a script of the page could parse text as markup or code.
TRUSTED_TYPES = "require-trusted-types-for 'script'; trusted-types 'none'; "
STYLE_LINK = '<link rel="stylesheet" href="web/page.css">'
DOCS_STYLE = '<link rel="stylesheet" href="/web/docs.css">'
DOCS_SCRIPT = '<script src="/web/docs.js" type="module"></script>'
DOCS_CODE = {"theme": "tomorrow-night"}
"""Its colours have the contrast that WCAG AA asks for."""
INLINE_SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)


def add_pages(app: FastAPI) -> None:
    """Add the page with its files under /web, and /docs with its files under /docs/assets.

    Neither loads anything from another host.
    """
    web = Path(__file__).parent / "web"

    @app.get("/web/palettes.css", include_in_schema=False)
    async def palettes() -> Response:
        return Response(palette_variables(), media_type="text/css")

    app.mount("/web", StaticFiles(directory=web))
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))
    first_page, first_policy = _page(web)
    docs_page, docs_policy = _docs()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(first_page, headers={POLICY: first_policy})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page, headers={POLICY: docs_policy})


def _page(web: Path) -> tuple[str, str]:
    """The page and its policy. Its first stylesheet is in it, allowed by its hash: so it is drawn a request earlier."""
    style = (web / "page.css").read_text("utf-8")
    page = (web / "index.html").read_text("utf-8").replace(STYLE_LINK, f"<style>{style}</style>")
    policy = f"default-src 'none'; script-src 'self'; style-src 'self' 'sha256-{_hash(style)}'; connect-src 'self'; "
    return page, policy + TRUSTED_TYPES + NOTHING_ELSE


def _docs() -> tuple[str, str]:
    """Swagger UI and its policy: its inline script is allowed by its hash; it adds inline styles at run time."""
    page = bytes(
        get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="dense-reward",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="data:,",
            # validatorUrl: otherwise Swagger UI sends the schema's URL to swagger.io. deepLinking: it puts links into
            # buttons, which screen readers and keyboards cannot tell apart.
            swagger_ui_parameters={"validatorUrl": None, "deepLinking": False, "syntaxHighlight": DOCS_CODE},
        ).body
    ).decode()
    page = page.replace("<html>", '<html lang="en">').replace("</head>", f"{DOCS_STYLE}{DOCS_SCRIPT}</head>")
    scripts = " ".join(f"'sha256-{_hash(script)}'" for script in INLINE_SCRIPT.findall(page))
    policy = f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    return page, policy + NOTHING_ELSE


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
