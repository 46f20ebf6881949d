"""The dense reward inside other programs that train policies."""
