"""The outcome of comparing two programs: a small sum type, each kind saying what it means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Equal:
    """No difference was found. `grade` says how much that means.

    `exact`: bit for bit, in the caller's dtype. `same function`: within 1e-9 in float64.
    `tested`: within the dtype's own rounding only, since float64 could not be run.
    `approximate`: the caller allowed it; `worst` is the error that it makes.
    `unproven` lists what was not exercised.
    """

    grade: str
    cases: int
    worst: float
    error: float
    naive_error: float
    unproven: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        counted = "1 case" if self.cases == 1 else f"{self.cases} cases"
        if self.grade == "exact":
            return f"exact ({counted})"
        if self.grade in ("tested", "approximate"):
            return f"{self.grade} ({counted}), worst error {self.worst:.1e}"
        return (
            f"same function (float64 difference {self.worst:.1e}, {counted}; error "
            f"{self.error:.1e}, naive {self.naive_error:.1e})"
        )


@dataclass(frozen=True)
class Differs:
    """A counterexample: in which case, what differs, and by how much."""

    case: str
    what: str
    detail: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"differs in {self.what} ({self.case}): {self.detail}"


@dataclass(frozen=True)
class NotVerified:
    """No comparison was made, and why."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"not verified: {self.reason}"


Verdict = Equal | Differs | NotVerified
