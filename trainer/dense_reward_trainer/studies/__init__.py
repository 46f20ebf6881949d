"""How this project's own figures are made."""
