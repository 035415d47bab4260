"""Where a model is served: one place, or several clusters that a promotion goes through wave by wave. Pure."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from validations.units import refuse
from validations.verdict import Value

Place = Literal["local", "kubernetes", "kserve"]
Region = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
"""A cluster's name, as the aliases champion-<name> have it: lower-case letters, digits and '-'."""
Repeated = Literal["quality", "shadow", "load", "approval", "canary", "watch", "custom", "hook"]


class Waves(Value):
    """Several clusters, each a region: one after the other, `waves` first to last. The first region goes through all
    gates, each further one through those of the kinds in `again`.

    `on_failure` says what goes back where one region does not pass: the regions of its own wave, or all of them.
    """

    kind: Literal["kubernetes", "kserve"] = "kubernetes"
    waves: tuple[tuple[Region, ...], ...] = Field(min_length=1)
    on_failure: Literal["wave", "all"] = "wave"
    again: tuple[Repeated, ...] = Field(default=("canary", "watch"), min_length=1)

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        regions = self.regions
        if twice := next((name for name in regions if regions.count(name) > 1), None):
            refuse(f"the region '{twice}' is in two waves, or in one twice: name it once")
        if any(not wave for wave in self.waves):
            refuse("a wave without a region: name one, or leave the wave out")
        return self

    @property
    def regions(self) -> tuple[str, ...]:
        """All regions in the order in which a promotion comes to them."""
        return tuple(name for wave in self.waves for name in wave)

    def go_back(self, failed: str, promoted: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the `promoted` regions go back where `failed` did not pass, the latest first."""
        wave = next(wave for wave in self.waves if failed in wave)
        return tuple(name for name in reversed(promoted) if self.on_failure == "all" or name in wave)
