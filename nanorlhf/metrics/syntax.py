"""Python's `ast` drawn as the concrete tree that tree-sitter would draw: CodeBLEU counts subtrees and data flow on it.

CodeBLEU's published numbers come from tree-sitter's trees, which have more nodes than `ast`'s: an `argument_list` under
every call, a `block` under every `if`, parentheses, the parts of strings. `draw` adds those, so that "the share of
subtrees found" is a share of nearly the same subtrees. It is a proxy all the same: `bench/codebleu_agreement.py`
measures how near, docs/METRICS.md has the table.

Code that Python cannot parse, or that is nested beyond MAX_DEPTH, is an ERROR node over the pieces of it that do parse.

Deviations from tree-sitter-python 0.21: its repairs of broken code are cleverer than those pieces; strings side by side
are one string; the text of f-strings, the patterns of `match`, `except*`, unions in annotations and names in brackets that are
assigned to are drawn coarsely.
"""

import ast
import keyword
import re
from itertools import accumulate

from nanorlhf.metrics.match import UNPARSABLE, parse

MAX_DEPTH = 120  # levels of a drawn tree; no score depends on how deep in calls the caller stands
MAX_RUN, MAX_TRIES = 24, 100  # tokens of a piece of broken code, and parses spent on finding all its pieces

