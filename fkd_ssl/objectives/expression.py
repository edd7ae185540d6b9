"""Objectives as expressions: `feature_kl + 0.5*queue_kl(queue=4096)`, names with settings and weights."""

import ast
import math
from dataclasses import dataclass
from typing import Any

from fkd_ssl.errors import RequestError

EXAMPLE = "feature_kl+0.5*queue_kl(queue=4096)"


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a sum of objectives."""

    weight: float
    name: str
    settings: dict[str, Any]

    @property
    def text(self) -> str:
        """The term as an expression."""
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return (f"{self.weight!r}*" if self.weight != 1 else "") + self.name + (f"({settings})" if settings else "")


def parse(expression: str) -> list[Term]:
    """Parses an expression into its terms without executing it.

    >>> parse("0.5*queue_kl(queue=4096)")
    [Term(weight=0.5, name='queue_kl', settings={'queue': 4096})]

    Raises:
        RequestError: It is not a sum of names, each with an optional positive weight and optional settings.
    """
    try:
        terms = _terms(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RequestError(f"objective {expression!r}: expected a sum such as {EXAMPLE}") from error
    for term in terms:
        if not 0 < term.weight < math.inf:
            raise RequestError(f"objective {expression!r}: the weight {term.weight:g} is not positive and finite")
    return terms


def _terms(node: ast.expr) -> list[Term]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left) + _terms(right)
        case ast.BinOp(left=weight, op=ast.Mult(), right=(ast.Name() | ast.Call()) as objective):
            (term,) = _terms(objective)
            return [Term(weight=float(ast.literal_eval(weight)), name=term.name, settings=term.settings)]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=settings):
            return [Term(weight=1.0, name=name, settings={str(s.arg): ast.literal_eval(s.value) for s in settings})]
        case ast.Name(id=name):
            return [Term(weight=1.0, name=name, settings={})]
    raise ValueError("not a sum of objectives")
