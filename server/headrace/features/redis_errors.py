"""What may be said of an error of Redis, and replies that are too large. Pure."""


class OversizedReplyError(OSError):
    """A server sends more than was to be expected: it is well, and what was asked is too large."""


def error_word(error: object) -> str:
    """
    Return the first word of an error's text, which says of what kind it is.

    What follows may repeat the command that was refused, and with it a password or a key.
    """
    words = str(error).removeprefix("-").split(maxsplit=1)
    return words[0] if words and words[0].isalpha() and words[0].isupper() else "an error"
