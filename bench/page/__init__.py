"""The page at / in a real browser: accessibility, main-thread tasks, first render, hostile texts, screenshots."""
