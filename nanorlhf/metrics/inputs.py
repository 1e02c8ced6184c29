"""What every text metric accepts, checked in one place: a wrong shape is one clear line, a strange text never raises.

A corpus is a list of predictions and a list of references of the same length. The references of one prediction are a
string, or a list of strings where there are several.
"""

from nanorlhf.errors import InputError


def text(value, name):
    """`value` itself if it is a string, else InputError naming it."""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}, not a string: pass source text")
    return value


def reference_texts(reference, name="reference"):
    """One reference or several -> list of strings, at least one."""
    if isinstance(reference, str):
        return [reference]
    if not isinstance(reference, (list, tuple)):
        raise InputError(f"{name} is a {type(reference).__name__}: pass a string, or a list of strings for several")
    if not reference:
        raise InputError(f"{name} is an empty list: every prediction needs at least one reference")
    return [text(value, f"{name}[{i}]") for i, value in enumerate(reference)]


def corpus(predictions, references):
    """(predictions, references) -> (list of strings, list of lists of strings), of one length; else InputError."""
    for name, values in (("predictions", predictions), ("references", references)):
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise InputError(f"{name} is a {type(values).__name__}: pass a list with one entry per prediction")
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions but {len(references)} references: pass one reference (or one "
                         "list of references) per prediction")
    predictions = [text(value, f"predictions[{i}]") for i, value in enumerate(predictions)]
    return predictions, [reference_texts(value, f"references[{i}]") for i, value in enumerate(references)]
