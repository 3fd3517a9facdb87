"""A calculator for models: arithmetic by exact fractions, bounded before anything is computed. Nothing is ever executed."""

import ast
import re
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

TOOL = {
    "name": "calculator",
    "description": "Evaluates an arithmetic expression: numbers, + - * / ** and parentheses.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
ALLOWED = re.compile(r"[0-9.+\-*/() ]{1,200}", re.ASCII)
"""No letter reaches the parser, so no name, no attribute and no text does."""
MAX_BITS = 256
"""Of the numerator and the denominator of every number on the way."""
BINARY: dict[type, Any] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def calculate(expression: str) -> str:
    """An integer in digits, another number to 12 significant ones, or `error: ` and which rule was broken.

    An error repeats nothing of the expression: no text of the model comes back as the environment's.
    """
    if not ALLOWED.fullmatch(expression):
        return "error: expected 1 to 200 characters: digits, . + - * / ** ( ) and spaces"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):  # how the parser refuses deep nesting differs between versions
        return "error: not an arithmetic expression"
    except (ZeroDivisionError, OverflowError):
        return "error: division by zero, or a number too large"
    return str(value.numerator) if value.denominator == 1 else format(float(value), ".12g")


def _value(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(Fraction(repr(number)))  # a decimal as it was written
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return -_value(operand) if isinstance(sign, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right) if (exponent := _value(right)).denominator == 1:
            return _bounded(_bounded(_value(left), times=abs(exponent.numerator)) ** exponent.numerator)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_value(left), _value(right)))
    raise SyntaxError


def _bounded(value: Fraction, *, times: int = 1) -> Fraction:
    """Raises OverflowError where `value`, or that many such factors, have too many bits."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) * times > MAX_BITS:
        raise OverflowError
    return value