# What tree-sitter calls an escape; "\d" is none, nor is "\0" (it wants three digits), and raw strings have none.
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|\d{3}|\n|N\{[^}]+\}|['\"abfnrtv\\])")
_QUOTES = re.compile(rb"([A-Za-z]*)('''|\"\"\"|'|\")")
_EMPTY_BASES = re.compile(rb"class\s+\w+\s*\(")  # class A():
# Tokens of broken code: strings closed on their line, names, numbers, any other character; comments are left out.
_TOKEN = re.compile(r"""
    (?P<string>[bBfFrRuU]{0,2}(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"))
    |(?P<identifier>[^\W\d]\w*)|(?P<integer>\d[\w.]*)|(?P<other>[^\s#])|\#[^\n]*""", re.VERBOSE)
_STARTS = ("(", "[", "{", "-", "not", "lambda", "return", "raise", "del", "import", "from")  # beside names and literals


class Node:
    """A node of the drawn tree. A leaf has `text` and no children (None); a string has both.

    `order` numbers the leaves from left to right; `depth` is the number of levels.
    """
    __slots__ = ("kind", "children", "text", "order", "depth")

    def __init__(self, kind, children=None, text=None):
        self.kind, self.children, self.text, self.order = kind, children, text, None
        self.depth = 1 + max([child.depth for child in children], default=0) if children else 1


def draw(code):
    """The drawn tree of `code`; where Python cannot parse it or it is nested too deeply, the tree of its pieces."""
    drawn = _draw_whole(code) or Node("module", (Node("ERROR", tuple(_pieces(code))),))
    for order, leaf in enumerate(leaves(drawn)):
        leaf.order = order
    return drawn


def _draw_whole(code):
    tree = parse(code)
    try:
        drawn = tree and _Draw(code).module(tree)
    except UNPARSABLE:
        return None
    return drawn if drawn and drawn.depth <= MAX_DEPTH else None


def _pieces(code):
    """What can be read of broken code, from left to right: the longest runs of tokens that parse, tokens between."""
    tokens = [match for match in _TOKEN.finditer(code) if match.lastgroup]
    depths = [0, *accumulate((token.group() in "([{") - (token.group() in ")]}") for token in tokens)]
    start, tries = 0, iter(range(MAX_TRIES))
    while start < len(tokens):
        piece, end = _longest_piece(code, tokens, depths, start, tries)
        if piece:
            yield from piece.children
        elif _is_leaf(tokens[start]):
            yield Node(tokens[start].lastgroup, text=tokens[start].group())
        start = end


def _longest_piece(code, tokens, depths, start, tries):
    """(drawn module, where it ends) of the longest run from `start` that parses; (None, the next token) without one."""
    for end in _ends(code, tokens, depths, start):
        if next(tries, None) is None:
            break
        if piece := _draw_whole(code[tokens[start].start():tokens[end - 1].end()]):
            return piece, end
    return None, start + 1


def _ends(code, tokens, depths, start):
    """Where a run of two tokens or more may end, the longest first: with all its brackets closed, after a name, a
    literal or a closing bracket, on the line it began on but for line ends inside brackets."""
    if not (_is_leaf(tokens[start]) or tokens[start].group() in _STARTS):
        return []
    ends = []
    for end in range(start + 1, min(len(tokens), start + MAX_RUN) + 1):
        last, after = tokens[end - 1], tokens[end].start() if end < len(tokens) else len(code)
        if depths[end] == depths[start] and end > start + 1 and (_is_leaf(last) or last.group() in ")]}"):
            ends.append(end)
        if depths[end] < depths[start] or (depths[end] == depths[start] and "\n" in code[last.end():after]):
            break
    return reversed(ends)


def _is_leaf(token):
    return token.lastgroup != "other" and not keyword.iskeyword(token.group())


def leaves(node):
    """The leaves under a node from left to right, strings among them."""
    if node.text is not None:
        return [node]
    return [leaf for child in node.children or () for leaf in leaves(child)]


def _identifier(name):
    return Node("identifier", text=name)


class _Draw:
    """One method for each kind of `ast` node with a drawing of its own; children stand in the order of the source."""

    def __init__(self, code):
        self.source = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").encode()
        self.starts, self.in_f_string = [0], False  # before Python 3.12 positions inside f-strings are wrong
        for line in self.source.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)

    def draw(self, node, inside=0):
        """Node of an `ast` node. `inside` is the number of brackets around it that belong to its parent."""
        drawn = getattr(self, type(node).__name__, self.other)(node)
        for _ in range(self.brackets(node) - inside if isinstance(node, ast.expr) else 0):
            drawn = Node("parenthesized_expression", (drawn,))
        return drawn

    def all(self, nodes):
        return tuple([self.draw(node) for node in nodes if node is not None])

    def other(self, node):
        """What has no method: the name of its class, and its children."""
        below = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        return Node(type(node).__name__, self.all(below))

    # ---- the source

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def text(self, node):
        """The source of a constant; inside an f-string what `repr` makes of it."""
        start, end = self.span(node)
        return repr(node.value).encode() if self.in_f_string else self.source[start:end]

    def brackets(self, node):
        """How many pairs of round brackets stand close around a node: `ast` does not keep them."""
        (i, j), source, pairs = self.span(node), self.source, 0
        while not self.in_f_string:
            i -= 1
            while i >= 0 and source[i] in b" \t\n":
                i -= 1
            while j < len(source) and source[j] in b" \t\n":
                j += 1
            if i < 0 or j >= len(source) or source[i] != ord("(") or source[j] != ord(")"):
                break
            j, pairs = j + 1, pairs + 1
        return pairs

    def is_bracketed(self, node):
        """Whether a tuple's own brackets are written: then more of them stand before its first part than that has."""
        if not node.elts or self.in_f_string:
            return True
        start, first = self.span(node)[0], self.span(node.elts[0])[0]
        return self.source.count(b"(", start, first) > self.brackets(node.elts[0])

    # ---- expressions

    def Name(self, node):
        return _identifier(node.id)

    def Constant(self, node):
        value = node.value
        if isinstance(value, (str, bytes)):
            return self.string(node)
        if value is None or isinstance(value, bool) or value is ...:
            return Node({None: "none", True: "true", False: "false", ...: "ellipsis"}[value], text=str(value))
        text = self.text(node).decode()
        whole = isinstance(value, int) or isinstance(value, complex) and not set(text.lower()) & set(".e")  # 1j is an integer
        return Node("integer" if whole else "float", text=text)

    def string(self, node):
        text = self.text(node)
        prefix, quotes = _QUOTES.match(text).groups()
        body = text[len(prefix) + len(quotes):-len(quotes)]
        escapes = () if b"r" in prefix.lower() else tuple([Node("escape_sequence") for _ in _ESCAPE.findall(body)])
        content = (Node("string_content", escapes or None),) if body else ()
        return Node("string", (Node("string_start"), *content, Node("string_end")), text.decode())

    def JoinedStr(self, node):
        start, end = self.span(node)
        before, self.in_f_string = self.in_f_string, True
        parts = [Node("interpolation", (self.draw(value.value),)) if isinstance(value, ast.FormattedValue)
                 else Node("string_content") for value in node.values]
        self.in_f_string = before
        text = "f-string in an f-string" if before else self.source[start:end].decode()
        return Node("string", (Node("string_start"), *parts, Node("string_end")), text)

    def Attribute(self, node):
        return Node("attribute", (self.draw(node.value), _identifier(node.attr)))

    def Call(self, node):
        arguments = node.args + node.keywords
        if len(arguments) == 1 and isinstance(node.args and node.args[0], ast.GeneratorExp):
            if self.span(arguments[0])[1] == self.span(node)[1]:  # f(x for x in y): its brackets are the call's
                return Node("call", (self.draw(node.func), self.GeneratorExp(arguments[0])))
        return Node("call", (self.draw(node.func), self.arguments(arguments)))

    def arguments(self, arguments):
        if len(arguments) > 1:
            arguments = sorted(arguments, key=lambda argument: (argument.lineno, argument.col_offset))
        inside = int(len(arguments) == 1)
        return Node("argument_list", tuple([self.draw(argument, inside) for argument in arguments]))

    def keyword(self, node):
        if node.arg is None:
            return Node("dictionary_splat", (self.draw(node.value),))
        return Node("keyword_argument", (_identifier(node.arg), self.draw(node.value)))

    def Starred(self, node):
        return Node("list_splat", (self.draw(node.value),))

    def Subscript(self, node):
        return Node("subscript", (self.draw(node.value), *self.all(self.indices(node))))

    def indices(self, node):
        index = node.slice
        return index.elts if isinstance(index, ast.Tuple) and not self.is_bracketed(index) else [index]

    def Slice(self, node):
        return Node("slice", self.all([node.lower, node.upper, node.step]))

    def BinOp(self, node):
        return Node("binary_operator", (self.draw(node.left), self.draw(node.right)))

    def BoolOp(self, node):
        first, *rest = self.all(node.values)
        for value in rest:  # a and b and c is (a and b) and c
            first = Node("boolean_operator", (first, value))
        return first

    def UnaryOp(self, node):
        return Node("not_operator" if isinstance(node.op, ast.Not) else "unary_operator", (self.draw(node.operand),))

    def Compare(self, node):
        return Node("comparison_operator", self.all([node.left, *node.comparators]))

    def IfExp(self, node):
        return Node("conditional_expression", self.all([node.body, node.test, node.orelse]))

    def NamedExpr(self, node):
        return Node("named_expression", self.all([node.target, node.value]))

    def Await(self, node):
        return Node("await", (self.draw(node.value),))

    def Yield(self, node):
        return Node("yield", (self.values(node.value),) if node.value else ())

    YieldFrom = Yield

    def Tuple(self, node):
        return Node("tuple", self.all(node.elts))

    def List(self, node):
        return Node("list", self.all(node.elts))

    def Set(self, node):
        return Node("set", self.all(node.elts))

    def Dict(self, node):
        return Node("dictionary", tuple([
            Node("pair", self.all([key, value])) if key else Node("dictionary_splat", (self.draw(value),))
            for key, value in zip(node.keys, node.values)]))

    def ListComp(self, node):
        return Node("list_comprehension", (self.draw(node.elt), *self.clauses(node)))

    def SetComp(self, node):
        return Node("set_comprehension", (self.draw(node.elt), *self.clauses(node)))

    def GeneratorExp(self, node):
        return Node("generator_expression", (self.draw(node.elt), *self.clauses(node)))

    def DictComp(self, node):
        return Node("dictionary_comprehension",
                    (Node("pair", self.all([node.key, node.value])), *self.clauses(node)))

    def clauses(self, node):
        for clause in node.generators:
            yield Node("for_in_clause", (self.target(clause.target), self.draw(clause.iter)))
            yield from (Node("if_clause", (self.draw(condition),)) for condition in clause.ifs)

    def Lambda(self, node):
        parameters = tuple(self.parameters(node.args))
        first = (Node("lambda_parameters", parameters),) if parameters else ()
        return Node("lambda", (*first, self.draw(node.body)))

    def parameters(self, args):
        plain = args.posonlyargs + args.args
        defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
        for i, (arg, default) in enumerate(zip(plain, defaults), start=1):
            yield self.parameter(arg, default)
            if i == len(args.posonlyargs):
                yield Node("positional_separator", ())
        if args.vararg:
            yield self.splat("list_splat_pattern", args.vararg)
        elif args.kwonlyargs:
            yield Node("keyword_separator", ())
        for arg, default in zip(args.kwonlyargs, args.kw_defaults):
            yield self.parameter(arg, default)
        if args.kwarg:
            yield self.splat("dictionary_splat_pattern", args.kwarg)

    def parameter(self, arg, default=None):
        name, annotation = _identifier(arg.arg), self.annotation(arg.annotation)
        value = self.all([default])
        if not annotation and not value:
            return name
        kind = ("typed_" if annotation else "") + ("default_" if value else "") + "parameter"
        return Node(kind, (name, *annotation, *value))

    def splat(self, kind, arg):
        name, annotation = Node(kind, (_identifier(arg.arg),)), self.annotation(arg.annotation)
        return Node("typed_parameter", (name, *annotation)) if annotation else name

    def annotation(self, node):
        return (Node("type", (self.type(node),)),) if node else ()

    def type(self, node):
        """List[int] is a generic type where it is an annotation, and each of its parameters is a type."""
        if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)) or self.brackets(node):
            return self.draw(node)
        parameters = tuple([part for index in self.indices(node) for part in self.annotation(index)])
        return Node("generic_type", (self.draw(node.value), Node("type_parameter", parameters)))

    # ---- both sides of assignments and loops

    def target(self, node):
        """What is assigned to: tuples, lists and stars are patterns there."""
        if isinstance(node, ast.Starred):
            return Node("list_splat_pattern", (self.target(node.value),))
        if not isinstance(node, (ast.Tuple, ast.List)):
            return self.draw(node)
        kind = "list_pattern"
        if isinstance(node, ast.Tuple):
            kind = "tuple_pattern" if self.is_bracketed(node) else "pattern_list"
        return Node(kind, tuple([self.target(part) for part in node.elts]))

    def values(self, node):
        """A right-hand side: a tuple without brackets is an expression_list."""
        if isinstance(node, ast.Tuple) and not self.is_bracketed(node):
            return Node("expression_list", self.all(node.elts))
        return self.draw(node)

    # ---- statements

    def module(self, tree):
        return Node("module", self.statements(tree.body))

    def statements(self, body):
        """Strings that stand alone are docstrings and left out, as comments are."""
        return self.all(statement for statement in body if not _is_docstring(statement))

    def block(self, body):
        return Node("block", self.statements(body))

    def orelse(self, body, kind="else_clause"):
        return (Node(kind, (self.block(body),)),) if body else ()

    def Expr(self, node):
        if isinstance(node.value, ast.Tuple) and not self.is_bracketed(node.value):
            return Node("expression_statement", self.all(node.value.elts))
        return Node("expression_statement", (self.draw(node.value),))

    def Assign(self, node):
        value = self.values(node.value)
        for target in reversed(node.targets):
            value = Node("assignment", (self.target(target), value))
        return Node("expression_statement", (value,))

    def AnnAssign(self, node):
        parts = (self.target(node.target), *self.annotation(node.annotation), *self.all([node.value]))
        return Node("expression_statement", (Node("assignment", parts),))

    def AugAssign(self, node):
        parts = (self.target(node.target), self.values(node.value))
        return Node("expression_statement", (Node("augmented_assignment", parts),))

    def Return(self, node):
        return Node("return_statement", (self.values(node.value),) if node.value else ())

    def Delete(self, node):
        below = self.all(node.targets)
        return Node("delete_statement", (Node("expression_list", below),) if len(below) > 1 else below)

    def Raise(self, node):
        return Node("raise_statement", self.all([node.exc, node.cause]))

    def Assert(self, node):
        return Node("assert_statement", self.all([node.test, node.msg]))

    def Pass(self, node):
        return Node("pass_statement", ())

    def Break(self, node):
        return Node("break_statement", ())

    def Continue(self, node):
        return Node("continue_statement", ())

    def Global(self, node):
        return Node("global_statement", tuple(map(_identifier, node.names)))

    def Nonlocal(self, node):
        return Node("nonlocal_statement", tuple(map(_identifier, node.names)))

    def Import(self, node):
        return Node("import_statement", tuple(map(_imported, node.names)))

    def ImportFrom(self, node):
        module = (_dotted(node.module),) if node.module else ()
        module = (Node("relative_import", (Node("import_prefix", ()), *module)),) if node.level else module
        names = (Node("wildcard_import", ()),) if node.names[0].name == "*" else tuple(map(_imported, node.names))
        if node.module == "__future__" and not node.level:
            return Node("future_import_statement", names)
        return Node("import_from_statement", module + names)

    def If(self, node, kind="if_statement"):
        clauses = []
        while len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If) and self.is_elif(node.orelse[0]):
            clauses.append(node)
            node = node.orelse[0]
        first, *others = [*clauses, node]
        parts = [self.draw(first.test), self.block(first.body)]
        parts += [Node("elif_clause", (self.draw(other.test), self.block(other.body))) for other in others]
        return Node("if_statement", (*parts, *self.orelse(node.orelse)))

    def is_elif(self, node):
        start = self.span(node)[0]
        return self.source[start:start + 4] == b"elif"

    def For(self, node):
        return Node("for_statement", (self.target(node.target), self.values(node.iter), self.block(node.body),
                                      *self.orelse(node.orelse)))

    AsyncFor = For

    def While(self, node):
        return Node("while_statement", (self.draw(node.test), self.block(node.body), *self.orelse(node.orelse)))

    def With(self, node):
        return Node("with_statement", (Node("with_clause", self.all(node.items)), self.block(node.body)))

    AsyncWith = With

    def withitem(self, node):
        value = self.draw(node.context_expr)
        return Node("with_item", (_as(value, self.draw(node.optional_vars)) if node.optional_vars else value,))

    def Try(self, node):
        return Node("try_statement", (self.block(node.body), *self.all(node.handlers), *self.orelse(node.orelse),
                                      *self.orelse(node.finalbody, "finally_clause")))

    def ExceptHandler(self, node):
        caught = self.all([node.type])
        if node.name:
            caught = (_as(*caught, _identifier(node.name)),)
        return Node("except_clause", (*caught, self.block(node.body)))

    def FunctionDef(self, node):
        parameters = Node("parameters", tuple(self.parameters(node.args)))
        return self.decorated(node, Node("function_definition", (
            _identifier(node.name), parameters, *self.annotation(node.returns), self.block(node.body))))

    AsyncFunctionDef = FunctionDef

    def ClassDef(self, node):
        arguments, brackets = node.bases + node.keywords, _EMPTY_BASES.match(self.source, self.span(node)[0])
        bases = (self.arguments(arguments),) if arguments or brackets else ()
        return self.decorated(node, Node("class_definition", (_identifier(node.name), *bases, self.block(node.body))))

    def decorated(self, node, definition):
        decorators = [Node("decorator", (self.draw(decorator),)) for decorator in node.decorator_list]
        return Node("decorated_definition", (*decorators, definition)) if decorators else definition


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _as(value, target):
    return Node("as_pattern", (value, Node("as_pattern_target", (target,))))


def _dotted(name):
    return Node("dotted_name", tuple(map(_identifier, name.split("."))))


def _imported(alias):
    if alias.asname is None:
        return _dotted(alias.name)
    return Node("aliased_import", (_dotted(alias.name), _identifier(alias.asname)))
