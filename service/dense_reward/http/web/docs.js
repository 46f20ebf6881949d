// Swagger UI leaves some of its controls without a name: screen readers get them from here. Code scrolls by keyboard.

const NAMES = [
  [".examples-select-element", "example"],
  [".copy-to-clipboard button", "copy"],
  [".close-modal", "close"],
  ["textarea", "request body"],
];

function nameControls() {
  for (const [selector, name] of NAMES) {
    for (const one of document.querySelectorAll(`${selector}:not([aria-label])`)) one.ariaLabel = name;
  }
  for (const one of document.querySelectorAll(".microlight:not([tabindex])")) one.tabIndex = 0;
}

new MutationObserver(nameControls).observe(document.body, { childList: true, subtree: true });
