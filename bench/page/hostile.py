"""200 texts that would run code in a page that took them for markup, an address or a script."""

from itertools import product

from bench.page.browser import RAN

COUNT = 200
CALL = f"{RAN}()"
_ENCODED = "".join(f"&#{ord(sign)};" for sign in CALL)
_ELEMENTS = (
    "<script>{c}</script>",
    "<ScRiPt>{c}</sCrIpT>",
    "<script src=data:text/javascript,{c}></script>",
    "<script type=module>{c}</script>",
    "<img src=x onerror={c}>",
    '<img src=x onerror="{c}">',
    "<img/src=x/onerror={c}>",
    "<svg onload={c}>",
    "<svg><script>{c}</script></svg>",
    "<svg><animate onbegin={c} attributeName=x dur=1s>",
    "<body onload={c}>",
    "<iframe srcdoc='<script>parent.{c}</script>'>",
    "<iframe src=javascript:parent.{c}>",
    "<object data=javascript:{c}>",
    "<embed src=javascript:{c}>",
    "<video><source onerror={c}></video>",
    "<audio src=x onerror={c}>",
    "<input autofocus onfocus={c}>",
    "<details open ontoggle={c}>",
    "<marquee onstart={c}>",
    "<a href=javascript:{c} autofocus onfocus={c}>x</a>",
    "<form action=javascript:{c}><button autofocus onfocus={c}>",
    "<math><mtext><style><img src=x onerror={c}></style>",
    "<style>@import 'javascript:{c}';</style>",
    "<link rel=stylesheet href=javascript:{c}>",
    "<base href=javascript:{c}//>",
    "<meta http-equiv=refresh content='0;url=javascript:{c}'>",
    "<template><img src=x onerror={c}></template>",
    "<noscript><p title='</noscript><img src=x onerror={c}>'>",
    "<x onpointerover={c} style=position:fixed;inset:0 tabindex=0>x",
)
_BREAKOUTS = ("", '">', "'>", "</textarea>", "</title>", "-->", "]]>")
_OTHER = (
    "javascript:{c}",
    "JaVaScRiPt:{c}",
    "java\tscript:{c}",
    "data:text/html,<script>{c}</script>",
    "${{{c}}}",
    "{{{{{c}}}}}",
    "{{{{constructor.constructor('{c}')()}}}}",
    "');{c};//",
    '");{c};//',
    "`;{c};`",
    "\\u003cscript\\u003e{c}\\u003c/script\\u003e",
    "\u2028{c}\u2029",
    "\u202e<script>{c}</script>",
    "\x00<script>{c}</script>",
    "<<script>{c}//<</script>",
    "<script\n>{c}</script\n>",
    "<scr<script>ipt>{c}</scr</script>ipt>",
    '"onpointerover="{c}',
    "' onfocus='{c}' autofocus='",
    "</pre><script>{c}</script>",
    "</span><img src=x onerror={c}>",
    '{{"__proto__":{{"innerHTML":"<img src=x onerror={c}>"}}}}',
    "url(javascript:{c})",
    "expression({c})",
    "+ADw-script+AD4-{c}+ADw-/script+AD4-",
    "%3Cscript%3E{c}%3C/script%3E",
)


def hostile_texts() -> list[str]:
    """COUNT different texts; each calls the function RAN if anything runs it."""
    plain = [element.format(c=CALL) for element in _ELEMENTS]
    other = [text.format(c=CALL) for text in _OTHER]
    encoded = [element.format(c=_ENCODED) for element in _ELEMENTS]
    broken_out = [out + element for element, out in product(plain, _BREAKOUTS[1:])]
    return list(dict.fromkeys([*plain, *other, *encoded, *broken_out]))[:COUNT]
