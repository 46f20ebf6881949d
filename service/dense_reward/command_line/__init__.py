"""What can be typed after `dense-reward`, and what it does. Both commands share the parser."""
