"""What a text must be: JSON of a schema, one of some choices, a regex, a grammar.

`ConstraintOptions` is what a caller asks for, `Constraint` the same compiled, and a `Matcher`
follows it through one answer, token by token. No engine knows of any of it.
"""

from gemma_multi.constraints.constraint import JSON_SPACES, Constraint, Matcher
from gemma_multi.constraints.options import ConstraintOptions

__all__ = ["JSON_SPACES", "Constraint", "ConstraintOptions", "Matcher"]
