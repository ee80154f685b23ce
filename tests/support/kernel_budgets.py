"""How far CUDA kernels may be off from float64 on the same stored inputs: one table, each number with its reason.

allowed = multiple · unit roundoff of a type · the natural magnitude, which the case computes (of a sum, what its terms
weigh together). A case says which type and magnitude; nothing else widens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

UNIT_ROUNDOFF: Mapping[str, float] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8": 2.0**-4,
}
"""Half the distance from 1 to the next number: what one rounding to nearest is off by, relatively, at most."""


@dataclass(frozen=True, slots=True)
class KernelBudget:
    multiple: float
    reason: str


BUDGETS: Mapping[str, KernelBudget] = {
    "moe_gate": KernelBudget(
        8,
        "float32, times weight · (1 + distance from the best logit): the distance and its product with log2(e) are "
        "rounded (2.5 distances), exp2 is off by 2 units in the last place (4 roundoffs), sum and quotient by 1 each",
    ),
    "activation": KernelBudget(
        4,
        "float32, times the activation · (1 + the exponent of its exp): the exponent is rounded twice or so, exp2 is "
        "off by 2 units in the last place (4 roundoffs), erfc's fit by 2; a product or quotient rounds once each",
    ),
    "moe_hidden": KernelBudget(
        3,
        "the type of x, times the root of the squares of weight · down · hidden: each hidden is rounded once, by at "
        "most a roundoff and by half of one as a rule, independently; 3 is six standard deviations of their sum",
    ),
    "moe_sums": KernelBudget(
        8,
        "float32, times the root of the squares of what sums of C and I products weigh, each times the root of its "
        "number of terms: errors of additions are independent too, and tensor cores cut sums off instead of rounding",
    ),
    "rolling_attended": KernelBudget(
        1,
        "the activations' type, times |attended| or, below it, the smallest normal number: the result is rounded once",
    ),
    "rolling_weights": KernelBudget(
        1.25,
        "the activations' type, times the sum of weight · |value - attended|: each weight is rounded once, relative "
        "to the largest so far; those below the smallest normal number, by its unit roundoff, whatever their size; a "
        "quarter more for exp2, second order, and a total of the weights that is not of the rounded ones",
    ),
    "rolling_sums": KernelBudget(
        128,
        "float32, times the sum of weight · |value|, and of the scores' products times that of weight · |value - "
        "attended|: a tensor core cuts off up to 2 roundoffs at each of 64 steps of 16 terms, as a rule half of that",
    ),
}


def budget_of(name: str) -> float:
    """The multiple of a row of the table."""
    return BUDGETS[name].multiple
