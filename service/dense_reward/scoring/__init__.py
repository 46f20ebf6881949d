"""One request scored: its items checked, computed, and written as rows."""
