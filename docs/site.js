// A table that is wider than the page scrolls, so it must be reachable by keyboard. The theme wraps tables after it loads.
"use strict";

function mark() {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    if (table.scrollWidth > table.clientWidth) {
      table.tabIndex = 0;
    } else {
      table.removeAttribute("tabindex");
    }
  }
}

new MutationObserver(mark).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", mark);
mark();
