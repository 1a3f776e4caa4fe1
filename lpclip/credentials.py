"""Passwords, keys and signatures in URIs: readers of logs, summaries, ids and MLflow's pages must not find them."""

from __future__ import annotations

import re

# S3's and Google's signed links, Azure's shared access signatures, pyarrow's options, and what web services ask for.
_NAMES = (
    r"[\w.-]*(?:secret|passw|token|key|signature|credential)[\w.-]*"
    r"|sig|sign|hmac|jwt|code|ticket|session|pwd|pass|auth|googleaccessid|x-amz-[\w-]+|x-goog-[\w-]+"
)
# Sentences go on behind a URI: its last marks are theirs.
_OPTION = re.compile(rf"(?<=[?&;#])({_NAMES})(=|%3d)[^&;#\s'\"]+?(?=[),:.]*(?:[&;#\s'\"]|$))", re.IGNORECASE)
# Some keys hold a slash. What follows a port is a path, and so is all behind a host without a colon.
_USER = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/?#\s]*:(?!\d{1,5}/)[^?#\s]*)@")
# A user name alone is none: abfs:// has the container there.
_PASSWORD = re.compile(r"://[^/?#\s]*:(?!\d{1,5}/)[^?#\s]*@")
# Options stand behind URIs, and some people write them behind names on the Hugging Face hub.
_BEGINS = re.compile("://|hf-hub:")


def holds_secret(text: str) -> bool:
    """True when a URI in the text holds a password, a secret key, a token or a signature."""
    return bool(_BEGINS.search(text)) and bool(_PASSWORD.search(text) or _OPTION.search(text))


def redact(text: str) -> str:
    """The text without the user names, passwords, keys, tokens and signatures of its URIs."""
    if not _BEGINS.search(text):
        return text
    return _OPTION.sub(r"\1\2...", _USER.sub("", text))
