"""From the names in somebody's file to canonical ones: prefixes of wrappers, fused weights, parts of another model."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from m2_ds.convert.stored import Stored
from m2_ds.model.weights import canonical_names

# Lightning's and DeepSpeed's wrappers, torch.compile's, a pipeline's layer numbers. No canonical name begins so.
_PREFIX = re.compile(r"^(?:(?:_forward_module|_orig_mod|module|model|\d+)\.)+")
_OF_ANOTHER_MODEL = "visual_tokenizer"  # the reference's loader leaves it out, too


@dataclass
class Named:
    """Canonical tensors, and the names of those that were left out."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    _origins: dict[str, str] = field(default_factory=dict)

    @property
    def prefixes(self) -> dict[str, int]:
        """What was stripped, and of how many tensors; layer numbers are told as N."""
        found = [re.sub(r"\d+", "N", match[0]) for name in self._origins.values() if (match := _PREFIX.match(name))]
        return dict(Counter(found))

    def add(self, raw: Iterable[tuple[str, Stored]], where: str, replace: bool = False) -> None:
        """Raises ValueError where two tensors stand for one, unless the later is to ``replace`` the earlier."""
        for name, tensor in raw:
            if _OF_ANOTHER_MODEL in name:
                self.dropped.append(name)
                continue
            for canonical, part in split(_PREFIX.sub("", name, count=1), tensor, where):
                if canonical in self._origins and not replace:
                    raise ValueError(f"{where}: {self._origins[canonical]} and {name} both stand for {canonical}")
                self.tensors[canonical], self._origins[canonical] = part, name


def split(name: str, tensor: Stored, where: str) -> list[tuple[str, Stored]]:
    """The canonical tensors behind an inner parameter's (fused q, k and v); mostly it is one itself."""
    names = canonical_names(name)
    if len(names) == 1:
        return [(name, tensor)]
    rows = tensor.shape[0] // len(names) if tensor.shape else 0
    if tensor.strides is not None or not tensor.shape or rows * len(names) != tensor.shape[0]:
        raise ValueError(f"{where}: {name} is {list(tensor.shape)}, which is no fused q, k and v stored row by row")
    shape = (rows, *tensor.shape[1:])
    return [(each, tensor.part(i * tensor.numel // len(names), shape)) for i, each in enumerate(names)]
