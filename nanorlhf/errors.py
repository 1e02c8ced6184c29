"""Errors that are the user's to mend: shown as one line, exit code 2, no traceback."""

from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. The message says what is wrong, where (file:line, flag, tensor name), and how to fix it.

    It is a ValueError so that library callers need to know no class of ours; the scripts turn it into one line on stderr
    and exit code 2 (`nanorlhf.run.main`).
    """


@contextmanager
def naming(path):
    """Put `path` before the message of an InputError from within: for checks of what a file says, made where it is not known."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def impostor(head):
    """What a file is instead of itself, by its first bytes, with the way out, or None: what half-made copies usually are."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself: download it again from its direct link"
    return None


def nearest(word, choices, cutoff=0.5):
    """The choice that `word` most likely meant, or None: for messages such as "unknown X; did you mean Y?"."""
    import difflib
    found = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=cutoff)
    return found[0] if found else None
