"""Removes the user name and password of URLs from what is logged or reported: either can be an API key."""

import re

CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*@")


def without_credentials(text: object) -> str:
    """The text, for example an address or a line of a log, without the part of its URLs before an @."""
    return CREDENTIALS.sub("", str(text))
