"""The common part of methods with estimated directions: copies with another strength or positions need no new fit."""

import copy
from typing import ClassVar, TypeVar

from lofit_lens.checks import check_number
from lofit_lens.interventions.base import Adapter
from lofit_lens.models import Positions

Some = TypeVar("Some", bound=Adapter)
SomeSteering = TypeVar("SomeSteering", bound="Steering")


class Steering(Adapter):
    """An adapter of estimated directions, which are not trained, added with a strength."""

    strength: ClassVar[str]  # name of the attribute that holds it

    def with_strength(self: SomeSteering, value: float) -> SomeSteering:
        """Return a copy with another strength.

        Raises:
            InputError: NaN or infinity.
        """
        made = copy.deepcopy(self)
        made._set_strength(value)
        return made

    def with_positions(self: SomeSteering, positions: str | Positions) -> SomeSteering:
        """Return a copy that acts on other positions.

        Raises:
            InputError: unknown positions.
        """
        return at_other_positions(self, positions)

    def _set_strength(self, value: float) -> None:
        check_number(**{self.strength: value})
        setattr(self, self.strength, float(value))


def at_other_positions(adapter: Some, positions: str | Positions) -> Some:
    """Return a copy of an adapter that acts on other positions.

    Raises:
        InputError: unknown positions.
    """
    made = copy.deepcopy(adapter)
    made.positions = Positions.parse(positions)
    return made
