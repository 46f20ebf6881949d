"""How the figures of this project's documents are made."""
