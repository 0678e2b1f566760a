"""The two base classes of all value types: frozen, compared by content, cheap.

``msgspec.Struct`` takes 0.16 us to make where a frozen dataclass takes 2.07 us (Python 3.11), and encodes itself. The
metaclass only tells type checkers what msgspec does anyway: subclasses inherit ``frozen``.
"""

from typing import dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class FrozenMeta(msgspec.StructMeta):
    """Metaclass of frozen structs."""


class Struct(msgspec.Struct, metaclass=FrozenMeta, frozen=True, gc=False, tag=True, omit_defaults=True):
    """An event, an action, a record: made in 0.2 us, compared by content, journalled as it is."""


class Section(msgspec.Struct, metaclass=FrozenMeta, frozen=True, forbid_unknown_fields=True):
    """A table of a scenario file."""
