"""Both models computed in this process with torch."""
