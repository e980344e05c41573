"""What an examination gives."""

from dataclasses import dataclass, field

from m2_ds.doctor.check import Result


@dataclass
class Report:
    """Everything that was found. ``hosts``: their names, in rank order."""

    recipe: str
    world_size: int
    hosts: list[str]
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(result.status == "fail" for result in self.results)
