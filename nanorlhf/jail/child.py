"""The child: a forked process that runs the code and answers the judge's questions about it. It knows no test, but for
functions that one hands to the code.

What it answers is believed to be a value and nothing more; nothing here is a wall, the code may change all of it.
"""

import ast
import builtins
import marshal
import operator
import sys
import types

from .values import decode, encode, receive, send


def answer(sock):
    """Answer the judge's questions about the code until it goes away."""
    module = sys.modules["solution"] = types.ModuleType("solution")
    names, kept = module.__dict__, []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    def load(source):
        exec(compile(source, "<code>", "exec", dont_inherit=True), names)

    def run(*sources):
        """The value of the last one's last line if that is an expression, else None."""
        for source in sources[:-1]:
            load(source)
        tree = ast.parse(sources[-1])
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), names)
        return None if last is None else eval(compile(last, "<code>", "eval"), names)

    def name(name):
        if name not in names:
            raise NameError(f"the code does not define {name}")
        return names[name]

    def function(code, defaults, keyword_defaults):
        """A test's function: among Python's names and not the code's, nor the test's."""
        made = types.FunctionType(marshal.loads(code), {"__builtins__": builtins}, None, defaults)
        made.__kwdefaults__ = keyword_defaults
        return made

    questions = {each.__name__: each for each in (
        load, run, name, function, getattr, setattr, delattr, operator.getitem, operator.setitem, operator.delitem,
        operator.call, iter, next, len, bool, str, int, float)}
    file = sock.makefile("rb")
    while True:
        question, args = receive(file)
        try:
            args, kwargs = decode(args, lambda number, _: kept[number])
            reply = {"value": encode(questions[question](*args, **kwargs), keep)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
            reply = {"raised": [each.__name__ for each in type(error).__mro__][:20], "text": str(error)[:300]}
        send(sock, reply)
